"""Building the replays of a unit: graphs of aten calls, inverses and decodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import fx
from torch.fx.node import map_aggregate

from revfx.engine.collectives import run_collective
from revfx.engine.operators import OF_SHAPE, UNINITIALIZED, is_collective
from revfx.engine.replaying import item, runner
from revfx.engine.unit import Number, Replay, Slot, UnitOp
from revfx.passes._torch import boxed_codegen, packet_name
from revfx.passes.program import Arc
from revfx.plan.nodes import (
    add_placeholder,
    after_write,
    corrected_inverse,
    empty,
    place,
    with_state,
    without_statistics,
)


aten: Any = torch.ops.aten
READS_NO_ELEMENTS = UNINITIALIZED | OF_SHAPE


class Unreplayable(Exception):
    """A unit has no replay."""


@dataclass(frozen=True)
class Recompute:
    """Run an operator of the unit again."""

    op: int


@dataclass(frozen=True)
class Inversion:
    """Compute the slot `head` from those of `tail` by an inverse; with the index of its code, -1 without one."""

    arc: Arc
    head: int
    tail: tuple[int, ...]
    code: int


Action = Recompute | Inversion


@dataclass(frozen=True)
class SlotMemory:
    """Where the slots of a unit lie.

    Attributes:
        allocation: by slot, the number of its allocation.
        before: by slot of a value that a write made, the slot of the same tensor before.
        writer: by the same slots, the operator that wrote.
        writes: by operator, pairs of slots before and after.
        overwritten: slots with elements that an operator overwrites, by this or another view.
    """

    allocation: Mapping[int, int]
    before: Mapping[int, int]
    writer: Mapping[int, int]
    writes: Mapping[int, Sequence[tuple[int, int]]]
    overwritten: frozenset[int]

    def first(self, slot: int) -> int:
        """Return the slot of the same tensor before all writes."""
        while slot in self.before:
            slot = self.before[slot]
        return slot


class ReplayBuilder:
    """Builds one replay.

    Args:
        ops: the operators of the unit.
        memory: where its slots lie.
        known: slots that are given.
        actions: in an order in which they can run; of several that give a slot the first one counts.
        wanted: slots to return.
        own: given slots in allocations that the replay owns, and may write to.
    """

    def __init__(
        self, ops: Sequence[UnitOp], memory: SlotMemory, known: Iterable[int], actions: Sequence[Action],
        wanted: Sequence[int], own: Iterable[int] = (),
    ) -> None:  # fmt: skip
        self.ops: Sequence[UnitOp] = ops
        self.memory: SlotMemory = memory
        self.known: frozenset[int] = frozenset(known)
        self.wanted: Sequence[int] = wanted
        self.actions = actions
        self.graph: fx.Graph = fx.Graph()
        self.inputs: dict[tuple[str, int], fx.Node] = {}  # placeholders, by kind and index
        self.env: dict[int, fx.Node] = {}  # by slot
        self.corrected: list[tuple[fx.Node, int]] = []  # inverses with codes, and the last operand of each
        self.private: set[int] = {memory.allocation[s] for s in own}  # allocations that the replay owns
        self.shared: set[int] = {memory.allocation[s] for s in self.known} - self.private
        self.maker: dict[int, int] = {}  # by slot, the first action that gives it
        runs: dict[int, int] = {}  # by operator, the first action that runs it
        for number, action in enumerate(actions):
            for slot in self._made_by(action):
                self.maker.setdefault(slot, number)
            if isinstance(action, Recompute):
                runs.setdefault(action.op, number)
            else:
                self.shared.add(memory.allocation[action.head])
        for slot, writer in memory.writer.items():  # of tensors that are read again after a write by another view
            if writer in runs:
                self.maker.setdefault(slot, runs[writer])

    def run(self) -> Replay:
        """Return the replay.

        Raises:
            Unreplayable: the wanted slots do not follow from the known ones.
        """
        for number in self._order():
            action = self.actions[number]
            if isinstance(action, Inversion):
                self._invert(action)
            else:
                self._run(action.op)
        self.graph.output(tuple(map(self._output, self.wanted)))
        for node, slot in self.corrected:
            node.update_arg(1, self._is_last_use(slot))
        self.graph.set_codegen(boxed_codegen())
        self.graph.lint()
        run = runner(self.graph, [kind for kind, _ in self.inputs])
        return Replay(self.graph, tuple(self.inputs), tuple(self.wanted), run)

    # --- order
    def outline(self) -> tuple[set[int], set[int]]:
        """Return the slots that the replay makes, and those that it reads."""
        needed, read = dict.fromkeys(self._order()), {*self.wanted}
        for number in needed:
            read.update(self._read_by(self.actions[number]))
        return {slot for slot, number in self.maker.items() if number in needed}, read

    def _made_by(self, action: Action) -> list[int]:
        if isinstance(action, Inversion):
            return [action.head]
        made = [s for s in self.ops[action.op].outs if s >= 0]
        made += [after for _, after in self.memory.writes.get(action.op, ())]
        return list(dict.fromkeys(made))

    def _read_by(self, action: Action) -> list[int]:
        """Return the slots that must be there before an action."""
        found: list[int] = []
        if isinstance(action, Inversion):
            found += action.tail
        else:
            op = self.ops[action.op]
            if packet_name(op.func) not in READS_NO_ELEMENTS:
                collect_slots((without_statistics(op.func, op.args), tuple(op.kwargs.values())), found)
        for slot in tuple(found):
            found += self._before_write(slot)
        return found

    def _before_write(self, slot: int) -> list[int]:
        """Return the slot of the same tensor before the write to its memory, which must be there before this one."""
        before = self.memory.before.get(slot)
        return [] if before is None or slot in self.known else [before]

    def _order(self) -> list[int]:
        """Return the needed actions in an order in which they can run: inverses first, then operators.

        Raises:
            Unreplayable: there is none.
        """
        # The actions that the wanted slots follow from, with the slots that each reads.
        needed: dict[int, list[int]] = {}
        todo = [*self.wanted]
        seen = {*self.known}
        while todo:
            slot = todo.pop()
            if slot in seen:
                continue
            seen.add(slot)
            number = self.maker.get(slot)
            if number is None:
                raise Unreplayable(f"nothing gives slot {slot}")
            todo += self._before_write(slot)
            if number not in needed:
                needed[number] = self._read_by(self.actions[number])
                todo += needed[number]

        # An action waits for its operands, and a write for the readers of the content that it overwrites.
        waits = nx.DiGraph()
        waits.add_nodes_from(needed)
        for number, read in needed.items():
            for slot in read:
                if slot not in self.known:
                    waits.add_edge(self.maker[slot], number)
            for reader in self._readers_before(number, needed):
                waits.add_edge(reader, number)
        try:
            return list(nx.lexicographical_topological_sort(waits, key=self._rank))
        except nx.NetworkXUnfeasible as e:
            raise Unreplayable("operators that write to memory wait for each other") from e

    def _readers_before(self, number: int, needed: Mapping[int, list[int]]) -> set[int]:
        """Return the needed actions that read memory before an action writes to it."""
        found: set[int] = set()
        writer = self.actions[number]
        if isinstance(writer, Inversion) or writer.op not in self.memory.writes:
            return found
        written = {self.memory.allocation[before] for before, _ in self.memory.writes[writer.op]}
        for other, read in needed.items():
            action = self.actions[other]
            if other == number or isinstance(action, Inversion) or action.op > writer.op:
                continue
            if any(self.memory.allocation[s] in written for s in read):
                found.add(other)
        return found

    def _rank(self, number: int) -> tuple[int, int]:
        action = self.actions[number]
        return (0, number) if isinstance(action, Inversion) else (1, action.op)

    # --- nodes
    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
        name = packet_name(target) or getattr(target, "__name__", "")
        if not name.isidentifier():
            name = "solve"  # of a lambda; torch takes longer to find a name
        return self.graph.create_node("call_function", target, args, kwargs or {}, name=name)

    def _input(self, kind: str, index: int) -> fx.Node:
        key = kind, index
        if key not in self.inputs:
            self.inputs[key] = add_placeholder(self.graph, f"{kind}_{index}")
        return self.inputs[key]

    def _get(self, slot: int) -> fx.Node:
        node = self.env.get(slot)
        if node is None and slot in self.known:
            node = self.env[slot] = self._input("slot", slot)
        if node is None and slot in self.memory.before:
            node = self.env[slot] = self._get(self.memory.before[slot])  # the same tensor, which was written to
        assert node is not None, slot
        return node

    def _output(self, slot: int) -> fx.Node:
        node = self._get(slot)
        if slot in self.memory.before and self.env.get(self.memory.before[slot]) is node:
            node = self._call(after_write, (node,))
        return node

    def _invert(self, action: Inversion) -> None:
        tail = tuple(map(self._get, action.tail))
        if action.code >= 0:
            node = self._call(corrected_inverse(action.arc), (self._input("code", action.code), False, *tail))
            self.corrected.append((node, action.tail[-1]))
        else:
            node = self._call(action.arc.solve, tail)
        self.env[action.head] = self._call(place, (node, self._input("layout", action.head)))

    def _run(self, number: int) -> None:
        """Add the nodes of an operator of the unit."""
        op = self.ops[number]
        name = packet_name(op.func)
        if name in UNINITIALIZED:
            self.env[op.outs[0]] = self._call(empty, (self._input("layout", op.outs[0]),))
            self._own(op, op.outs[0])
            return
        if name in OF_SHAPE:  # only the layout of the first argument is read
            like = self._call(empty, (self._input("layout", int(op.args[0])),))
            args, kwargs = map_aggregate((op.args[1:], op.kwargs), self._argument)
            args = like, *args
        else:
            args, kwargs = map_aggregate((without_statistics(op.func, op.args), op.kwargs), self._argument)

        # A write goes to a copy, unless the replay owns the memory.
        for before, _ in self.memory.writes.get(number, ()):
            if self.memory.allocation[before] not in self.private:
                args = self._copy_written(args, before)

        if op.state >= 0:
            node = self._call(with_state(op.func), (self._input("state", op.state), *args), kwargs)
        elif is_collective(op.func):
            node = self._call(run_collective, (op.func, *args), kwargs)
        else:
            node = self._call(op.func, args, kwargs)
        if op.is_single:
            self.env[op.outs[0]] = node
            self._own(op, op.outs[0])
            return
        for position, slot in enumerate(op.outs):
            if slot >= 0:
                self.env[slot] = self._call(item, (node, position))
                self._own(op, slot)

    def _argument(self, leaf: Any) -> Any:
        if type(leaf) is Slot:
            return self._get(int(leaf))
        if type(leaf) is Number:
            return self._input("number", int(leaf))
        return leaf

    def _copy_written(self, args: tuple[Any, ...], slot: int) -> tuple[Any, ...]:
        """Return the arguments of a write with a copy in the place of the tensor that is written to."""
        memory = self.memory
        node = self._get(slot)
        copy = self._call(aten.clone.default, (node,))
        for other in memory.before:
            is_another_view = memory.first(other) != memory.first(slot)
            if is_another_view and memory.allocation[other] == memory.allocation[slot]:
                raise Unreplayable("memory that is written to has several views")
        return tuple(copy if a is node else a for a in args)

    def _own(self, op: UnitOp, slot: int) -> None:
        """Note that the replay owns the memory of a result, unless it is returned or lies in a given tensor."""
        allocation = self.memory.allocation[slot]
        if not op.is_view and allocation not in self.shared:
            self.private.add(allocation)

    def _is_last_use(self, slot: int) -> bool:
        """Return whether one node reads a slot, and nothing else its memory, which the replay owns."""
        allocation = self.memory.allocation[slot]
        nodes: set[Any] = {node for s, node in self.env.items() if self.memory.allocation[s] == allocation}
        node: Any = self.env[slot]
        while node in nodes and len(node.users) == 1:  # up through views and writes in place
            nodes.remove(node)
            if node.args:
                node = node.args[0]
        return allocation in self.private and not nodes


def collect_slots(tree: Any, found: list[int]) -> None:
    """Append the slots among some arguments, in order."""
    for x in tree:
        if type(x) is Slot:
            found.append(int(x))
        elif isinstance(x, (list, tuple)):
            collect_slots(x, found)

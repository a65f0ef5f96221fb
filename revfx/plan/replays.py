"""Building the replays of a unit: graphs of aten calls, inverses and decodes."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from revfx.engine.collectives import run_collective
from revfx.engine.operators import OF_SHAPE, STATISTICS, UNINITIALIZED, is_collective
from revfx.engine.replaying import item, runner
from revfx.engine.unit import Number, Replay, Slot, UnitOp
from revfx.passes._torch import boxed_codegen, packet_name
from revfx.passes.program import Arc
from revfx.plan.nodes import after_write, corrected_inverse, empty, place, with_state


aten: Any = torch.ops.aten


class Unreplayable(Exception):
    """A unit has no replay."""


@dataclass(frozen=True)
class Run:
    """Run an operator of the unit again."""

    op: int


@dataclass(frozen=True)
class Inversion:
    """Invert: `head` from `tail`, slots; with the index of its code, -1 without one."""

    arc: Arc
    head: int
    tail: tuple[int, ...]
    code: int


Action = Run | Inversion


@dataclass(frozen=True)
class Memory:
    """The memory of a unit's slots.

    Attributes:
        allocation: by slot, the number of its allocation.
        before: by slot of a value that a write made, the slot of the same tensor before.
        writer: by such a slot, the operator that wrote.
        writes: by operator, pairs of slots before and after.
        overwritten: slots of which an operator writes over elements, by this or another view.
    """

    allocation: Mapping[int, int]
    before: Mapping[int, int]
    writer: Mapping[int, int]
    writes: Mapping[int, Sequence[tuple[int, int]]]
    overwritten: frozenset[int]


class Builder:
    """Builds one replay.

    Args:
        ops: the operators of the unit.
        memory: where its slots lie.
        known: slots that are given.
        actions: in an order in which they can run; of several that give a slot the first one counts.
        wanted: slots to return.
        own: given slots of which the memory is the replay's own.
    """

    def __init__(
        self, ops: Sequence[UnitOp], memory: Memory, known: Iterable[int], actions: Sequence[Action],
        wanted: Sequence[int], own: Iterable[int] = (),
    ) -> None:  # fmt: skip
        self.ops, self.memory, self.known, self.wanted = ops, memory, frozenset(known), wanted
        self.graph, self.inputs = fx.Graph(), list[tuple[str, int]]()
        self.placeholders: dict[tuple[str, int], fx.Node] = {}
        self.env: dict[int, fx.Node] = {}
        self.maker: dict[int, int] = {}
        self.actions = actions
        for number, action in enumerate(actions):
            for slot in self._made_by(action):
                if slot not in self.known:
                    self.maker.setdefault(slot, number)
        runs: dict[int, int] = {}  # by operator, the first action that runs it
        for number, action in enumerate(actions):
            if isinstance(action, Run):
                runs.setdefault(action.op, number)
        for slot, writer in memory.writer.items():  # of tensors that are read again after a write by another view
            if slot not in self.known and writer in runs:
                self.maker.setdefault(slot, runs[writer])
        self.corrected: list[tuple[fx.Node, int]] = []  # inverses with codes, and the last operand of each
        self.private = {memory.allocation[s] for s in own}  # allocations that are the replay's own
        self.shared = {memory.allocation[s] for s in self.known} - self.private
        for action in actions:
            if isinstance(action, Inversion):
                self.shared.add(memory.allocation[action.head])

    def run(self) -> Replay:
        for number in self._order():
            action = self.actions[number]
            if isinstance(action, Inversion):
                self._invert(action)
            else:
                self._run(action.op)
        self.graph.output(tuple(self._wanted(slot) for slot in self.wanted))
        for node, slot in self.corrected:
            node.update_arg(1, self._is_last_use(slot))
        self.graph.set_codegen(boxed_codegen())
        self.graph.lint()
        run = runner(self.graph, [kind for kind, _ in self.inputs])
        return Replay(self.graph, tuple(self.inputs), tuple(self.wanted), run)

    # --- order
    def outline(self) -> tuple[set[int], set[int]]:
        """Return the slots that the replay makes, and those that it reads."""
        made: set[int] = set()
        read = {*self.wanted}
        for number in self._order():
            made.update(self._made_by(self.actions[number]))
            for slot in self._read_by(self.actions[number]):
                read.update((slot, *self._needs(slot)))
        return made, read

    def _made_by(self, action: Action) -> list[int]:
        if isinstance(action, Inversion):
            return [action.head]
        outs = [s for s in self.ops[action.op].outs if s >= 0]
        return outs + [after for _, after in self.memory.writes.get(action.op, ()) if after not in outs]

    def _read_by(self, action: Action) -> list[int]:
        if isinstance(action, Inversion):
            return list(action.tail)
        op = self.ops[action.op]
        found: list[int] = []
        if packet_name(op.func) not in UNINITIALIZED | OF_SHAPE:
            collect_slots((_replayed_args(op), tuple(op.kwargs.values())), found)
        return found

    def _needs(self, slot: int) -> list[int]:
        """Return the slots that must be there before this one is read: the same tensor before a write to its memory."""
        before = self.memory.before.get(slot)
        return [] if before is None or slot in self.known else [before]

    def _order(self) -> list[int]:
        """Return the actions that are needed, inverses first, then operators as in the forward."""
        needed: set[int] = set()
        todo = [*self.wanted]
        seen: set[int] = set()
        while todo:
            slot = todo.pop()
            if slot in seen or slot in self.known:
                continue
            seen.add(slot)
            number = self.maker.get(slot)
            if number is None:
                raise Unreplayable(f"nothing gives slot {slot}")
            todo += self._needs(slot)
            if number not in needed:
                needed.add(number)
                todo += self._read_by(self.actions[number])
        after: dict[int, set[int]] = {number: set() for number in needed}  # actions that an action waits for
        for number in needed:
            for slot in self._read_by(self.actions[number]):
                for s in (slot, *self._needs(slot)):
                    if s not in self.known:
                        after[number].add(self.maker[s])
        for number in needed:
            action = self.actions[number]
            if isinstance(action, Run) and action.op in self.memory.writes:
                after[number] |= self._readers_before(number, action.op, needed)
        return _sorted(after, self._rank)

    def _readers_before(self, number: int, op: int, needed: set[int]) -> set[int]:
        """Return the actions that read memory before operator `op` writes to it."""
        written = {self.memory.allocation[before] for before, _ in self.memory.writes[op]}
        found: set[int] = set()
        for other in needed:
            action = self.actions[other]
            if other == number or not isinstance(action, Run) or action.op > op:
                continue
            if any(self.memory.allocation[s] in written for s in self._read_by(action)):
                found.add(other)
        return found

    def _rank(self, number: int) -> tuple[int, int]:
        action = self.actions[number]
        return (0, number) if isinstance(action, Inversion) else (1, action.op)

    # --- nodes
    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
        name = packet_name(target) or getattr(target, "__name__", "")
        name = name if name.isidentifier() else "solve"  # of a lambda; torch takes longer to find a name
        return self.graph.create_node("call_function", target, args, kwargs or {}, name=name)

    def _input(self, kind: str, index: int) -> fx.Node:
        key = kind, index
        if key not in self.placeholders:
            last = next(reversed(self.placeholders.values()), None)
            with self.graph.inserting_after(last) if last is not None else self._at_start():
                name = f"{kind}_{index}"
                self.placeholders[key] = self.graph.create_node("placeholder", name, name=name)
            self.inputs.append(key)
        return self.placeholders[key]

    def _at_start(self) -> Any:
        first = next(iter(self.graph.nodes), None)
        return self.graph.inserting_before(first)

    def _get(self, slot: int) -> fx.Node:
        node = self.env.get(slot)
        if node is None and slot in self.known:
            node = self.env[slot] = self._input("slot", slot)
        if node is None and slot in self.memory.before:
            node = self.env[slot] = self._get(self.memory.before[slot])  # the same tensor, which was written to
        assert node is not None, slot
        return node

    def _wanted(self, slot: int) -> fx.Node:
        node = self._get(slot)
        if slot in self.memory.before and self.env.get(self.memory.before[slot]) is node:
            node = self._call(after_write, (node,))
        return node

    def _invert(self, action: Inversion) -> None:
        tail = tuple(self._get(s) for s in action.tail)
        if action.code >= 0:
            node = self._call(corrected_inverse(action.arc), (self._input("code", action.code), False, *tail))
            self.corrected.append((node, action.tail[-1]))
        else:
            node = self._call(action.arc.solve, tail)
        self.env[action.head] = self._call(place, (node, self._input("layout", action.head)))

    def _run(self, number: int) -> None:
        op = self.ops[number]
        if packet_name(op.func) in UNINITIALIZED:
            self._make_empty(op)
            return
        if packet_name(op.func) in OF_SHAPE:
            like = self._call(empty, (self._input("layout", int(op.args[0])),))
            args = like, *self._filled(op.args[1:])
        else:
            args = self._filled(_replayed_args(op))
        kwargs = {k: self._filled(v) for k, v in op.kwargs.items()}
        for before, _ in self.memory.writes.get(number, ()):
            if self.memory.allocation[before] not in self.private:
                args = self._cloned(args, before)
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

    def _is_last_use(self, slot: int) -> bool:
        """Return whether one node reads a slot, and nothing else its memory, which is the replay's own."""
        allocation = self.memory.allocation[slot]
        nodes: set[Any] = {node for s, node in self.env.items() if self.memory.allocation[s] == allocation}
        node: Any = self.env[slot]
        while node in nodes and len(node.users) == 1:  # up through views and writes in place
            nodes.remove(node)
            if node.args:
                node = node.args[0]
        return allocation in self.private and not nodes

    def _own(self, op: UnitOp, slot: int) -> None:
        """Note that the memory of a result is the replay's own, unless it is returned or lies in a given tensor."""
        allocation = self.memory.allocation[slot]
        if not op.is_view and allocation not in self.shared:
            self.private.add(allocation)

    def _cloned(self, args: tuple[Any, ...], slot: int) -> tuple[Any, ...]:
        """Return the arguments of a write with a copy in the place of the tensor that is written to."""
        node = self._get(slot)
        copy = self._call(aten.clone.default, (node,))
        for other, allocation in self.memory.allocation.items():
            is_beside = allocation == self.memory.allocation[slot] and self._first(other) != self._first(slot)
            if is_beside and other in self.memory.before:
                raise Unreplayable("memory that is written to has several views")
        return tuple(copy if a is node else a for a in args)

    def _first(self, slot: int) -> int:
        """Return the slot of the same tensor before all writes."""
        while slot in self.memory.before:
            slot = self.memory.before[slot]
        return slot

    def _make_empty(self, op: UnitOp) -> None:
        slot = op.outs[0]
        self.env[slot] = self._call(empty, (self._input("layout", slot),))
        self._own(op, slot)

    def _filled(self, tree: Any) -> Any:
        if type(tree) is Slot:
            return self._get(int(tree))
        if type(tree) is Number:
            return self._input("number", int(tree))
        if isinstance(tree, (list, tuple)):
            return type(tree)([self._filled(x) for x in tree])
        return tree


def _replayed_args(op: UnitOp) -> tuple[Any, ...]:
    """Return the arguments with which an operator runs again: normalisations leave running statistics alone."""
    at = STATISTICS.get(op.func, ())
    if not at or op.args[5] is not True:
        return op.args
    return tuple(None if i in at else a for i, a in enumerate(op.args))


def collect_slots(tree: Any, found: list[int]) -> None:
    """Append the slots among some arguments, in order."""
    for x in tree:
        if type(x) is Slot:
            found.append(int(x))
        elif isinstance(x, (list, tuple)):
            collect_slots(x, found)


def _sorted(after: Mapping[int, set[int]], rank: Callable[[int], Any]) -> list[int]:
    """Return the keys so that each comes after those that it waits for; of the keys that can, the lowest rank first."""
    waiting = {n: len(before) for n, before in after.items()}
    followers: dict[int, list[int]] = {n: [] for n in after}
    for n, before in after.items():
        for b in before:
            followers[b].append(n)
    ready = [(rank(n), n) for n, count in waiting.items() if count == 0]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        _, n = heapq.heappop(ready)
        order.append(n)
        for f in followers[n]:
            waiting[f] -= 1
            if waiting[f] == 0:
                heapq.heappush(ready, (rank(f), f))
    if len(order) < len(after):
        raise Unreplayable("operators that write to memory wait for each other")
    return order

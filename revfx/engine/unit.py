"""Units: runs of operators with saved tensors that are dropped and obtained again together.

A unit is matched operator by operator while the forward runs. Its tensors have **slots**: external ones are bound to
the first tensor that appears in their place, the others to results of operators. Sizes, factors, external tensors,
random states and codes differ from call to call: they are stored per call, and given to the unit's **replays**.

A replay is an `fx.Graph` of aten calls, inverses and decodes. One goes forwards, from the entry; the other one
backwards, from the exit to the entry. Both yield the saved tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from revfx.passes.program import Arc


class Slot(int):
    """The number of a tensor of a unit, in the place of a tensor among arguments."""

    __slots__ = ()


class Number(int):
    """The index of a number that is stored per call, in its place among arguments."""

    __slots__ = ()


@dataclass(frozen=True)
class UnitOp:
    """An operator of a unit.

    Attributes:
        args, kwargs: with slots in the place of tensors, and numbers in the place of those that may differ between
            calls; everything else is compared.
        outs: the slot of each result, -1 of those that nothing refers to.
        is_single: it returns one tensor and no sequence.
        is_view: its results are views, which nobody may hold while autograd makes them its own.
        state: the index of the random state to note before it; -1 if it draws nothing.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: tuple[int, ...]
    is_single: bool
    is_view: bool
    state: int = -1


@dataclass(frozen=True)
class Coded:
    """An inverse that rounds: the slots of its head and of its tail."""

    arc: Arc
    head: int
    tail: tuple[int, ...]


@dataclass(frozen=True)
class Replay:
    """A graph that takes `inputs` as one list, which it empties, and returns the tensors of `outputs`, slots.

    `inputs`: pairs of a kind ("slot", "number", "state", "code" or "layout") and an index. A layout has the shape, the
    strides and the offset in bytes of the tensor in a slot, its dtype and its device.
    """

    graph: fx.Graph
    inputs: tuple[tuple[str, int], ...]
    outputs: tuple[int, ...]
    run: Callable[[list[Any]], tuple[Any, ...]]


@dataclass(frozen=True, eq=False)
class Unit:
    """A range of operators whose saved tensors are dropped together; see above.

    Attributes:
        read_forwards, read_backwards: slots of tensors that a call holds for the forward or the backward replay.
        read: slots of tensors that are read after the last operator of the unit.
        ops: the operators in order.
        slots: the number of slots.
        numbers: the count of Python numbers that a call stores.
        external: slots that are bound when they first appear, entries included.
        entry: slots of the values before the unit.
        kept: entries that every call holds; the backward replay gives the others.
        exit: slots of the values after the unit.
        held: slots of tensors that calls hold because nothing computes them.
        cloned: external and held slots in outside memory that each forward writes to; calls hold copies of them.
        coded: inverses that are corrected by codes, one code each.
        rounds: whether an inverse rounds, so that an error in its operands shows in the entry.
        forward: the replay from the entry.
        later: replays that go on after it, one after another, for saved tensors that the backward reads later.
        passed_on: slots that these pass on to each other, and that are no saved tensors.
        loan: a replay that gives tensors of the exit to later units, which borrow them as their entries.
        compressed: slots of saved tensors of which one bit per element is kept: whether it is positive.
        dropout_masks: by slot of drawn zeros and ones, a slot of a later value in the same allocation that has the
            same zeros.
        is_staged: nothing is inverted: the replays, in stages, give the tensors of the exit as well, which no call
            holds then.
        backward: the replay from the exit; None if nothing is inverted.
        layouts: slots of tensors whose strides are noted.
        workspaces: slots of bytes that a kernel left for the backward, with gaps of undefined content.
        same: slots of tensors that were written through another view, with the first slot of the same tensor.
        renamed: the same for results, in order: the operator that wrote, the first slot, and the slot from then on.
        shapes: the shapes of slots for which inverses were derived.
        facts: facts about the elements of slots that inverses rely on.
        where: the first and the last line of the user's code.
    """

    ops: tuple[UnitOp, ...]
    slots: int
    numbers: int
    external: frozenset[int]
    entry: tuple[int, ...]
    kept: frozenset[int]
    exit: tuple[int, ...]
    held: frozenset[int]
    cloned: frozenset[int]
    coded: tuple[Coded, ...]
    rounds: bool
    layouts: frozenset[int]
    workspaces: frozenset[int]
    same: Mapping[int, int]
    renamed: tuple[tuple[int, int, int], ...]
    shapes: Mapping[int, tuple[int, ...]]
    facts: tuple[tuple[int, Any], ...]
    forward: Replay
    backward: Replay | None
    where: tuple[str, str] = ("", "")
    later: tuple[Replay, ...] = ()
    passed_on: frozenset[int] = frozenset()
    loan: Replay | None = None
    compressed: frozenset[int] = frozenset()
    dropout_masks: Mapping[int, int] = field(default_factory=dict[int, int])
    is_staged: bool = False
    stages: tuple[Replay, ...] = field(init=False)
    last_reader: Mapping[int, int] = field(init=False)
    last_loan: Mapping[int, int] = field(init=False)
    lends: frozenset[int] = field(init=False)
    droppable: frozenset[int] = field(init=False)
    given: frozenset[int] = field(init=False)
    alive: frozenset[int] = field(init=False)
    exit_before_writes: tuple[int, ...] = field(init=False)
    read_forwards: tuple[int, ...] = field(init=False)
    read_backwards: tuple[int, ...] = field(init=False)
    read: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        """Derive the other attributes.

        `stages`: the replays forwards; `last_reader`: by slot, the last stage that reads the result of an earlier one;
        `last_loan`: by slot of the entry, the last stage that reads it; `lends`: slots of the exit that others borrow;
        `droppable`: slots of saved tensors that the replays give back; `given`: external slots that a call holds;
        `alive`: slots of tensors that stay until the unit ends; `exit_before_writes`: the first slots of the exit.
        """
        stages = (self.forward, *self.later)
        object.__setattr__(self, "stages", stages)
        results: set[int] = set()
        given: set[int] = set()
        last_reader: dict[int, int] = {}
        last_loan: dict[int, int] = {}
        for number, replay in enumerate(stages):
            read = {i for kind, i in replay.inputs if kind == "slot"}
            last_reader.update(dict.fromkeys(read & results, number))
            last_loan.update(dict.fromkeys(read.intersection(self.entry), number))
            results.update(replay.outputs)
            given |= read & self.external
        for replay in (self.loan, self.backward):
            if replay is not None:
                given.update(i for kind, i in replay.inputs if kind == "slot" and i in self.external)
        given.difference_update(self.dropout_masks)
        object.__setattr__(self, "last_reader", last_reader)
        object.__setattr__(self, "last_loan", last_loan)
        object.__setattr__(self, "lends", frozenset() if self.loan is None else frozenset(self.loan.outputs))
        object.__setattr__(self, "droppable", frozenset(results) - self.held - self.passed_on)
        object.__setattr__(self, "given", frozenset(given.difference(self.entry) | given & self.kept))
        alive: set[int] = set()
        for coded in self.coded:
            alive.update((coded.head, *coded.tail))
        alive.update(self.exit)
        alive.update(slot for slot, _ in self.facts)
        alive.update(self.dropout_masks.values())  # autograd saves none in a frozen layer
        object.__setattr__(self, "alive", frozenset(alive))
        object.__setattr__(self, "exit_before_writes", tuple([self.same.get(slot, slot) for slot in self.exit]))
        backwards = self.held | self.given
        object.__setattr__(self, "read_backwards", tuple(backwards))
        object.__setattr__(self, "read_forwards", tuple(backwards.union(self.entry)))
        object.__setattr__(self, "read", frozenset(backwards.union(self.entry, alive)))
        object.__setattr__(self, "cloned", self.cloned & self.read)

    def slot_at(self, slot: int, at: int) -> int:
        """Return the slot of a result when so many operators have run."""
        now = slot
        for writer, first, then in self.renamed:
            if first == slot and writer < at:
                now = then
        return now

    def rewritten(self, number: int) -> list[tuple[int, int]]:
        """Return the results that an operator writes to by another view, if they are held or in the exit.

        Pairs of the first slot of the tensor, and of its slot from then on.
        """
        read = self.held.union(self.exit)
        return [(first, slot) for writer, first, slot in self.renamed if writer == number and slot in read]

    def __str__(self) -> str:
        first, last = self.where
        return first if first == last else f"{first} .. {last}"

    @property
    def key(self) -> Any:
        """The operators, tensors and inverses that equal units share."""
        ops = tuple((op.func, repr(op.args), repr(op.kwargs), op.outs, op.state) for op in self.ops)
        inverses = None if self.backward is None else str(self.backward.graph.python_code("self").src)
        stages = tuple((replay.inputs, replay.outputs) for replay in self.stages), self.lends, tuple(self.dropout_masks)
        rest = self.entry, self.exit, self.kept, self.held, self.cloned, self.droppable, self.compressed, stages
        return ops, rest, inverses, tuple(self.shapes.items()), self.facts

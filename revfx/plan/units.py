"""From the regions of a tape to units: one per step, alike ones once."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from revfx.engine.operators import STATISTICS, UNINITIALIZED, is_repeatable, is_view
from revfx.engine.tape import Op, Ref, Tape
from revfx.engine.unit import Coded, Number, Replay, Slot, Unit, UnitOp
from revfx.parts import Part
from revfx.passes._torch import packet_name
from revfx.passes.closure import Forward
from revfx.passes.composed import rounds
from revfx.passes.cuts import Step
from revfx.passes.facts import Fact
from revfx.passes.program import Arc
from revfx.plan.couplings import Couplings
from revfx.plan.memory import first_slots, is_filled, is_workspace, overwritten
from revfx.plan.replays import Action, Builder, Inversion, Memory, Run, Unreplayable


@dataclass(frozen=True)
class Inverse:
    """An inverse with values of the tape, and the facts about some that it relies on."""

    arc: Arc
    head: int
    tail: tuple[int, ...]
    facts: tuple[tuple[int, Fact], ...]


@dataclass(frozen=True)
class Span:
    """Operators first..last of a tape that become a unit.

    Attributes:
        entry, exit: the values that are there before and after.
        actions: the steps of going backwards, with operators and values of the tape in the place of the unit's.
        given: values of the exit that going backwards starts from.
        kept: values that are held, as the plan says.
        inverted: operators that inverses were derived from.
        constants: values that inverses were derived for, such as indices, with their elements.
        region: the number of the region that it is a step of.
    """

    first: int
    last: int
    entry: tuple[int, ...]
    exit: tuple[int, ...]
    actions: tuple[Run | Inverse, ...]
    given: frozenset[int]
    kept: frozenset[int]
    inverted: frozenset[int]
    constants: tuple[tuple[int, Fact], ...] = ()
    region: int = 0


def spans(found: Couplings) -> list[Span]:
    """Return the spans of all regions, in order."""
    made: list[Span] = []
    before = -1
    for number, region in enumerate(found.regions):
        of_region: list[Span] = []
        for step in region.steps:
            span = _span(found, step, region.side)
            while of_region and any(isinstance(a, Run) and a.op < span.first for a in span.actions):
                span = _joined(of_region.pop(), span)  # going backwards runs operators further up
            of_region.append(span)
        for span in _without_first_map(of_region):
            made.append(replace(_with_operands(found.tape, span, before), region=number))
            before = span.last
    return made


def _without_first_map(spans: list[Span]) -> list[Span]:
    """Join the spans up to a linear map before the first coupling: the start of a chain is replayed forwards.

    So the inverse of the map, which is not cheap, is not needed.
    """
    inverting: list[tuple[int, bool]] = []  # with whether a linear map, or something else with long codes, is inverted
    for number, span in enumerate(spans):
        arcs = [a.arc for a in span.actions if isinstance(a, Inverse) and not a.arc.exact]
        if arcs:
            inverting.append((number, all(arc.coded for arc in arcs)))
    if len(inverting) < 2 or not inverting[0][1] or inverting[1][1]:
        return spans
    joined, *rest = spans
    for span in rest[: inverting[0][0]]:
        joined = _joined(joined, span)
    return [joined, *rest[inverting[0][0] :]]


def _constants(found: Couplings, inverted: set[int], steps: range) -> tuple[tuple[int, Fact], ...]:
    """Return the elements of constants that inverted operators read."""
    of, read = found.of, dict[int, Fact]()
    for i in steps:
        node = found.lowered.op_nodes[i]
        if of.op_of[node] not in inverted:
            continue
        for n in node.all_input_nodes:
            constant = n.meta.get("constant")
            if constant is not None and n in of.value_of:
                read[of.value_of[n]] = tuple(constant.flatten().tolist())
    return tuple(read.items())


def _joined(first: Span, then: Span) -> Span:
    """Return two spans as one."""
    actions = (*then.actions, *first.actions)
    runs = {a.op for a in actions if isinstance(a, Run)}
    inverted = (first.inverted | then.inverted) - runs
    kept = first.kept | then.kept
    constants = first.constants + then.constants
    return Span(first.first, then.last, first.entry, then.exit, actions, then.given, kept, inverted, constants)


def _with_operands(tape: Tape, span: Span, before: int) -> Span:
    """Return a span that begins further up, after operator `before`, if inverses read values from there."""
    missing: set[int] = set()
    for action in span.actions:
        if isinstance(action, Inverse):
            missing.update(action.tail)
    for op in tape.ops[span.first : span.last + 1]:
        missing.difference_update(op.reads, op.outs)
    first = span.first
    while missing and first > before + 1:
        first -= 1
        missing.difference_update(tape.ops[first].reads, tape.ops[first].outs)
    return span if missing else replace(span, first=first)


def _span(found: Couplings, step: Step, side: tuple[int, ...]) -> Span:
    lowered, of = found.lowered, found.of

    def value(v: int) -> int:
        return of.value_of[lowered.value_nodes[v]]

    ops = [of.op_of[lowered.op_nodes[i]] for i in range(step.start, step.stop)]
    actions: list[Run | Inverse] = []
    inverted = set(ops)
    at: set[int] = set()
    for d in step.derive:
        number = of.op_of[lowered.op_nodes[d.op]]
        if isinstance(d, Forward):
            actions.append(Run(number))
            inverted.discard(number)
        else:
            facts = tuple((value(v), fact) for v, fact in d.arc.assumes)
            actions.append(Inverse(d.arc, value(d.arc.head), tuple(value(v) for v in d.arc.tail), facts))
            at.add(number)
    exit = tuple(value(v) for v in step.exit)
    at |= inverted
    constants = _constants(found, at, range(step.start, step.stop))
    given = frozenset(value(v) for v in step.exit if v not in step.again)
    kept = frozenset(value(v) for v in (*step.saved, *side))
    entry = tuple(value(v) for v in step.entry)
    return Span(min(ops), max(ops), entry, exit, tuple(actions), given, kept, frozenset(at), constants)


class UnitBuilder:
    """Makes the unit of a span.

    Args:
        tape: the tape of the whole forward.
        span: the operators.
        lossless: inverses that round get codes.
    """

    def __init__(self, tape: Tape, span: Span, lossless: bool = True) -> None:
        self.tape, self.span, self.lossless = tape, span, lossless
        self.slots: dict[int, int] = {}  # by value
        self.external: list[int] = []
        self.numbers: list[Any] = []  # those of this forward
        self.states = 0
        self.made: set[int] = set()  # values
        self.coded: list[Coded] = []
        self.facts: set[tuple[int, Fact]] = set()
        self.shapes: dict[int, tuple[int, ...]] = {}
        self.inverses: list[Arc] = []
        self.others: list[Replay] = []
        self.statistics: set[int] = set()  # running ones that a normalisation reads, and others write uncounted

    def run(self) -> Unit:
        """Return the unit.

        Raises:
            Unreplayable: it has none.
        """
        span, tape = self.span, self.tape
        ops = [self._op(tape.ops[i], i in span.inverted) for i in range(span.first, span.last + 1)]
        exit = self._known(span.exit)  # others go past the unit
        entry = tuple(s for s in self._known(span.entry) if s in self.external)  # others are views, made once more
        kept = frozenset(self._known(v for v in span.entry if v in span.kept))
        held = frozenset(self._known(v for v in self.made if v in span.kept or self._must_be_held(v)))
        external, memory = frozenset(self.external), self._memory()
        given = (external - ({*entry} - kept)) | held
        forward, backward = self._replays(ops, memory, {*given, *entry}, {*given, *self._known(span.given)})
        replays = [*forward, *backward, *self.others]
        same = first_slots(ops, memory)
        read_again = same.keys() - external
        read = {s for c in self.coded for s in (c.head, *c.tail)}
        if not same.keys().isdisjoint((*read, *exit)):
            raise Unreplayable(f"{tape.ops[span.last].where}: a tensor was written to by another view of its memory")
        return Unit(
            ops=tuple(ops),
            slots=len(self.slots),
            numbers=len(self.numbers),
            external=external,
            entry=entry,
            kept=kept,
            exit=exit,
            held=held & _inputs_of(replays, "slot"),
            cloned=frozenset(s for v, s in self.slots.items() if s in external | held and self._may_change(v)),
            coded=tuple(self.coded),
            rounds=any(map(rounds, self.inverses)),
            layouts=_inputs_of(replays, "layout"),
            workspaces=frozenset(s for v, s in self.slots.items() if is_workspace(tape, v)),
            same=same,
            renamed=tuple(sorted((memory.writer[s], same[s], s) for s in read_again)),
            shapes=self.shapes,
            facts=tuple(sorted(self.facts, key=repr)),
            forward=forward[0],
            backward=next(iter(backward), None),
            where=(tape.ops[span.first].where, tape.ops[span.last].where),
            **self._attributes(forward),
        )

    def _replays(
        self, ops: Sequence[UnitOp], memory: Memory, known: set[int], after: set[int]
    ) -> tuple[list[Replay], list[Replay]]:
        """Return the replay forwards, from `known` slots, and that backwards, from those `after`, if there is one."""
        runs, wanted = [Run(i) for i in range(len(ops))], self._droppable()
        forward, actions = Builder(ops, memory, known, runs, wanted).run(), self._actions()
        self.inverses = [a.arc for a in actions if isinstance(a, Inversion)]
        if not self.inverses:
            return [forward], []
        entry = self._known(self.span.entry)
        results = (*wanted, *(s for s in entry if s not in wanted))
        return [forward], [Builder(ops, memory, after, [*actions, *runs], results).run()]

    def _attributes(self, forward: Sequence[Replay]) -> dict[str, Any]:
        """Return further attributes of the unit."""
        return {}

    def _known(self, values: Iterable[int]) -> tuple[int, ...]:
        """Return the slots of those values that have one."""
        return tuple(self.slots[v] for v in values if v in self.slots)

    def _actions(self) -> list[Action]:
        """Return the steps of going backwards in the unit's terms; note the codes, facts and shapes that they need."""
        span = self.span
        self.facts.update((self.slots[v], fact) for v, fact in span.constants if v in self.slots)
        found: list[Action] = []
        for action in span.actions:
            if isinstance(action, Run):
                found.append(Run(action.op - span.first))
                continue
            if any(v not in self.slots for v in (action.head, *action.tail)):
                raise Unreplayable(f"{self.tape.ops[span.last].where}: an inverse reads a tensor from elsewhere")
            head, tail = self.slots[action.head], self._known(action.tail)
            code = -1
            if self._needs_code(action.arc):
                code = len(self.coded)
                self.coded.append(Coded(action.arc, head, tail))
            found.append(Inversion(action.arc, head, tail, code))
            self.facts.update((self.slots[v], fact) for v, fact in action.facts)
            self.shapes.update(self._fixed_shapes(action))
        return found

    # --- slots
    def _slot(self, value: int) -> int:
        slot = self.slots.get(value)
        if slot is None:
            slot = self.slots[value] = len(self.slots)
            if value not in self.made and not self._is_read_again(value):
                self.external.append(slot)
        return slot

    def _is_read_again(self, value: int) -> bool:
        """Return whether a value is a tensor that the unit made, after a write to its memory by another view."""
        known = self.tape.values[value]
        before = self.slots.get(-1 if known.before is None else known.before)
        if before is None or known.op is None or not self.span.first <= known.op <= self.span.last:
            return False
        return before not in self.external

    def _op(self, op: Op, is_inverted: bool) -> UnitOp:
        if op.func in STATISTICS and op.args[5] is False:
            self.statistics.update(int(op.args[i]) for i in STATISTICS[op.func] if type(op.args[i]) is Ref)
        args = tuple(self._argument(a, is_inverted) for a in op.args)
        kwargs = {k: self._argument(v, is_inverted) for k, v in op.kwargs.items()}
        outs: list[int] = []
        # outside memory that an operator writes to without a result, as `_foreach_mul_` does, is read from outside
        written = [after for _, after in op.written if after in op.outs or not self.tape.is_outside(after)]
        for v in (*op.outs, *written):
            if v is not None and v not in self.slots and not self._is_view_of_outside(v):
                self.made.add(v)
        for v in op.outs:
            outs.append(-1 if v is None or self._is_view_of_outside(v) else self._slot(v))
        for _, after in op.written:
            self._slot(after)
        state = -1
        if op.state is not None:
            state = self.states
            self.states += 1
        return UnitOp(op.func, args, kwargs, tuple(outs), op.is_single, is_view(op.func), state)

    def _is_view_of_outside(self, value: int) -> bool:
        known = self.tape.values[value]
        return self.tape.is_outside(value) and known.writes == 0

    def _argument(self, a: Any, is_inverted: bool) -> Any:
        """Return an argument in the unit's terms; the inverse of an operator stands for these very numbers."""
        if type(a) is Ref:
            return Slot(self._slot(int(a)))
        if isinstance(a, (list, tuple)) and any(type(x) is Ref for x in a):
            return type(a)([self._argument(x, is_inverted) for x in a])
        is_number = isinstance(a, (int, float, complex, list, tuple, torch.Generator, Part)) and not isinstance(a, bool)
        if is_number and not is_inverted:
            self.numbers.append(a)
            return Number(len(self.numbers) - 1)
        return a

    def _fixed_shapes(self, inverse: Inverse) -> dict[int, tuple[int, ...]]:
        """Return the shapes of an inverse's values, which it may stand for; none of one by elements."""
        shapes = {self.slots[v]: self.tape.values[v].view.shape for v in (inverse.head, *inverse.tail)}
        if not inverse.arc.exact and len(set(shapes.values())) == 1:
            return {}
        return shapes

    def _memory(self) -> Memory:
        tape, span = self.tape, self.span
        allocation = {s: tape.values[v].allocation for v, s in self.slots.items()}
        before: dict[int, int] = {}
        writer: dict[int, int] = {}
        writes: dict[int, list[tuple[int, int]]] = {}
        for v, s in self.slots.items():
            value = tape.values[v]
            if value.op is None or not span.first <= value.op <= span.last:
                continue
            if value.before in self.slots and s not in self.external:
                before[s], writer[s] = self.slots[value.before], value.op - span.first
        for i in range(span.first, span.last + 1):
            for was, after in tape.ops[i].written:
                if was in self.slots and after in self.slots:
                    writes.setdefault(i - span.first, []).append((self.slots[was], self.slots[after]))
        return Memory(
            allocation, before, writer, writes, overwritten(tape, self.slots, range(span.first, span.last + 1))
        )

    # --- results that can't be computed again
    def _must_be_held(self, value: int) -> bool:
        """Return whether nothing computes a value that an operator of the unit made."""
        at = self.tape.values[value].op
        assert at is not None
        op = self.tape.ops[at]
        if not is_repeatable(op.func) or self.tape.is_outside(value):
            return True
        if packet_name(op.func) in UNINITIALIZED:
            return not is_filled(self.tape, value)
        return False

    def _may_change(self, value: int) -> bool:
        """Return whether a tensor may be another one in the backward, and no version tells."""
        return self._is_written(value) or value in self.statistics

    def _is_written(self, value: int) -> bool:
        """Return whether the forward writes to the outside memory of a value, so that the next forward will, too."""
        allocation = self.tape.allocations[self.tape.values[value].allocation]
        return allocation.is_outside and allocation.writes > 0

    def _droppable(self) -> list[int]:
        """Return the slots of the saved tensors that a replay can give back."""
        span, saved = self.span, self.tape.saved  # in the order of the operators
        at = bisect_left(saved, (span.first,))
        found: dict[int, None] = {}
        while at < len(saved) and saved[at][0] <= span.last + 1:
            v = saved[at][1]
            if v in self.slots and (v in self.made or v in span.entry or self._is_read_again(v)):
                found[self.slots[v]] = None
            at += 1
        return list(found)

    def _needs_code(self, arc: Arc) -> bool:
        return rounds(arc) and (self.lossless or arc.measured or arc.coded or bool(arc.declared))


def _inputs_of(replays: Sequence[Replay], kind: str) -> frozenset[int]:
    """Return the indices of all inputs of a kind."""
    return frozenset(index for replay in replays for k, index in replay.inputs if k == kind)

"""From spans of a tape to units, which equal spans share."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from revfx.engine.operators import STATISTICS, is_repeatable, is_view
from revfx.engine.tape import Op, Ref, Tape
from revfx.engine.unit import Coded, Number, Replay, Slot, Unit, UnitOp
from revfx.parts import CompiledPart
from revfx.passes.composed import rounds
from revfx.passes.facts import Fact
from revfx.passes.program import Arc, DataFactor
from revfx.plan.memory import first_slots, is_unfilled, is_workspace, overwritten_slots
from revfx.plan.replays import Action, Inversion, Recompute, ReplayBuilder, SlotMemory, Unreplayable
from revfx.plan.spans import Span as Span, TapeInverse, find_spans as find_spans


NUMBERS = (int, float, complex, list, tuple, torch.Generator, CompiledPart)  # arguments that may differ between calls


class UnitBuilder:
    """Builds the unit of a span.

    Args:
        tape: the tape of the whole forward.
        span: the operators.
        lossless: inverses that round get codes.
    """

    def __init__(self, tape: Tape, span: Span, lossless: bool = True) -> None:
        self.tape: Tape = tape
        self.span: Span = span
        self.lossless: bool = lossless
        self.slots: dict[int, int] = {}  # by value
        self.external: list[int] = []  # slots
        self.numbers: list[Any] = []  # of this forward
        self.states: int = 0  # number of random states
        self.made: set[int] = set()  # values
        self.coded: list[Coded] = []
        self.facts: set[tuple[int, Fact]] = set()
        self.shapes: dict[int, tuple[int, ...]] = {}
        self.loan_replays: list[Replay] = []
        self.statistics: set[int] = set()  # running ones that a normalisation reads, and others write uncounted

    def run(self) -> Unit:
        """Return the unit.

        Raises:
            Unreplayable: it has none.
        """
        # Operators and tensors get numbers of the unit, so that equal units of other layers can share it.
        span, tape = self.span, self.tape
        ops = [self._op(tape.ops[i], i in span.inverted) for i in span.ops]
        for v in sorted({*span.exit, *span.kept}):
            if v not in self.slots and self._is_reread(v):  # by later units only
                self._slot(v)
        exit = self._slots_of(span.exit)  # other values of the exit pass by the unit
        external, memory = frozenset(self.external), self._memory()

        # A call holds the tensors that nothing gives back. Entries without an external slot are views, made once more.
        entry = tuple(s for s in self._slots_of(span.entry) if s in external)
        kept = frozenset(self._slots_of(span.kept.intersection(span.entry)))
        not_computed = filter(self._must_be_held, self.made - span.kept)
        held = frozenset(self._slots_of((*filter(self._is_own, span.kept), *not_computed)))
        given = (external - ({*entry} - kept)) | held

        forward, backward = self._replays(ops, memory, {*given, *entry}, {*given, *self._slots_of(span.given)})
        replays = [*forward, *backward, *self.loan_replays]

        # Codes and exits are bound to tensors by slot, which writes by other views change, but for the last.
        same = first_slots(ops, memory)
        renamed = sorted((memory.writer[s], same[s], s) for s in same.keys() - external)
        read = {*exit}.difference({first: slot for _, first, slot in renamed}.values())
        for coded in self.coded:
            read.update((coded.head, *coded.tail))
        if not read.isdisjoint(same):
            raise Unreplayable(f"{tape.ops[span.last].where}: a tensor was written to by another view of its memory")

        changing = self._slots_of(filter(self._may_change, self.slots))
        return Unit(
            ops=tuple(ops),
            slots=len(self.slots),
            numbers=len(self.numbers),
            external=external,
            entry=entry,
            kept=kept,
            exit=exit,
            held=held & _inputs_of(replays, "slot"),
            cloned=(external | held).intersection(changing),
            coded=tuple(self.coded),
            rounds=any(rounds(inverse.arc) for inverse in span.inverses),
            layouts=_inputs_of(replays, "layout"),
            workspaces=frozenset(s for v, s in self.slots.items() if is_workspace(tape, v)),
            same=same,
            renamed=tuple(renamed),
            shapes=self.shapes,
            facts=tuple(sorted(self.facts, key=repr)),
            forward=forward[0],
            backward=next(iter(backward), None),
            where=(tape.ops[span.first].where, tape.ops[span.last].where),
            **self._attributes(forward),
        )

    def _replays(
        self, ops: Sequence[UnitOp], memory: SlotMemory, known: set[int], after: set[int]
    ) -> tuple[list[Replay], list[Replay]]:
        """Return the replays forwards, and that backwards, if something is inverted.

        Args:
            ops: the operators of the unit.
            memory: where its slots lie.
            known: slots that are there before the replay forwards.
            after: slots that are there before the replay backwards.
        """
        runs, wanted = list(map(Recompute, range(len(ops)))), self._droppable()
        forward, actions = ReplayBuilder(ops, memory, known, runs, wanted).run(), self._actions()
        if not self.span.inverses:
            return [forward], []
        results = tuple(dict.fromkeys((*wanted, *self._slots_of(self.span.entry))))
        return [forward], [ReplayBuilder(ops, memory, after, [*actions, *runs], results).run()]

    def _attributes(self, forward: Sequence[Replay]) -> dict[str, Any]:
        """Return further attributes of the unit."""
        return {}

    def _slots_of(self, values: Iterable[int]) -> tuple[int, ...]:
        """Return the slots of those values that have one."""
        return tuple(self.slots[v] for v in values if v in self.slots)

    def _actions(self) -> list[Action]:
        """Return the actions of the span in slots; note the codes, facts and shapes that they need."""
        self.facts.update((self.slots[v], fact) for v, fact in self.span.constants if v in self.slots)
        found: list[Action] = []
        for action in self.span.actions:
            if isinstance(action, Recompute):
                found.append(Recompute(action.op - self.span.first))
                continue
            if not self.slots.keys() >= {action.head, *action.tail}:
                raise Unreplayable(f"{self.tape.ops[self.span.last].where}: an inverse reads a tensor from elsewhere")
            head, tail = self.slots[action.head], self._slots_of(action.tail)
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
        """Return the slot of a value; a new one is external, unless the unit makes the value."""
        slot = self.slots.get(value)
        if slot is None:
            slot = self.slots[value] = len(self.slots)
            if value not in self.made and not self._is_reread(value):
                self.external.append(slot)
        return slot

    def _is_own(self, value: int) -> bool:
        """Return whether a value is one that the unit makes, or that its writes leave."""
        return value in self.made or (value in self.slots and self._is_reread(value))

    def _is_reread(self, value: int) -> bool:
        """Return whether a value is a tensor that the unit made, after a write to its memory by another view."""
        known = self.tape.values[value]
        before = None if known.before is None else self.slots.get(known.before)
        if before is None or known.op is None:
            return False
        return known.op in self.span.ops and before not in self.external

    def _op(self, op: Op, is_inverted: bool) -> UnitOp:
        """Return an operator in slots and numbers."""
        if op.func in STATISTICS and op.args[5] is False:
            self.statistics.update(int(op.args[i]) for i in STATISTICS[op.func] if type(op.args[i]) is Ref)
        args = tuple(self._argument(a, is_inverted) for a in op.args)
        kwargs = {k: self._argument(v, is_inverted) for k, v in op.kwargs.items()}
        results = [*op.outs]
        for _, after in op.written:
            # Outside memory that is written to without a result, as by `_foreach_mul_`, is read from outside.
            if after in op.outs or not self.tape.is_outside(after):
                results.append(after)
        for v in results:
            if v is not None and v not in self.slots and not self._is_view_of_outside(v):
                self.made.add(v)
        outs: list[int] = []
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
        return self.tape.is_outside(value) and self.tape.values[value].writes == 0

    def _argument(self, a: Any, is_inverted: bool) -> Any:
        """Return an argument in slots and numbers; the inverse of an operator stands for these very numbers."""
        if type(a) is Ref:
            return Slot(self._slot(int(a)))
        if isinstance(a, (list, tuple)) and Ref in map(type, a):
            return type(a)([self._argument(x, is_inverted) for x in a])
        if isinstance(a, NUMBERS) and not isinstance(a, bool) and not is_inverted:
            self.numbers.append(a)
            return Number(len(self.numbers) - 1)
        return a

    def _fixed_shapes(self, inverse: TapeInverse) -> dict[int, tuple[int, ...]]:
        """Return the shapes that an inverse was derived for, by slot; elementwise inverses fit all shapes."""
        shapes = {self.slots[v]: self.tape.values[v].view.shape for v in (inverse.head, *inverse.tail)}
        is_elementwise = not inverse.arc.exact and len(set(shapes.values())) == 1
        return {} if is_elementwise else shapes

    def _memory(self) -> SlotMemory:
        """Return where the slots lie, and which operators write to them."""
        tape, span = self.tape, self.span
        allocation: dict[int, int] = {}
        before: dict[int, int] = {}
        writer: dict[int, int] = {}
        for v, slot in self.slots.items():
            value = tape.values[v]
            allocation[slot] = value.allocation
            if value.op is None or value.op not in span.ops:
                continue
            if value.before in self.slots and slot not in self.external:
                before[slot], writer[slot] = self.slots[value.before], value.op - span.first
        writes: dict[int, list[tuple[int, int]]] = {}
        for i in span.ops:
            for pair in tape.ops[i].written:
                if self.slots.keys() >= {*pair}:
                    was, after = pair
                    writes.setdefault(i - span.first, []).append((self.slots[was], self.slots[after]))
        return SlotMemory(allocation, before, writer, writes, overwritten_slots(tape, self.slots, span.ops))

    # --- tensors that a replay can't give back, or that need a copy
    def _must_be_held(self, value: int) -> bool:
        """Return whether no replay can compute a value that an operator of the unit made."""
        at = self.tape.values[value].op
        assert at is not None
        op = self.tape.ops[at]
        if not is_repeatable(op.func) or self.tape.is_outside(value):
            return True
        return is_unfilled(self.tape, value)

    def _may_change(self, value: int) -> bool:
        """Return whether a tensor may have other content in the backward, with the same version.

        The next forward writes to the outside memory that this one wrote to; running statistics are written uncounted.
        """
        allocation = self.tape.allocations[self.tape.values[value].allocation]
        return (allocation.is_outside and allocation.writes > 0) or value in self.statistics

    def _droppable(self) -> list[int]:
        """Return the slots of the saved tensors that a replay can give back."""
        span, saved = self.span, self.tape.saved  # in the order of the operators
        start, stop = bisect_left(saved, (span.first,)), bisect_left(saved, (span.last + 2,))
        found: list[int] = []
        for _, v in saved[start:stop]:
            if v in self.slots and (v in span.entry or self._is_own(v)):
                found.append(self.slots[v])
        return list(dict.fromkeys(found))

    def _needs_code(self, arc: Arc) -> bool:
        return rounds(arc) and (self.lossless or isinstance(arc.factor, DataFactor) or arc.coded or bool(arc.declared))


def _inputs_of(replays: Sequence[Replay], kind: str) -> frozenset[int]:
    """Return the indices of the inputs of a kind."""
    found: set[int] = set()
    for replay in replays:
        found.update(index for k, index in replay.inputs if k == kind)
    return frozenset(found)

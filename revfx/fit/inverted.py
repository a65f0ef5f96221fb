"""Couplings as a way to meet a budget: a recorded step becomes the same step with couplings inverted.

The units are those of `convert` without a budget, from the first coupling of the forward on. Each drops its saved
tensors when it ends, and stores codes. The planner decides about all other tensors.
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from revfx.codes.codec import TYPICAL_ESCAPES, TYPICAL_WIDTH
from revfx.codes.format import nbytes_of
from revfx.engine.tape import Tape as Forward
from revfx.engine.unit import Coded, Unit
from revfx.fit.costs import code_seconds
from revfx.fit.grouping import Grouping, RecordedStep
from revfx.fit.needs import Needs
from revfx.fit.plan import Plan
from revfx.fit.planner import Planner
from revfx.fit.simulate import OVERHEAD
from revfx.fit.tape import Tape
from revfx.plan.couplings import find_couplings
from revfx.plan.replays import Unreplayable
from revfx.plan.staged import Dropped
from revfx.plan.units import UnitBuilder, find_spans


MIN_SEARCHED, SEARCHED = 30_000, 20  # operations that a search looks at without success: at least, and for each one
SHARES = (1.0, 0.75, 0.5, 0.25)  # of the couplings, from the first one on
OTHER_CODES = 2  # times the bytes of the code of a sum: the code of another inverse


@dataclass(frozen=True)
class CoupledUnit:
    """A unit of a coupling in a forward.

    Attributes:
        unit: it.
        first, last: its operators.
        chain: the number of the chain that it belongs to.
        entry, exit: values before and after it.
        droppable: values of saved tensors that its replay gives.
        held: values that are held for its replay.
        heads: values that inverses with codes give, each with the bytes of its code as a rule.
        runs_again: the operators that its replay runs when it goes backwards.
    """

    unit: Unit
    first: int
    last: int
    chain: int
    entry: frozenset[int]
    exit: frozenset[int]
    droppable: frozenset[int]
    held: frozenset[int]
    heads: Mapping[int, int]
    runs_again: frozenset[int]


def coupled_units(forward: Forward) -> list[CoupledUnit]:
    """Return the units of the couplings of a forward, in its order."""
    found: list[CoupledUnit] = []
    for span in find_spans(find_couplings(forward, max_searched=max(MIN_SEARCHED, SEARCHED * len(forward.ops)))):
        builder = UnitBuilder(forward, span)
        try:
            unit = builder.run()
        except Unreplayable:
            continue
        value_of = {slot: v for v, slot in builder.slots.items()}
        heads: dict[int, int] = {}
        for coded in unit.coded:
            heads[value_of[coded.head]] = _code_bytes(forward, value_of[coded.head], coded)
        made = CoupledUnit(
            unit=unit,
            first=span.first,
            last=span.last,
            chain=span.region,
            entry=frozenset(map(value_of.__getitem__, unit.entry)),
            exit=frozenset(map(value_of.__getitem__, unit.exit)),
            droppable=frozenset(map(value_of.__getitem__, unit.droppable)),
            held=frozenset(map(value_of.__getitem__, unit.held | unit.given)),
            heads=heads,
            runs_again=frozenset(range(span.first, span.last + 1)) - span.inverted,
        )
        found.append(made)
    return found


@dataclass(frozen=True)
class Inverted:
    """The inverted units of a step, and the numbers of the saved tensors that they give back."""

    units: Sequence[CoupledUnit] = ()
    saved: frozenset[int] = frozenset()

    def overlap(self, dropped: Dropped) -> bool:
        """Return whether couplings lie between operators that are recomputed together."""
        return any(unit.first <= dropped.last and dropped.first <= unit.last for unit in self.units)


class InvertedStep(NamedTuple):
    """A step in which couplings are inverted, with its planner."""

    inverted: Inverted
    planner: Planner
    recorded: RecordedStep

    def can_follow(self, plan: Plan) -> bool:
        """Return whether the engine can carry out a plan for the other saved tensors beside the couplings."""
        return not any(map(self.inverted.overlap, Grouping(plan, self.recorded).run()))


def _code_bytes(forward: Forward, head: int, coded: Coded) -> int:
    view = forward.values[head].view
    n, size = math.prod(view.shape) * (1 + view.dtype.is_complex), view.dtype.itemsize // (1 + view.dtype.is_complex)
    code = nbytes_of(n, size, TYPICAL_WIDTH, int(TYPICAL_ESCAPES * n))
    if coded.arc.solve not in (operator.sub, operator.add):
        code *= OTHER_CODES
    return min(code, n * size)  # where that is larger, the value itself is held


class InvertedSteps:
    """A step in which couplings are inverted, more of them or fewer.

    Args:
        planner: of the step without.
        recorded: the step.
    """

    def __init__(self, planner: Planner, recorded: RecordedStep) -> None:
        self._planner, self._recorded = planner, recorded
        self._steps: dict[int, InvertedStep] = {}  # by how many units are inverted

    @cached_property
    def units(self) -> list[CoupledUnit]:
        """The units of all couplings."""
        return coupled_units(self._recorded.tape)

    def __iter__(self) -> Iterator[InvertedStep]:
        """Yield the step with all of them inverted first, then with fewer."""
        yield from map(self._step_of, self._counts())

    def __reversed__(self) -> Iterator[InvertedStep]:
        """Yield the step with few of them inverted first, then with more."""
        yield from map(self._step_of, reversed(self._counts()))

    def _counts(self) -> list[int]:
        counts = [round(share * len(self.units)) for share in SHARES]
        return [count for count in dict.fromkeys(counts) if count > 1]  # the first one of a chain goes forwards

    def _step_of(self, count: int) -> InvertedStep:
        if count not in self._steps:
            self._steps[count] = self._step(count)
        return self._steps[count]

    def _step(self, count: int) -> InvertedStep:
        before, units = self._planner, self.units[:count]
        maker = _TapeMaker(before, self._recorded, units)
        tape, saved = maker.run()
        barred = before.needs.barred.union(*map(maker.operators, units))
        planner = Planner(Needs(tape, barred), before.costs, any_caller=True)
        return InvertedStep(Inverted(units, saved), planner, self._recorded)


class _TapeMaker:
    """Makes the tape of a step in which units are inverted."""

    def __init__(self, planner: Planner, recorded: RecordedStep, units: Sequence[CoupledUnit]) -> None:
        tape = planner.needs.tape
        self.costs, self.forward, self.recorded, self.units = planner.costs, recorded.tape, recorded, units
        allocations = [replace(m) for m in tape.allocations]
        self.tape = replace(tape, allocations=allocations, saved=[*tape.saved], held=[*tape.held])
        self.firsts = [unit.first for unit in units]
        self.linked = {n for n in range(len(units) - 1) if self._is_linked(n)}  # their exit follows from the next entry
        self.saved: list[list[int]] = [[] for _ in units]  # that the replay of each gives
        self.of_exit: list[list[int]] = [[] for _ in units]
        self.replayed = [2 * len(tape.ops) + 1] * len(units)  # the slot in which its replay runs

    def _is_linked(self, number: int) -> bool:
        unit, following = self.units[number], self.units[number + 1]
        is_one_chain = unit.chain == following.chain and following.unit.backward is not None
        return is_one_chain and not unit.exit.isdisjoint(following.entry)

    def _inverts(self, number: int) -> bool:
        return number - 1 in self.linked

    def operators(self, unit: CoupledUnit) -> range:
        """Return the operators of the step that a unit consists of."""
        numbers = self.recorded.numbers
        return range(bisect_left(numbers, unit.first), bisect_right(numbers, unit.last))

    def run(self) -> tuple[Tape, frozenset[int]]:
        """Return the tape, and the saved tensors that are off it."""
        self._drop_packs()
        for number in self.linked:
            for k in self.of_exit[number]:
                self._is_read(number + 1, k)
        for number in range(len(self.units)):
            if number in self.linked:  # its replay has the next one run before
                self.replayed[number + 1] = min(self.replayed[number + 1], self.replayed[number])
        for number in range(len(self.units)):
            self._hold_forward(number)
            self._hold_backward(number)
            self.tape.seconds += self._seconds(number)
        return self.tape, frozenset(k for saved in (*self.saved, *self.of_exit) for k in saved)

    # --- saved tensors
    def _drop_packs(self) -> None:
        """Take the results of the units off the saved tensors."""
        exits: dict[int, int] = {}
        for number, unit in enumerate(self.units):
            exits.update(dict.fromkeys(unit.exit, number))
        saved = self.tape.saved
        for k, (at, value) in enumerate(self.forward.saved):
            number, maker = self._owner(at, value), exits.get(value)
            if number is not None:
                self.saved[number].append(k)
                self._is_read(number, k)
            elif maker is not None and at > self.units[maker].last:
                self.of_exit[maker].append(k)
            else:
                continue
            saved[k] = replace(saved[k], view=None)

    def _owner(self, at: int, value: int) -> int | None:
        """Return the unit that gives a value which was saved before an operator."""
        number = bisect_right(self.firsts, at) - 1
        for n in (number, number - 1):
            if n >= 0 and at <= self.units[n].last + 1 and value in self.units[n].droppable:
                return n
        return None

    def _is_read(self, number: int, saved_index: int) -> None:
        read_at = self.tape.saved[saved_index].read_at
        if read_at is not None:
            self.replayed[number] = min(self.replayed[number], 2 * read_at)

    def _end(self, saved: Sequence[int], least: int) -> int:
        """Return the slot in which autograd has freed some saved tensors; at least `least`."""
        end = 2 * len(self.tape.ops) + 2
        ends = [self.tape.saved[k].end for k in saved]
        return max([least, *(end if e is None else e for e in ends)])

    # --- bytes
    def _hold_forward(self, number: int) -> None:
        """Hold the saved tensors of a unit until it ends, and the inputs and codes of its replay until that has run."""
        unit, tape = self.units[number], self.tape
        ended = 2 * self.operators(unit).stop + 1
        over = self._end((*self.saved[number], *self.of_exit[number]), self.replayed[number] + 1)
        for k in self.saved[number]:
            self._extend(self.forward.saved[k][1], ended)
        for v in unit.held if self._inverts(number) else unit.held | unit.entry:
            self._extend(v, over)
        for v in () if number in self.linked else unit.exit:
            self._extend(v, over)
        for head in unit.heads if self._inverts(number) else ():
            tape.held.append((unit.heads[head], ended - 1, over))
        tape.held.append((self._working_bytes(unit, ()), ended - 1, ended))  # as it is proven in a first step

    def _hold_backward(self, number: int) -> None:
        """Hold the results of a replay until autograd frees them, and entries until the unit before is replayed."""
        unit, start = self.units[number], self.replayed[number]
        stops: dict[int, tuple[int, int]] = {}  # by allocation: bytes, and until when
        given = [(self.forward.saved[k][1], self._end([k], start + 1)) for k in self.saved[number]]
        if number - 1 in self.linked:
            given += [(self.forward.saved[k][1], self._end([k], start + 1)) for k in self.of_exit[number - 1]]
            if self._inverts(number - 1):
                given += [(v, self.replayed[number - 1] + 1) for v in unit.entry]
        for v, stop in given:
            allocation = self.forward.values[v].allocation
            stops[allocation] = self._bytes(v), max(stop, stops.get(allocation, (0, 0))[1])
        for size, stop in stops.values():
            self.tape.held.append((size, start, stop))
        self.tape.held.append((self._working_bytes(unit, stops.keys()), start, start + 1))

    def _working_bytes(self, unit: CoupledUnit, given: Collection[int]) -> int:
        """Return the peak of a replay in bytes, without its results."""
        ops, values = self.forward.ops, self.forward.values
        last: dict[int, int] = {}
        for n in sorted(unit.runs_again):
            last.update(dict.fromkeys((values[v].allocation for v in ops[n].reads), n))
        live: dict[int, int] = {}
        most = 0
        for n in sorted(unit.runs_again):
            for v in ops[n].outs:
                if v is not None and values[v].op == n and values[v].allocation not in given:
                    live[values[v].allocation] = self.forward.nbytes(v)
            most = max(most, sum(live.values()) + self._scratch(n))
            for allocation in [a for a in live if last.get(a, -1) <= n]:
                del live[allocation]
        return most + max(map(self._bytes, unit.heads), default=0)

    def _scratch(self, number: int) -> int:
        at = bisect_left(self.recorded.numbers, number)
        is_known = at < len(self.recorded.numbers) and self.recorded.numbers[at] == number
        return self.costs[at].scratch if is_known else 0

    def _extend(self, value: int, stop: int) -> None:
        """Extend the life of a value's allocation to a slot."""
        known = self.recorded.value_of.get(value)
        if known is not None:
            allocation = self.tape.allocation(known)
            if allocation.end is not None:
                allocation.end = max(allocation.end, stop)

    def _bytes(self, value: int) -> int:
        return self._elements(value) * self.forward.values[value].view.dtype.itemsize

    def _elements(self, value: int) -> int:
        return math.prod(self.forward.values[value].view.shape)

    # --- time
    def _seconds(self, number: int) -> float:
        unit, numbers = self.units[number], self.recorded.numbers
        found = 0.0
        for at in self.operators(unit):
            if not self._inverts(number) or numbers[at] in unit.runs_again:
                found += self.costs[at].seconds + OVERHEAD
        for head in unit.heads if self._inverts(number) else ():
            known = self.forward.values[head]
            found += code_seconds(known.device, known.view.dtype) * self._elements(head) + OVERHEAD
        return found

"""Units of plans that only replay forwards: dropped values, in the order in which the backward asks for them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from revfx.engine.tape import Tape
from revfx.engine.unit import Replay, UnitOp
from revfx.plan.replays import Builder, Memory, Run, Unreplayable
from revfx.plan.units import Span, UnitBuilder


@dataclass(frozen=True)
class Dropped:
    """The values that a plan drops among the operators first..last of a tape.

    Attributes:
        stages: the values of saved tensors that are replayed, in groups, in the order in which the backward asks.
        compressed: values of saved tensors of which the backward reads one bit per element: whether it is positive.
        kept: values that are there in the backward.
        dropout_masks: by value of drawn zeros and ones, a later value of the same allocation with the same zeros.
        borrowed: values that it takes from earlier units.
        lent: values that later units take, or that are saved later.
    """

    first: int
    last: int
    stages: tuple[tuple[int, ...], ...]
    compressed: frozenset[int]
    kept: frozenset[int]
    dropout_masks: Mapping[int, int]
    borrowed: tuple[int, ...] = ()
    lent: tuple[int, ...] = ()

    @property
    def replayed(self) -> set[int]:
        """The values that a replay gives."""
        return {*self.lent, *(v for stage in self.stages for v in stage)}


class StagedBuilder(UnitBuilder):
    """Makes the unit of dropped values."""

    def __init__(self, tape: Tape, dropped: Dropped) -> None:
        self.dropped = dropped
        values = dropped.replayed | dropped.compressed
        values.update(dropped.dropout_masks.values())
        exit = [v for v in sorted(values) if _is_saved_after(tape, v, dropped.last)]
        exit = tuple(dict.fromkeys((*exit, *dropped.lent)))
        span = Span(dropped.first, dropped.last, dropped.borrowed, exit, (), frozenset(), dropped.kept, frozenset())
        super().__init__(tape, span)
        self.dropout_masks: list[int] = []

    def _replays(
        self, ops: Sequence[UnitOp], memory: Memory, known: set[int], after: set[int]
    ) -> tuple[list[Replay], list[Replay]]:
        runs = [Run(i) for i in range(len(ops))]
        self.dropout_masks = [self.slots[v] for v in self.dropped.dropout_masks]
        known |= {*self.dropout_masks}
        lent = self._known(self.dropped.lent)
        if lent:
            self.others = [Builder(ops, memory, known, runs, lent, self.dropout_masks).run()]
        try:
            return self._stages(ops, memory, known, runs), []
        except Unreplayable:  # a stage writes to memory of which an earlier one left a part
            wanted = [s for stage in self.dropped.stages for s in self._known(stage) if s not in known]
            return [Builder(ops, memory, known, runs, [*dict.fromkeys(wanted)], self.dropout_masks).run()], []

    def _stages(self, ops: Sequence[UnitOp], memory: Memory, known: set[int], runs: Sequence[Run]) -> list[Replay]:
        overwritten = memory.overwritten
        outlines: list[tuple[set[int], set[int], set[int]]] = []  # slots before, made and read
        there, asked = {*known}, set[int]()
        for stage in self.dropped.stages:
            wanted = self._known(stage)
            asked.update(wanted)
            missing = [s for s in dict.fromkeys(wanted) if s not in there]
            if missing:
                made, read = Builder(ops, memory, there, runs, missing, self.dropout_masks).outline()
                outlines.append(({*there}, made - overwritten, read))
                there |= made - overwritten
        stages: list[Replay] = []
        for number, (before, made, read_now) in enumerate(outlines):
            outputs = asked & made
            for *_, read in outlines[number + 1 :]:
                outputs |= read & made
            given = known | (before & read_now)
            stages.append(Builder(ops, memory, given, runs, sorted(outputs), self.dropout_masks).run())
        return stages or [Builder(ops, memory, known, runs, []).run()]

    def _attributes(self, forward: Sequence[Replay]) -> dict[str, Any]:
        wanted = {s for stage in self.dropped.stages for s in self._known(stage)}
        results = {s for replay in forward for s in replay.outputs}
        return {
            "later": tuple(forward[1:]),
            "passed_on": frozenset(results - wanted),
            "loan": next(iter(self.others), None),
            "dropout_masks": {self.slots[v]: self.slots[later] for v, later in self.dropped.dropout_masks.items()},
            "compressed": frozenset(self._known(self.dropped.compressed)),
            "gives_exit": True,
        }


def _is_saved_after(tape: Tape, value: int, last: int) -> bool:
    """Return whether a value is saved when operator `last` has run, or later."""
    at = bisect_left(tape.saved, (last + 1,))
    return any(v == value for _, v in tape.saved[at:])

"""Units without inverses: they recompute dropped values in stages, in the order of the backward's requests."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from revfx.engine.tape import Tape
from revfx.engine.unit import Replay, UnitOp
from revfx.plan.replays import Recompute, ReplayBuilder, SlotMemory, Unreplayable
from revfx.plan.spans import Span
from revfx.plan.units import UnitBuilder


@dataclass(frozen=True)
class Dropped:
    """The values that a plan drops among the operators first..last of a tape.

    Attributes:
        stages: the values of saved tensors that are replayed, in groups, in the order in which the backward asks.
        compressed: values of saved tensors that are compressed to one bit an element, whether it is positive.
        kept: values that are held until the backward.
        dropout_masks: by value of a dropout mask, a later value in the same allocation, from which it is recovered.
        borrowed: values that the replay takes from earlier units.
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
        return set(self.lent).union(*self.stages)


class StagedBuilder(UnitBuilder):
    """Builds the unit that recomputes dropped values."""

    def __init__(self, tape: Tape, dropped: Dropped) -> None:
        self.dropped = dropped
        values = dropped.replayed.union(dropped.compressed, dropped.dropout_masks.values())
        exit = [v for v in sorted(values) if _is_saved_after(tape, v, dropped.last)]
        exit = tuple(dict.fromkeys((*exit, *dropped.lent)))
        span = Span(dropped.first, dropped.last, dropped.borrowed, exit, (), frozenset(), dropped.kept, frozenset())
        super().__init__(tape, span)
        self.dropout_masks: list[int] = []  # slots of dropout masks

    def _replays(
        self, ops: Sequence[UnitOp], memory: SlotMemory, known: set[int], after: set[int]
    ) -> tuple[list[Replay], list[Replay]]:
        """Return the forward replays, one for each stage, and the backward ones, of which there are none."""
        runs = list(map(Recompute, range(len(ops))))
        self.dropout_masks = [self.slots[v] for v in self.dropped.dropout_masks]
        known.update(self.dropout_masks)
        lent = self._slots_of(self.dropped.lent)
        if lent:
            self.loan_replays[:] = [ReplayBuilder(ops, memory, known, runs, lent, self.dropout_masks).run()]
        try:
            return self._stages(ops, memory, known, runs), []
        except Unreplayable:  # a stage overwrites memory that an earlier stage wrote in part: one replay for all
            wanted = [s for s in self._staged_slots() if s not in known]
            return [ReplayBuilder(ops, memory, known, runs, wanted, self.dropout_masks).run()], []

    def _staged_slots(self) -> list[int]:
        """Return the slots of all stages, in order."""
        found: dict[int, None] = {}
        for stage in self.dropped.stages:
            found.update(dict.fromkeys(self._slots_of(stage)))
        return list(found)

    def _stages(
        self, ops: Sequence[UnitOp], memory: SlotMemory, known: set[int], runs: Sequence[Recompute]
    ) -> list[Replay]:
        """Return a replay for each stage; it starts from the results of earlier ones that nothing overwrites."""
        # The slots that each stage finds, makes and reads.
        outlines: list[tuple[set[int], set[int], set[int]]] = []
        available, asked = {*known}, set[int]()
        for stage in self.dropped.stages:
            wanted = self._slots_of(stage)
            asked.update(wanted)
            missing = [s for s in dict.fromkeys(wanted) if s not in available]
            if missing:
                made, read = ReplayBuilder(ops, memory, available, runs, missing, self.dropout_masks).outline()
                made -= memory.overwritten
                outlines.append(({*available}, made, read))
                available |= made

        # A stage returns the saved tensors that it makes, and the operands of later stages.
        stages: list[Replay] = []
        for number, (before, made, read) in enumerate(outlines):
            outputs = asked & made
            for *_, read_later in outlines[number + 1 :]:
                outputs |= read_later & made
            given = known | (before & read)
            stages.append(ReplayBuilder(ops, memory, given, runs, sorted(outputs), self.dropout_masks).run())
        return stages or [ReplayBuilder(ops, memory, known, runs, []).run()]

    def _attributes(self, forward: Sequence[Replay]) -> dict[str, Any]:
        results: set[int] = set()
        for replay in forward:
            results.update(replay.outputs)
        return {
            "later": tuple(forward[1:]),
            "passed_on": frozenset(results.difference(self._staged_slots())),
            "loan": next(iter(self.loan_replays), None),
            "dropout_masks": {
                self.slots[mask]: self.slots[source] for mask, source in self.dropped.dropout_masks.items()
            },
            "compressed": frozenset(self._slots_of(self.dropped.compressed)),
            "is_staged": True,
        }


def _is_saved_after(tape: Tape, value: int, last: int) -> bool:
    """Return whether a value is saved when operator `last` has run, or later."""
    start = bisect_left(tape.saved, (last + 1,))
    return value in (v for _, v in tape.saved[start:])

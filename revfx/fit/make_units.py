"""The units that the engine follows a plan with."""

from __future__ import annotations

import re
import sys
from bisect import bisect_right
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from revfx.engine.tape import Tape
from revfx.engine.unit import Unit
from revfx.fit.grouping import Grouping, RecordedStep, whole_blocks
from revfx.fit.survey import Chosen
from revfx.plan.replays import Unreplayable
from revfx.plan.staged import Dropped, StagedBuilder


@dataclass(frozen=True)
class PlacedUnit:
    """A unit of a plan.

    Attributes:
        first, last: its operators, of the forward's.
        unit: it.
        chain: the number of the chain that it belongs to.
        is_proven: no step needs to prove it, as alike operators were proven in the step that was recorded, or a budget
            has no room for that. All that it gives is compared in the first backward.
    """

    first: int
    last: int
    unit: Unit
    chain: int
    is_proven: bool = False


def units_of(
    chosen: Chosen, recorded: RecordedStep, reasons: dict[str, None], budget: int = sys.maxsize
) -> list[PlacedUnit]:
    """Return the units of a plan, in the order of their operators; why some can't be replayed is added to `reasons`."""
    found: list[PlacedUnit] = []
    for coupled in chosen.inverted.units:
        found.append(PlacedUnit(coupled.first, coupled.last, coupled.unit, coupled.chain))
    chains = 1 + max((coupled.chain for coupled in found), default=-1)
    alike = {_code_of(recorded.tape, v) for v in recorded.proven}
    for dropped in Grouping(chosen.plan, recorded).run():
        if chosen.inverted.overlap(dropped):
            where = recorded.tape.ops[dropped.first].where
            reasons[f"{where}: couplings lie between operators that are to be recomputed"] = None
            continue
        try:
            unit = StagedBuilder(recorded.tape, dropped).run()
        except Unreplayable as e:
            reasons[str(e)] = None
            continue
        is_alike = all(_code_of(recorded.tape, v) in alike for v in dropped.replayed)
        is_proven = is_alike or _bytes_of_proof(chosen, recorded, dropped) > budget
        found.append(PlacedUnit(dropped.first, dropped.last, unit, chains + len(found), is_proven))
    return sorted(found, key=lambda placed: placed.first)


def _bytes_of_proof(chosen: Chosen, recorded: RecordedStep, dropped: Dropped) -> int:
    """Return the live bytes when a unit has ended and its results are recomputed beside it, as a proof."""
    after = bisect_right(recorded.numbers, dropped.last)
    sizes: dict[int, int] = {}
    for v in dropped.replayed:
        sizes[recorded.tape.values[v].allocation] = recorded.tape.nbytes(v)
    return chosen.load.live[2 * after] + sum(sizes.values())


def _code_of(tape: Tape, value: int) -> tuple[Any, ...]:
    """Return a key that a value shares with the same one in other layers."""
    at = tape.values[value].op
    assert at is not None
    op = tape.ops[at]
    return op.func, op.outs.index(value) if value in op.outs else -1, op.where, re.sub(r"\d+", "*", op.module)


def fallback_units(recorded: RecordedStep) -> list[Unit]:
    """Return the units for forwards that go another way: whole blocks."""
    found: list[Unit] = []
    for dropped in whole_blocks(recorded):
        with suppress(Unreplayable):
            unit = StagedBuilder(recorded.tape, dropped).run()
            if unit.droppable:
                found.append(unit)
    return found

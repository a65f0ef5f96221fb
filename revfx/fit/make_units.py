"""The units that the engine follows a plan with."""

from __future__ import annotations

import re
import sys
from bisect import bisect_right
from contextlib import suppress
from typing import Any

from revfx.engine.tape import Tape
from revfx.engine.unit import Unit
from revfx.fit.survey import Chosen
from revfx.fit.units import Grouping, Learnt, whole_blocks
from revfx.plan.replays import Unreplayable
from revfx.plan.staged import Dropped, StagedBuilder


def units_of(
    chosen: Chosen, learnt: Learnt, reasons: dict[str, None], budget: int = sys.maxsize
) -> tuple[list[Unit], list[int], list[int]]:
    """Return the units of a plan, their first operators, and the positions of those that no step needs to prove.

    These are those of which the operators were proven in the step that was learnt, and those for the proof of which a
    budget has no room: all that they give is compared in the first backward. Why units can't be replayed is added to
    `reasons`.
    """
    found: list[Unit] = []
    firsts: list[int] = []
    proven: list[int] = []
    alike = {_code_of(learnt.tape, v) for v in learnt.proven}
    for dropped in Grouping(chosen.plan, learnt).run():
        try:
            unit = StagedBuilder(learnt.tape, dropped).run()
        except Unreplayable as e:
            reasons[str(e)] = None
            continue
        is_alike = all(_code_of(learnt.tape, v) in alike for v in dropped.replayed)
        if is_alike or _bytes_of_proof(chosen, learnt, dropped) > budget:
            proven.append(len(found))
        found.append(unit)
        firsts.append(dropped.first)
    return found, firsts, proven


def _bytes_of_proof(chosen: Chosen, learnt: Learnt, dropped: Dropped) -> int:
    """Return the bytes that are there when a unit has ended and all that it gives is made once more beside it."""
    after = bisect_right(learnt.numbers, dropped.last)
    sizes: dict[int, int] = {}
    for v in dropped.replayed:
        sizes[learnt.tape.values[v].allocation] = learnt.tape.nbytes(v)
    return chosen.load.live[2 * after] + sum(sizes.values())


def _code_of(tape: Tape, value: int) -> tuple[Any, ...]:
    """Return a key that a value shares with the same one in other layers."""
    at = tape.values[value].op
    assert at is not None
    op = tape.ops[at]
    return op.func, op.outs.index(value) if value in op.outs else -1, op.where, re.sub(r"\d+", "*", op.module)


def fallback_units(learnt: Learnt) -> list[Unit]:
    """Return the units for forwards that go another way: whole blocks."""
    found: list[Unit] = []
    for dropped in whole_blocks(learnt):
        with suppress(Unreplayable):
            unit = StagedBuilder(learnt.tape, dropped).run()
            if unit.droppable:
                found.append(unit)
    return found

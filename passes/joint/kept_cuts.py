"""Cuts of a compiled region to keep, as rounding would grow too much on the way back from one kept cut to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from revfx.passes.cuts import Step
from revfx.passes.program import Program
from revfx.passes.rounding import precision


MARGIN = 8.0  # times that a gradient may be off more than the stream that it was computed from


def amplification(step: Step, before: Mapping[int, float], most: Mapping[tuple[int, bool], float]) -> dict[int, float]:
    """Growth of a rounding error of 1 at the last kept cut in each value of the step's exit, given it in the entry.

    Along each stream an inverse multiplies the error by 1/|factor|, by `most` of those that are data. One that
    amplifies also adds a rounding of its own: over n steps of amplification a that sums to (a^n - 1)/(a - 1), ten
    times a^n for a momentum of 0.9.
    """
    growth = dict(before)
    for arc in reversed(step.arcs):
        by = most[arc.scaled_by] if arc.measured else arc.amplification
        grown = max(by * growth.get(arc.head, 1.0) + (by > 1.0), 1.0)
        for v in arc.tail if arc.exact else arc.tail[:1]:
            growth[v] = max(growth.get(v, 1.0), grown)
    return {v: growth.get(v, 1.0) for v in step.exit}


def choose_kept_cuts(program: Program, steps: Sequence[Step]) -> frozenset[int]:
    """Numbers of the cuts inside a region to keep; cut j lies before step j.

    Factors that are data count with the smallest magnitude that they can have. The entry of a step whose factor may
    reach zero is kept. Between two kept cuts errors stay below the square root of the dtype's eps.
    """
    kept: set[int] = set()
    growth: dict[int, float] = {}
    for j, step in enumerate(steps):
        eps = max((precision(program.values[v].dtype) for v in step.exit), default=0.0)
        most = eps**0.5 if eps else 1.0
        if any(a.measured and a.least < most for a in step.arcs):
            kept.add(j)
            growth = {}
            continue
        growth = amplification(step, growth, {a.scaled_by: 1 / a.least for a in step.arcs if a.measured})
        largest = max(growth.values(), default=1.0)
        if MARGIN * largest * eps > most and largest > 1.0 and j + 1 < len(steps):
            kept.add(j + 1)
            growth = {}
    return frozenset(kept - {0})  # which is kept anyway


def inverted_from(step: Step) -> dict[int, int]:
    """For each inverted value of the step's entry, the value of its exit that the inverse starts from."""
    above = {a.head: a.tail[0] for a in step.arcs}
    found: dict[int, int] = {}
    for v in step.entry:
        at = v
        while at in above and at not in step.exit:
            at = above[at]
        if at != v:
            found[v] = at
    return found

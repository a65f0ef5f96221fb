"""Cuts of a compiled region to keep, because rounding would grow too much from one kept cut to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from revfx.passes.cuts import Step
from revfx.passes.program import DataFactor, Program
from revfx.passes.rounding import precision


ERROR_MARGIN = 8.0  # times the relative error of a stream that a gradient computed from it may have


def propagate_errors(step: Step, before: Mapping[int, float], gains: Mapping[DataFactor, float]) -> dict[int, float]:
    """Return the growth of rounding errors from the last kept cut to each value of a step's exit.

    An inverse multiplies the error along its stream by 1/|factor|. One that amplifies also adds a rounding error of
    its own. Over n steps of amplification a these sum to (a^n - 1)/(a - 1), ten times a^n for a momentum of 0.9.

    Args:
        step: the step.
        before: the growth in each value of its entry, for an error of 1.
        gains: upper bounds of 1/|factor| for factors that depend on data.
    """
    growth = dict(before)
    for arc in reversed(step.arcs):
        gain = gains[arc.factor] if isinstance(arc.factor, DataFactor) else arc.amplification
        head = gain * growth.get(arc.head, 1.0)
        if gain > 1.0:
            head += 1.0
        for v in arc.tail if arc.exact else arc.tail[:1]:
            growth[v] = max(growth.get(v, 1.0), head)
    return {v: growth.get(v, 1.0) for v in step.exit}


def choose_kept_cuts(program: Program, steps: Sequence[Step]) -> frozenset[int]:
    """Return the numbers of the cuts inside a region to keep; cut j lies before step j.

    Factors that depend on data count with the smallest magnitude that they can have. The entry of a step with one that
    may come near zero is kept. Between two kept cuts, errors stay below the square root of the dtype's eps.
    """
    kept: set[int] = set()
    growth: dict[int, float] = {}
    for j, step in enumerate(steps):
        eps = max((precision(program.values[v].dtype) for v in step.exit), default=0.0)
        limit = eps**0.5 if eps else 1.0
        factors = [arc.factor for arc in step.arcs if isinstance(arc.factor, DataFactor)]
        if any(factor.least < limit for factor in factors):
            kept.add(j)
            growth = {}
            continue
        growth = propagate_errors(step, growth, {factor: 1 / factor.least for factor in factors})
        largest = max(growth.values(), default=1.0)
        if ERROR_MARGIN * largest * eps > limit and largest > 1.0 and j + 1 < len(steps):
            kept.add(j + 1)
            growth = {}
    return frozenset(kept - {0})  # the region keeps cut 0 anyway


def find_origins(step: Step) -> dict[int, int]:
    """Return, for each inverted value of the entry, the value of the exit that its stream of inverses starts from."""
    above = {arc.head: arc.tail[0] for arc in step.arcs}
    found: dict[int, int] = {}
    for v in step.entry:
        origin = v
        while origin in above and origin not in step.exit:
            origin = above[origin]
        if origin != v:
            found[v] = origin
    return found

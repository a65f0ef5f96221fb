"""What the backward does for each value: saved, recomputed or inverted; by which arc and in what order."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from revfx.passes.closure import Derivation, Forward, made_by, read_by
from revfx.passes.cuts import Step, needed
from revfx.passes.program import Program


@dataclass(frozen=True, slots=True)
class Instruction:
    """One derivation to run; `capture` also takes what autograd saves inside it. `drop` lists values not read again."""

    run: Derivation
    capture: bool
    drop: tuple[int, ...]


def schedule(
    program: Program, step: Step, known: Iterable[int], replay: bool, wanted: frozenset[int], captured: frozenset[int]
) -> tuple[Instruction, ...]:
    """Return the instructions that make `wanted` and run every operation of `captured` once, from the `known` values.

    With `replay` the step's entry is known and everything runs forwards; else its exit is and the entry is derived.
    """
    order: Sequence[Derivation] = [Forward(i) for i in range(step.start, step.stop)] if replay else step.derive
    have = set(known)
    inputs = [v for i in captured for v in program.ops[i].ins if v not in have]
    fresh = [d for d in order if not have.issuperset(made_by(program, d))]
    runs = needed(program, fresh, [*wanted - have, *inputs])
    running = {d.op for d in runs if isinstance(d, Forward)}
    runs = [*runs, *(Forward(i) for i in sorted(captured - running))]
    last: dict[int, int] = {}
    for i, d in enumerate(runs):
        last.update(dict.fromkeys((*read_by(program, d), *made_by(program, d)), i))
    drops: list[list[int]] = [[] for _ in runs]
    for v, i in last.items():
        if v not in wanted and not program.values[v].source:
            drops[i].append(v)
    captures = (isinstance(d, Forward) and d.op in captured for d in runs)
    return tuple(map(Instruction, runs, captures, map(tuple, drops)))


def larger(a: Any, b: Any) -> Any:
    """Return the larger of two numbers, one of which may be a tensor of one element."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.maximum(a, b)
    return a.clamp(min=b) if isinstance(a, Tensor) else b.clamp(min=a) if isinstance(b, Tensor) else max(a, b)


def amplification(step: Step, before: Mapping[int, Any], measured: Mapping[tuple[int, bool], Any]) -> dict[int, Any]:
    """Return how large a rounding error of 1 at the last kept cut has grown in each value, from that `before`.

    Along each stream an inverse multiplies the error by 1/|factor| (as declared, or as measured while the forward
    ran). One that amplifies also adds a rounding of its own: over n steps of amplification a that sums to (a^n -
    1)/(a - 1), ten times a^n for a momentum of 0.9.
    """
    growth: dict[int, Any] = dict(before)
    for arc in reversed(step.arcs):
        by = measured[arc.scaled_by] if arc.measured else arc.amplification
        grown = larger(by * growth.get(arc.head, 1.0) + (by > 1.0), 1.0)
        for v in arc.tail if arc.exact else arc.tail[:1]:
            growth[v] = larger(growth.get(v, 1.0), grown)
    return {v: growth.get(v, 1.0) for v in step.exit}


MARGIN = 8.0  # by how much a gradient may be off more than the stream that it was computed from
CHECK_EVERY, MOST_CHECKS = 4, 32  # of every fourth cut a sample is kept, to see in the backward how far rounding went
GARBAGE = 1e-2  # a regenerated cut that is off by more raises


def precision(dtype: torch.dtype) -> float:
    """Return the relative distance of neighbouring numbers, real or complex; 0 for whole numbers and truth values."""
    return torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0.0


def tolerance_of(dtype: torch.dtype, tolerance: float | None) -> float:
    """Return what a relative error may grow to: as given, or the square root of the dtype's eps."""
    return torch.finfo(dtype).eps ** 0.5 if tolerance is None else tolerance


def checked_every(every: int | None) -> int | None:
    """Return `every`, a number of steps between anchors, or None; a ValueError where it is not positive."""
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"`anchor_every={every!r}` must be a positive whole number, or None.")
    return every


def asked_for(steps: Sequence[Step], every: int | None) -> frozenset[int]:
    """Return the cuts, each before the step of its number, that are anchors by the user's wish."""
    # what would be inverted if its entry were not kept for another reason is a coupling, too
    couplings = [j for j, step in enumerate(steps) if step.inverts or step.saved]
    return frozenset(couplings[every::every]) if every is not None else frozenset()


DEEP = 16  # couplings of streams in half precision that are inverted in a row


def deep_in_half_precision(program: Program, steps: Sequence[Step], cuts: Collection[int]) -> str | None:
    """Return a warning where more than `DEEP` couplings in a row have streams in half precision; else None."""
    row = most = 0
    dtype: torch.dtype | None = None
    for j, step in enumerate(steps):
        rounding = {program.values[a.head].dtype for a in step.arcs if not a.exact}
        half = [d for d in rounding if d.is_floating_point and d.itemsize < 4]
        row = 0 if j in cuts else row + bool(half)
        most, dtype = max(most, row), half[0] if half else dtype
    if most <= DEEP:
        return None
    where = program.ops[steps[0].start].where or "an unknown place"
    return (
        f"{most} couplings in a row, from {where}, have streams in {dtype}, whose rounding adds up while they are"
        " computed back: keep the streams in float32 (autocast may run the functions in half precision), or use"
        " `exact=True` or `anchor_every`; `revfx.testing.drift` measures it."
    )


def anchors(
    program: Program, steps: Sequence[Step], tolerance: float | None, store: bool, every: int | None = None
) -> frozenset[int]:
    """Return the cuts inside a region to keep since rounding would grow too much, by what is known without running.

    Cut j lies before step j. Of factors that are data a typical magnitude is assumed; with `store` the smallest that
    they may have, and the entry of a step whose factor may reach zero is kept as well. `every`: see `asked_for`.
    """
    kept: set[int] = set()
    growth: dict[int, float] = {}
    asked = asked_for(steps, every)
    for j, step in enumerate(steps):
        dtypes = [d for v in step.exit if precision(d := program.values[v].dtype)]
        eps = max(map(precision, dtypes), default=0.0)
        most = max((tolerance_of(d, tolerance) for d in dtypes), default=1.0)
        if j in asked or (store and any(a.measured and a.least < most for a in step.arcs)):
            kept.add(j)
            growth = {}
            continue
        measured = {a.scaled_by: 1 / (a.least if store else a.typical) for a in step.arcs if a.measured}
        growth = amplification(step, growth, measured)
        largest = max(growth.values(), default=1.0)
        if MARGIN * largest * eps > most and largest > 1.0 and j + 1 < len(steps):
            kept.add(j + 1)
            growth = {}
    return frozenset(kept - {0})  # which is kept anyway


def is_checked(cut: int, steps: int) -> bool:
    """Return whether a cut is sampled: the lowest, and evenly spaced ones, so many at most in any region."""
    return cut % max(CHECK_EVERY, steps // MOST_CHECKS) == 1


def inverted_from(step: Step) -> dict[int, int]:
    """Return, for each value of the step's entry that is inverted, the one of its exit that this starts from."""
    above = {a.head: a.tail[0] for a in step.arcs}
    found: dict[int, int] = {}
    for v in step.entry:
        at = v
        while at in above and at not in step.exit:
            at = above[at]
        if at != v:
            found[v] = at
    return found

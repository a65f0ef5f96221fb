"""The findings of `explain` as frozen data, and the format of numbers and places for people."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from revfx.errors import Refusal
from revfx.report.budget import FitInfo
from revfx.units import count, size


MAX_LISTED = 12  # refusals, and different steps of a region, in the text
MAX_PERIOD_STEPS = 16  # steps that repeat together, such as all those of one layer


@dataclass(frozen=True, slots=True)
class ValueLine:
    """One value of a region.

    Attributes:
        name: its name in the program.
        type: its dtype and shape, `f32[8,256]`.
        action: of the backward: "invert", "recompute" or "save".
        how: the formula or call that computes it.
        where: the user's line.
        step: the number of its step in the region.
    """

    name: str
    type: str
    action: str
    how: str
    where: str
    step: int

    def __str__(self) -> str:
        return f"{self.type} {self.action:9}  {self.how}  {place_name(self.where)}"


@dataclass(frozen=True, slots=True)
class RegionInfo:
    """One reversible region.

    Attributes:
        module: the path of the innermost module that holds it.
        first, last: the user's lines.
        kind: the usual name of its couplings.
        couplings, steps: their numbers.
        streams: the types of its outputs.
        kept: the values that the backward starts from: the first and the last cut, side inputs and saved values.
        kept_bytes: their size.
        kept_cuts: the number of cuts that are kept.
        freed_bytes: the size of the values that are regenerated.
        lossless: regeneration returns the same bits; otherwise it is right up to rounding.
        values: the values of the region.
        code_bytes: the size of the codes that make regeneration lossless.
    """

    module: str
    first: str
    last: str
    kind: str
    couplings: int
    steps: int
    streams: tuple[str, ...]
    kept: tuple[str, ...]
    kept_bytes: int
    kept_cuts: int
    freed_bytes: int
    lossless: bool
    values: tuple[ValueLine, ...] = ()
    code_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """The cost of a training step, predicted and measured. Sizes are in bytes, beyond those before the step.

    Attributes:
        way: the way of running the step: "plain", "revfx", "fitted" or "inductor".
        kept: the live bytes after the forward.
        peak: the peak of the step.
        flops: floating-point operations of matrix products, convolutions and attention, in both directions
            (`torch.utils.flop_counter`).
        measured_kept, measured_peak, seconds: the same, and the time, of real steps.
        live: the predicted live bytes after each operation.
        backward: the number of the first operation of the backward.
    """

    way: str
    kept: int | None = None
    peak: int | None = None
    flops: int | None = None
    measured_kept: int | None = None
    measured_peak: int | None = None
    seconds: float | None = None
    live: tuple[int, ...] = ()
    backward: int = 0


@dataclass(frozen=True, slots=True)
class Findings:
    """The findings of revfx in a model: regions, memory and cost.

    Attributes:
        model: the name of the model.
        inputs: the types of the arguments.
        regions: the reversible regions.
        refusals: the places that are left as they were, with reasons.
        ways: the memory and FLOPs of a training step, plainly and with revfx.
        graphs: the regions of a compiled model by graph.
        breaks: the reasons of graph breaks.
        advice: hints for the user.
        notes: the reasons why figures are missing.
        fit: the plan for a budget, if one is given.
    """

    model: str
    inputs: tuple[str, ...]
    regions: tuple[RegionInfo, ...]
    refusals: tuple[Refusal, ...]
    ways: tuple[Usage, ...] = ()
    graphs: tuple[tuple[RegionInfo, ...], ...] = ()
    breaks: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    fit: FitInfo | None = None

    @property
    def couplings(self) -> int:
        """The number of inverted couplings."""
        return sum(r.couplings for r in self.regions)

    @property
    def summary(self) -> str:
        """The findings in a few words."""
        if not self.regions:
            return "nothing reversible was found"
        found = pluralize(len(self.regions), "reversible region")
        if self.graphs:
            found += f" in {pluralize(len(self.graphs), 'graph')}"
        return f"{found}, {pluralize(self.couplings, 'coupling')}"

    def way(self, name: str) -> Usage | None:
        """Return the usage of the way of this name ("plain", "revfx", "fitted"), or None."""
        return next((u for u in self.ways if u.way == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the data as nested dicts, lists, strings and numbers; sizes in bytes."""
        found = dataclasses.asdict(self)
        for refusal in found["refusals"]:
            kind = refusal["kind"]
            refusal.update(kind=kind.name.lower(), remedy=kind.remedy)
        return found


def place_name(where: str) -> str:
    """Return a file and line without the folders: `model.py:41`."""
    return os.path.basename(where) if where else "unknown place"


def folded(values: Sequence[ValueLine]) -> Iterator[tuple[list[ValueLine], int]]:
    """Yield the lines of some steps, and the number of times that they repeat with the same types and lines of code."""
    steps: list[list[ValueLine]] = []
    keys: list[object] = []  # equal for steps that repeat
    for _, lines in itertools.groupby(values, key=lambda line: line.step):
        steps.append(list(lines))
        keys.append([(v.type, v.action, v.where) for v in steps[-1]])
    at = 0
    while at < len(steps):
        # The repetition that covers most steps, at least three.
        period, times = 1, 1
        for p in range(1, MAX_PERIOD_STEPS + 1):
            n = _count_repeats(keys, at, p)
            if n > 1 and n * p > max(2, times * period):
                period, times = p, n
        yield list(itertools.chain.from_iterable(steps[at : at + period])), times
        at += period * times


def _count_repeats(keys: Sequence[object], at: int, period: int) -> int:
    """Return how many times in a row the `period` items from `at` on come."""
    stop = at + period
    while keys[stop : stop + period] == keys[at : at + period]:
        stop += period
    return (stop - at) // period


def alike(refusals: Iterable[Refusal]) -> list[tuple[Refusal, int]]:
    """Return refusals with their counts; those that differ only in the numbers of their values count as one."""
    bare = (dataclasses.replace(r, detail=re.sub(r"_\d+`", "`", r.detail)) for r in refusals)
    return list(Counter(bare).items())


def pluralize(number: int, noun: str) -> str:
    """Return `2 regions`, `1 region`."""
    return f"{number:,} {noun}" + "s" * (number != 1)


USAGE_COLUMNS: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "kept": ("kept", size),
    "peak": ("peak", size),
    "FLOPs": ("flops", count),
    "measured kept": ("measured_kept", size),
    "measured peak": ("measured_peak", size),
    "seconds": ("seconds", "{:.3f}".format),
}


def columns(ways: Sequence[Usage]) -> dict[str, dict[str, tuple[float | None, str]]]:
    """Return each figure and its text, by column and way; a missing figure has no text. Empty columns are left out."""
    table: dict[str, dict[str, tuple[float | None, str]]] = {}
    for head, (field, form) in USAGE_COLUMNS.items():
        column: dict[str, tuple[float | None, str]] = {}
        for u in ways:
            figure = getattr(u, field)
            column[u.way] = figure, "" if figure is None else form(figure)
        if any(words for _, words in column.values()):
            table[head] = column
    return table

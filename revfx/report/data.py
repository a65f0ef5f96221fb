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


MAX_LISTED = 12  # refusals, and different steps of a region, that are shown
LONGEST_PERIOD = 16  # steps that are repeated together, such as all those of one layer


@dataclass(frozen=True, slots=True)
class ValueLine:
    """One value of a region: its type (`f32[8,256]`), its `action` in the backward ("invert", "recompute" or "save"),
    the formula or call that gives it, the user's line, and its step in the region.
    """

    name: str
    type: str
    action: str
    how: str
    where: str
    step: int

    def __str__(self) -> str:
        return f"{self.type} {self.action:9}  {self.how}  {short(self.where)}"


@dataclass(frozen=True, slots=True)
class RegionInfo:
    """One reversible region.

    `module` is the path of the innermost module that holds it, `first` and `last` are its lines, `kind` is the usual
    name of its couplings. `kept` names the values that the backward starts from: the first and the last cut, side
    inputs and saved values, of `kept_bytes`. `freed_bytes` are regenerated. Regeneration is `lossless`, or right up to
    rounding. `code_bytes` is the size of the codes that make it so. `values` are made in the region.
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
    """The cost of a training step in one way of running it, predicted and measured.

    `kept` after the forward and `peak` of the step are bytes beyond those before it. `flops` counts floating-point
    operations of matrix products, convolutions and attention, in both directions (`torch.utils.flop_counter`).
    `live[i]` is predicted after operation i, and `backward` is the number of the first operation of the backward.
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

    `inputs` are the types of the arguments, `refusals` the places that are left as they were, with reasons. `ways` are
    the memory and FLOPs of a training step, plainly and with revfx. `graphs` repeats the regions of a compiled model
    by graph, and `breaks` holds the reasons of graph breaks. `advice` is for the user, `notes` name figures that could
    not be found out. `fit` is the plan for a budget of memory, if one is given.
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
        """How many couplings are inverted."""
        return sum(r.couplings for r in self.regions)

    @property
    def summary(self) -> str:
        """The findings in a few words."""
        if not self.regions:
            return "nothing reversible was found"
        graphs = f" in {counted(len(self.graphs), 'graph')}" if self.graphs else ""
        return f"{counted(len(self.regions), 'reversible region')}{graphs}, {counted(self.couplings, 'coupling')}"

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


def short(where: str) -> str:
    """Return a file and line without the folders: `model.py:41`."""
    return os.path.basename(where) if where else "unknown place"


def folded(values: Sequence[ValueLine]) -> Iterator[tuple[list[ValueLine], int]]:
    """Yield the lines of some steps, and how often they come in a row: with the same types and lines of code."""
    steps = [list(lines) for _, lines in itertools.groupby(values, key=lambda line: line.step)]
    looks = [tuple((v.type, v.action, v.where) for v in lines) for lines in steps]
    at = 0
    while at < len(steps):
        times = {p: _repeats(looks, at, p) for p in range(1, LONGEST_PERIOD + 1)}
        period = max(times, key=lambda p: (times[p] * p if times[p] * p > 2 and times[p] > 1 else 0, -p))
        again = times[period] if times[period] * period > 2 else 1
        yield [line for lines in steps[at : at + period] for line in lines], again
        at += period * again


def _repeats(looks: Sequence[object], at: int, period: int) -> int:
    """Return how often the next `period` items come in a row."""
    blocks = (looks[i : i + period] for i in range(at, len(looks), period))
    return sum(1 for _ in itertools.takewhile(looks[at : at + period].__eq__, blocks))


def alike(refusals: Iterable[Refusal]) -> list[tuple[Refusal, int]]:
    """Return refusals that differ in the numbers of their values only, each once with its count."""
    bare = (dataclasses.replace(r, detail=re.sub(r"_\d+`", "`", r.detail)) for r in refusals)
    return list(Counter(bare).items())


def counted(number: int, noun: str) -> str:
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
    """Return, by column and way, each figure and its text, "" where there is none; no column that nobody has."""
    table = {
        head: {u.way: (n := getattr(u, field), "" if n is None else form(n)) for u in ways}
        for head, (field, form) in USAGE_COLUMNS.items()
    }
    return {head: column for head, column in table.items() if any(words for _, words in column.values())}

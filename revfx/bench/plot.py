"""A report of `revfx bench` as a picture, one panel per model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from revfx.bench.models import MODELS
from revfx.bench.results import Fit, Report, Row
from revfx.bench.ways import WAYS
from revfx.report.figures import figure


MIB = 2**20
STYLES = {name: {"color": f"C{i % 10}", "marker": "osv^D*P<X>hd"[i % 12]} for i, name in enumerate(WAYS)}


def plot(report: Report, path: str | Path) -> None:
    """Draw peaks over step times or sizes, or the largest sizes that fit, into a file whose ending says its kind."""
    names = list(dict.fromkeys(r.model for r in report.found))
    fig = figure("`--plot`", 5.5 * max(1, len(names)), 4.5)
    for i, name in enumerate(names):
        axes = fig.add_subplot(1, len(names), i + 1, title=MODELS[name].title)
        if report.fits:
            _draw_fits(axes, [f for f in report.fits if f.model == name])
        else:
            _draw_rows(axes, [r for r in report.rows if r.model == name], report.sweep)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    fig.savefig(path)


def _draw_rows(axes: Any, rows: Sequence[Row], sweep: str | None) -> None:
    axes.set(xlabel=sweep or "step time, of plain's", ylabel="peak, MiB", yscale="log")
    if sweep:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
    for way in dict.fromkeys(r.way for r in rows):
        mine = [(getattr(r, sweep or "ratio"), r.peak / MIB) for r in rows if r.way == way and r.peak]
        points = [(x, y) for x, y in mine if x is not None]
        if points:
            axes.plot(*zip(*points, strict=True), linestyle="-" if sweep else "", label=way, **STYLES[way])


def _draw_fits(axes: Any, fits: Sequence[Fit]) -> None:
    axes.set(ylabel="the largest that fits", yscale="log")
    sweeps = list(dict.fromkeys(f.sweep for f in fits))
    ways = list(dict.fromkeys(f.way for f in fits if f.largest))
    for k, way in enumerate(ways):
        largest = {f.sweep: f.largest or 0 for f in fits if f.way == way}
        places = [s + 0.8 * k / len(ways) for s in range(len(sweeps))]
        heights = [largest.get(s, 0) for s in sweeps]
        axes.bar(places, heights, width=0.8 / len(ways), label=way, color=STYLES[way]["color"])
    axes.set_xticks([s + 0.4 * (1 - 1 / max(1, len(ways))) for s in range(len(sweeps))], sweeps)

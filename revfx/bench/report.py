"""A report of `revfx bench` as text, Markdown, CSV, JSON, and as a picture, one panel per model."""

from __future__ import annotations

import csv
import io
import json
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from revfx.bench.models import MODELS
from revfx.bench.results import Fit, Report, Row
from revfx.bench.ways import WAYS
from revfx.report.figures import figure


MIB = 2**20
STYLES = {name: {"color": f"C{i % 10}", "marker": "osv^D*P<X>hd"[i % 12]} for i, name in enumerate(WAYS)}


@dataclass(frozen=True)
class Table:
    """Cells of text, with a heading above and notes below."""

    heading: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def tables(report: Report) -> Iterator[Table]:
    """Yield one table per model, in the order of the report: a line for each way of which there is something."""
    for name in dict.fromkeys(r.model for r in report.found):
        found = [r for r in report.found if r.model == name]
        what, columns = _columns(report, found)
        rows: list[tuple[str, ...]] = []
        for way in dict.fromkeys(r.way for r in found):
            cells = ["".join(cell(r) for r in found if r.way == way) for _, cell in columns]
            rows += [(WAYS[way].title, *cells)] if any(cells) else []
        heading, head = f"{MODELS[name].title} (`{name}`), {what}", ("way", *(head for head, _ in columns))
        yield Table(heading, head, tuple(rows), _notes(found))


def text(report: Report) -> str:
    """Format the report as plain text."""
    parts = [f"{report.machine}\n{report.command}"]
    for t in tables(report):
        lines = [[cell.replace("`", "") for cell in row] for row in (t.head, *t.rows)]
        first, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
        aligned = (f"{way:{first}}  " + "  ".join(map(str.rjust, cells, widths)) for way, *cells in lines)
        parts.append("\n".join([t.heading, *(line.rstrip() for line in aligned), *t.notes]).replace("`", ""))
    return "\n\n".join([*parts, _legend(report).replace("`", "")])


def markdown(report: Report) -> str:
    """Format the report as Markdown, for a README."""
    parts: list[str] = []
    for t in tables(report):
        rows = [t.head, ("---", *["---:"] * (len(t.head) - 1)), *t.rows]
        parts += [f"**{t.heading}**", "\n".join("| " + " | ".join(row) + " |" for row in rows)]
        parts += ["\n".join(f"- {note}" for note in t.notes)] if t.notes else []
    return "\n\n".join([*parts, f"(`{report.command}`; {report.machine}. {_legend(report)})"])


def as_csv(report: Report) -> str:
    """Format the report as CSV: a line for each row or fit, in bytes and seconds, under the names of their fields."""
    out = io.StringIO()
    plain = [{**asdict(r), "notes": "; ".join(r.notes)} for r in report.found]
    writer = csv.DictWriter(out, list(plain[0]) if plain else ["model"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(plain)
    return out.getvalue()


def as_json(report: Report) -> str:
    """Format the whole report as JSON, in bytes and seconds."""
    return json.dumps(asdict(report), indent=1)


# --- tables
def _columns(report: Report, found: Sequence[Any]) -> tuple[str, list[tuple[str, Callable[[Any], str]]]]:
    """Return what a table shows, and its columns: the head, and from a row or fit to a cell, "" if it is of another."""
    one, sweep = found[0], report.sweep
    if report.fits:
        others = {f.sweep: f"{'batch' if f.sweep == 'depth' else 'depth'} {f.other}" for f in found}
        return f"the largest in {_mib(one.memory)}", [
            (f"{kind}, at {other}", lambda f, kind=kind: _largest(f) if f.sweep == kind else "")
            for kind, other in others.items()
        ]
    if sweep is not None:
        other = f"batch {one.batch}" if sweep == "depth" else f"depth {one.depth}"
        of = operator.attrgetter(sweep)
        return f"{other}: peak (kept)", [
            (f"{sweep} {n}", lambda r, n=n: _peak(r) if of(r) == n else "") for n in sorted(set(map(of, found)))
        ]
    plain = next((r.peak for r in found if r.way == "plain"), None)
    return f"depth {one.depth}, batch {one.batch}", [
        ("kept", lambda r: _mib(r.kept)),
        ("peak", lambda r: _mib(r.peak)),
        ("of plain's", lambda r: f"{r.peak / plain:.2f}" if plain and r.peak is not None else ""),
        ("step", lambda r: "" if r.seconds is None else f"{1e3 * r.seconds:.1f} ms"),
        ("of plain's", lambda r: "" if r.ratio is None else f"{r.ratio:.2f} ({r.ratio_low:.2f}..{r.ratio_high:.2f})"),
        ("first step", lambda r: "" if r.first is None else f"{r.first:.1f} s"),
        ("gradients off by", lambda r: "" if r.error is None else f"{r.error:.1e}"),
    ]


def _notes(found: Sequence[Row | Fit]) -> tuple[str, ...]:
    """Return each note once, after the ways that it is about."""
    notes = dict.fromkeys(note for r in found for note in r.notes)
    about = {n: dict.fromkeys(WAYS[r.way].title for r in found if n in r.notes) for n in notes}
    return tuple(f"{', '.join(titles)}: {note}" for note, titles in about.items())


def _mib(count: int | None) -> str:
    return "" if count is None else f"{count / MIB:.1f} MiB"


def _peak(r: Row) -> str:
    return "" if r.peak is None else f"{_mib(r.peak)} ({_mib(r.kept)})"


def _largest(f: Fit) -> str:
    if f.largest is None:
        return ""
    if f.failed:
        return "?"
    return f">= {f.largest}" if f.over is None else f"{f.largest} (not {f.over})"


def _legend(report: Report) -> str:
    if report.fits:
        return (
            "Parameters and gradients are part of the memory; in brackets the smallest size found not to fit, where"
            " none was found the search ended first."
        )
    memory = (
        "Bytes beyond what is there before the step, gradients of parameters left out: kept after the forward, and at"
        " the peak."
    )
    if report.sweep:
        return memory
    return (
        f"{memory} Step times: medians of one interleaved run, in brackets the quartiles of the ratio. First step: with"
        " plans and compilations. Gradients: the worst relative error of a parameter against plain autograd in fp64."
    )


# --- as a picture
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

"""A report of `revfx bench` as text, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from revfx.bench.models import MODELS
from revfx.bench.results import Fit, Report, Row, size_of
from revfx.bench.ways import WAYS


MIB = 2**20


@dataclass(frozen=True)
class Table:
    """Cells of text, with a heading above and notes below."""

    heading: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def tables(report: Report) -> tuple[Table, ...]:
    """Return one table per model, in the order of the report."""
    make: Callable[[Report, str], Table] = _fit_table if report.fits else _sweep_table if report.sweep else _step_table
    return tuple(make(report, name) for name in dict.fromkeys(r.model for r in report.found))


def text(report: Report) -> str:
    """Format the report as plain text."""
    parts = [f"{report.machine}\n{report.command}"]
    for t in tables(report):
        lines = [[cell.replace("`", "") for cell in row] for row in (t.head, *t.rows)]
        widths = [max(len(row[i]) for row in lines) for i in range(len(t.head))]
        aligned = ["  ".join([c.rjust(w) for c, w in zip(r, widths, strict=True)][1:]) for r in lines]
        named = [f"{r[0].ljust(widths[0])}  {rest}".rstrip() for r, rest in zip(lines, aligned, strict=True)]
        parts.append("\n".join([t.heading, *named, *t.notes]).replace("`", ""))
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
def _step_table(report: Report, name: str) -> Table:
    rows = [r for r in report.rows if r.model == name]
    measured = [r for r in rows if r.first is not None]
    plain = next((r.peak for r in measured if r.way == "plain"), None)
    cells = [
        (
            WAYS[r.way].title,
            _mib(r.kept),
            _mib(r.peak),
            "" if not plain or r.peak is None else f"{r.peak / plain:.2f}",
            "" if r.seconds is None else f"{1e3 * r.seconds:.1f} ms",
            "" if r.ratio is None else f"{r.ratio:.2f} ({r.ratio_low:.2f}..{r.ratio_high:.2f})",
            "" if r.first is None else f"{r.first:.1f} s",
            "" if r.error is None else f"{r.error:.1e}",
        )
        for r in measured
    ]
    heading = _heading(name, f"depth {rows[0].depth}, batch {rows[0].batch}")
    head = ("way", "kept", "peak", "of plain's", "step", "of plain's", "first step", "gradients off by")
    return Table(heading, head, tuple(cells), _notes(rows))


def _sweep_table(report: Report, name: str) -> Table:
    rows = [r for r in report.rows if r.model == name]
    sizes = sorted({size_of(r, report.sweep) for r in rows})
    cells: list[tuple[str, ...]] = []
    for way in dict.fromkeys(r.way for r in rows if r.peak is not None):
        at = {size_of(r, report.sweep): r for r in rows if r.way == way}
        measured = [f"{_mib(at[n].peak)} ({_mib(at[n].kept)})" if at[n].peak is not None else "" for n in sizes]
        cells.append((WAYS[way].title, *measured))
    other = f"batch {rows[0].batch}" if report.sweep == "depth" else f"depth {rows[0].depth}"
    heads = (f"{report.sweep} {n}" for n in sizes)
    return Table(_heading(name, f"{other}: peak (kept)"), ("way", *heads), tuple(cells), _notes(rows))


def _fit_table(report: Report, name: str) -> Table:
    fits = [f for f in report.fits if f.model == name]
    others = {f.sweep: f"{'batch' if f.sweep == 'depth' else 'depth'} {f.other}" for f in fits}
    cells: list[tuple[str, ...]] = []
    for way in dict.fromkeys(f.way for f in fits if f.largest is not None):
        cells.append((WAYS[way].title, *(_largest(f) for f in fits if f.way == way)))
    head = ("way", *(f"{sweep}, at {other}" for sweep, other in others.items()))
    return Table(_heading(name, f"the largest in {_mib(fits[0].memory)}"), head, tuple(cells), _notes(fits))


def _notes(found: Sequence[Row | Fit]) -> tuple[str, ...]:
    """Return each note once, after the ways that it is about."""
    notes = dict.fromkeys(note for r in found for note in r.notes)
    about = {n: dict.fromkeys(WAYS[r.way].title for r in found if n in r.notes) for n in notes}
    return tuple(f"{', '.join(titles)}: {note}" for note, titles in about.items())


def _heading(name: str, what: str) -> str:
    return f"{MODELS[name].title} (`{name}`), {what}"


def _mib(count: int | None) -> str:
    return "" if count is None else f"{count / MIB:.1f} MiB"


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

"""What `explain` returns: the findings, which print as text and are saved as a page, a picture or data."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from revfx.errors import Refusal, RevfxError
from revfx.report.data import COLUMNS, LISTED, Findings, RegionInfo, Usage, cells, folded, short, size
from revfx.report.graph import graph_svg
from revfx.report.html import fragment, page
from revfx.report.remedies import remedy


@dataclass(frozen=True, slots=True)
class Explanation(Findings):
    """What revfx finds in a model, what it saves and what it costs. `print` it, or `save` it; see `Findings`."""

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def save(self, path: str | Path) -> None:
        """Write a self-contained page (.html), the graph of the model (.svg), or the data (.json).

        Raises:
            RevfxError: another ending; the pictures' extra is not installed (`pip install 'revfx[viz]'`).
        """
        path = Path(path)
        if path.suffix == ".json":
            text = json.dumps(self.to_dict(), indent=1)
        elif path.suffix == ".html":
            text = page(self)
        elif path.suffix == ".svg":
            text = graph_svg(self)
        else:
            raise RevfxError(f"`Explanation.save({str(path)!r})`: the name must end in .html, .svg or .json.")
        path.write_text(text, encoding="utf-8")

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the text and, where they can be drawn, the pictures."""
        return fragment(self)


# --- as text
def _lines(e: Explanation) -> Iterator[str]:
    found = f"{len(e.regions)} reversible region{'s' * (len(e.regions) != 1)}, {e.couplings} couplings"
    yield f"{e.model}({', '.join(e.inputs)}): {found if e.regions else 'nothing reversible was found'}"
    for graph in e.graphs:
        yield f"graph {graph.number}: {len(graph.regions) or 'no'} region{'s' * (len(graph.regions) != 1)}"
        yield from _regions(graph.regions)
    yield from (f"graph break: {reason}" for reason in e.breaks)
    if not e.graphs:
        yield from _regions(e.regions)
    if e.refusals:
        yield "left as it was"
        yield from (f"  {short(r.where)}: `{r.op}`: {r.reason}" for r in e.refusals[:LISTED])
        if len(e.refusals) > LISTED:
            yield f"  and {len(e.refusals) - LISTED} more"
        yield from (f"  -> {text}" for text in remedies(e.refusals[:LISTED]))
    if e.ways:
        yield from ("one training step, beyond parameters and their gradients", *table(e.ways))
    if e.drift is not None and e.drift.steps:
        yield f"measured drift: {max(s.error for s in e.drift.steps):.1e} (relative, the worst regenerated value)"
    yield from (f"advice: {text}" for text in e.advice)
    yield from (f"note: {text}" for text in e.notes)


def remedies(refusals: Iterable[Refusal]) -> tuple[str, ...]:
    """Return what can be done about some refusals, each once."""
    return tuple(dict.fromkeys(text for r in refusals if (text := remedy(r.reason)) is not None))


def _regions(regions: Iterable[RegionInfo]) -> Iterator[str]:
    for number, r in enumerate(regions):
        yield f"region {number}  {r.module or 'the root'}  {short(r.first)} .. {short(r.last)}"
        streams = ", ".join(r.streams)
        yield f"  {r.couplings} couplings ({r.kind}) in {r.steps} steps; streams {streams}; drift about {r.drift:.0e}"
        kept = ", ".join(r.kept)
        yield f"  keeps {kept} ({size(r.kept_bytes)}) in {r.kept_cuts} cuts, regenerates {size(r.freed_bytes)}"
        blocks = list(itertools.islice(folded(r.values), LISTED + 1))
        for lines, times in blocks[:LISTED]:
            yield from (f"    {line}" for line in lines)
            if times > 1:
                yield f"    ... and {times - 1} more like this"
        if len(blocks) > LISTED:
            yield "    ..."


def table(ways: Sequence[Usage]) -> Iterator[str]:
    """Yield the lines of a table of ways; columns that nobody has are left out."""
    rows = {u.way: cells(u) for u in ways}
    shown = [i for i in range(len(COLUMNS)) if any(row[i] for row in rows.values())]
    yield f"  {'':12}" + "".join(f"{COLUMNS[i]:>15}" for i in shown)
    for way, row in rows.items():
        yield f"  {way:12}" + "".join(f"{row[i] or '-':>15}" for i in shown)

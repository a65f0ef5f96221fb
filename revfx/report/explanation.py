"""The result of `explain`: the findings, which print as text and are saved as a page, a picture or data."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from revfx.errors import RevfxError
from revfx.report.data import MAX_LISTED, Findings, RegionInfo, columns, folded, place_name, pluralize
from revfx.report.html import fragment, page
from revfx.report.memory import memory_svg
from revfx.units import size


@dataclass(frozen=True, slots=True)
class Explanation(Findings):
    """The findings of revfx in a model, to `print` or to `save`; see `Findings`."""

    def __str__(self) -> str:
        return "\n".join(_text_lines(self))

    def save(self, path: str | Path) -> None:
        """Write a self-contained page (.html), a picture of the memory over one step (.svg), or the data (.json).

        Raises:
            RevfxError: another ending, a picture without a timeline, or no matplotlib (`pip install 'revfx[viz]'`).
        """
        form = FORMS.get(Path(path).suffix)
        if form is None:
            raise RevfxError(f"`Explanation.save({str(path)!r})`: the name must end in .html, .svg or .json.")
        Path(path).write_text(form(self), encoding="utf-8")

    def _repr_html_(self) -> str:
        """Return the HTML for a notebook: the text, and the pictures if matplotlib is installed."""
        return fragment(self)


FORMS: Mapping[str, Callable[[Findings], str]] = {
    ".json": lambda e: json.dumps(e.to_dict(), indent=1),
    ".html": page,
    ".svg": memory_svg,
}


# --- as text
def _text_lines(e: Explanation) -> Iterator[str]:
    title = f"{e.model}({', '.join(e.inputs)})"
    if e.regions or e.fit is None:
        title += f": {e.summary}"
    yield title
    if e.fit is not None:
        yield from e.fit.lines()
    for number, regions in enumerate(e.graphs):
        yield f"graph {number}: {pluralize(len(regions), 'region')}"
        yield from _region_lines(regions)
    yield from map("graph break: {}".format, e.breaks)
    if not e.graphs:
        yield from _region_lines(e.regions)
    if e.refusals and e.fit is None:
        yield "left as it was"
        yield from (f"  {place_name(r.where)}: `{r.op}`: {r.detail}" for r in e.refusals[:MAX_LISTED])
        if len(e.refusals) > MAX_LISTED:
            yield f"  and {len(e.refusals) - MAX_LISTED} more"
        kinds = dict.fromkeys(r.kind for r in e.refusals[:MAX_LISTED])
        yield from (f"  -> {kind.remedy}" for kind in kinds)
    if e.ways:
        table = columns(e.ways)
        yield "one training step, beyond parameters and their gradients"
        yield f"  {'':12}" + "".join(map("{:>15}".format, table))
        for u in e.ways:
            yield f"  {u.way:12}" + "".join(f"{column[u.way][1] or '-':>15}" for column in table.values())
    yield from map("advice: {}".format, e.advice)
    yield from map("note: {}".format, e.notes)


def _region_lines(regions: Iterable[RegionInfo]) -> Iterator[str]:
    for number, r in enumerate(regions):
        yield f"region {number}  {r.module or 'the root'}  {place_name(r.first)} .. {place_name(r.last)}"
        precision = "bit for bit" if r.lossless else "up to rounding"
        yield f"  {r.couplings} couplings ({r.kind}) in {r.steps} steps; streams {', '.join(r.streams)}; {precision}"
        kept = f"{', '.join(r.kept)} ({size(r.kept_bytes)}) in {r.kept_cuts} cuts"
        if r.code_bytes:
            kept += f", and codes of {size(r.code_bytes)}"
        yield f"  keeps {kept}; regenerates {size(r.freed_bytes)}"
        blocks = list(itertools.islice(folded(r.values), MAX_LISTED + 1))
        for lines, times in blocks[:MAX_LISTED]:
            yield from map("    {}".format, lines)
            if times > 1:
                yield f"    ... and {times - 1} more like this"
        if len(blocks) > MAX_LISTED:
            yield "    ..."

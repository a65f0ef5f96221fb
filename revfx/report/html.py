"""An explanation as a static web page in one file, and as a notebook cell."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from revfx.errors import RevfxError
from revfx.report.data import Findings, RegionInfo, ValueLine, alike, columns, counted, short
from revfx.report.figures import DARK, PALETTE, printable, themed
from revfx.report.fit import curve_svg
from revfx.report.memory import memory_svg
from revfx.units import count, size


MOST_ROWS = 1000  # of the table of values
MOST_REFUSALS = 200
STYLE = Path(__file__).parent.parent / "data" / "page.css"
MARKS = {"save": "●", "invert": "↑", "recompute": "↻"}


def page(e: Findings) -> str:
    """Return a whole page: figures, pictures, refusals, and a table of all values.

    The page is static: it has no script and loads nothing. Matplotlib draws its pictures.
    """
    parts = "\n".join(_content(e, _pictures(e), "h1", values(e)))
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{text(e.model)}: what revfx finds</title>
<style>{_style(":root")}
html {{ background: var(--paper) }}
body {{ margin: 0 }}</style>
</head>
<body>
<main class="revfx">
{parts}
</main>
</body>
</html>
"""


def fragment(e: Findings) -> str:
    """Return what a notebook shows: a page without its table of values; without matplotlib also without pictures."""
    try:
        drawn = _pictures(e)
    except RevfxError:
        drawn = ""
    parts = "\n".join(_content(e, drawn, "h2", ()))
    return f'<div class="revfx">\n<style>{_style(".revfx")}</style>\n{parts}\n</div>\n'


def _content(e: Findings, drawn: str, heading: str, table: Iterable[str]) -> Iterator[str]:
    inputs = f"({', '.join(e.inputs)})"
    yield f'<header><{heading} class="title">{text(e.model)}<small>{text(inputs)}</small></{heading}>'
    yield f'<p class="lead">{text(e.summary.capitalize())}.</p></header>'
    yield from (*cards(e), *listed("Advice", e.advice), *usage(e), *([drawn] if drawn else ()), *regions(e))
    yield from listed("Graphs", (f"graph {g.number}: {counted(len(g.regions), 'region')}" for g in e.graphs))
    yield from (*listed("Graph breaks", e.breaks), *refusals(e), *listed("Notes", e.notes), *table)
    as_text = f'<div class="wide"><pre>{text(e)}</pre></div>'
    yield f"<section><details><summary>As text</summary>{as_text}</details></section>"


def _pictures(e: Findings) -> str:
    drawn = {"Memory over time": memory_svg(e)} if any(u.timeline for u in e.ways) else {}
    if e.fit is not None:
        drawn["Time over memory"] = curve_svg(e.fit, e.model)
    wide = 'class="wide" tabindex="0" role="region" aria-label='
    return "".join(_section(name, f'<div {wide}"{name}">{themed(svg)}</div>') for name, svg in drawn.items())


def _style(scope: str) -> str:
    """Return the colours as variables of `scope`, and the rules that use them."""
    light, dark = (";".join(f"--{name}:{colour}" for name, colour in c.items()) for c in (PALETTE, DARK))
    rules = STYLE.read_text(encoding="utf-8")
    return f"\n{scope} {{ {light} }}\n@media (prefers-color-scheme: dark) {{ {scope} {{ {dark} }} }}\n\n{rules}"


def text(words: object) -> str:
    """Escape text for a page: nothing that it holds is a tag or ends an attribute."""
    return html.escape(printable(str(words)))


def _section(title: str, content: str, attributes: str = "") -> str:
    return f"<section{attributes}><h2>{title}</h2>{content}</section>"


def _table(heads: str, rows: str, caption: str = "", frame: str = 'class="wide"') -> str:
    caption = caption and f"<caption>{caption}</caption>"
    return f"<div {frame}><table>{caption}<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"


NUMBER = ' class="number"'


def _heads(names: Mapping[str, str]) -> str:
    """Return the heads of columns, each with the attributes of its cells."""
    return "".join(f'<th scope="col"{attributes}>{name}</th>' for name, attributes in names.items())


# --- figures
def cards(e: Findings) -> Iterator[str]:
    """Yield the figures that matter most, plain against revfx: measured ones where there are any."""
    plain, ours = e.way("plain"), e.way("revfx")
    if plain is None or ours is None:
        return
    timed, made = plain.seconds and ours.seconds, ""
    last = ("Time of a step", "seconds", "{:.3f} s".format) if timed else ("FLOPs of a step", "flops", count)
    for title, field, form in (("Peak memory of a step", "peak", size), ("Kept for the backward", "kept", size), last):
        a, b = (getattr(u, f"measured_{field}", None) or getattr(u, field) for u in (plain, ours))
        if a and b:
            less = f"{a / b:.1f} × less" if a > b else f"{b / a:.1f} × more"
            times = less if form is size else f"{b / a:.2f} × as {'long' if timed else 'many'}"
            made += (
                f'<div class="card"><div>{title}</div><strong>{times}</strong><div><span class="plain">{form(a)}'
                f' plain</span> → <span class="ours">{form(b)} revfx</span></div></div>'
            )
    if made:
        yield f'<div class="cards">{made}</div>'


def usage(e: Findings) -> Iterator[str]:
    """Yield the table of what a training step takes, each figure with what it is of the plain one."""
    if not e.ways:
        return
    found, lines = columns(e.ways), ""
    for way in (u.way for u in e.ways):
        lines += f'<tr><th scope="row">{text(way)}</th>'
        for column in found.values():
            (number, words), (plain, _) = column[way], column.get("plain", (None, ""))
            ratio = f" <small>{number / plain:.2f} ×</small>" if way != "plain" and number is not None and plain else ""
            lines += f"<td{NUMBER}>{words or '–'}{ratio}</td>"
        lines += "</tr>"
    caption = (
        "Beyond parameters and their gradients. <em>kept</em>: for the backward, after the forward. Small figures: of"
        " the plain step."
    )
    yield _section("One training step", _table(f"<td></td>{_heads(dict.fromkeys(found, NUMBER))}", lines, caption))


# --- what was found
def listed(title: str, lines: Iterable[str]) -> Iterator[str]:
    """Yield a section with a list, if there is anything in it."""
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    if items:
        yield _section(title, f"<ul>{items}</ul>", f' class="{title.lower()}"')


# of the table of regions, by head: attributes of the cells, and what stands in them
REGION: Mapping[str, tuple[str, Callable[[int, RegionInfo], object]]] = {
    "region": (NUMBER, lambda number, r: number),
    "module": ("", lambda number, r: r.module or "the root"),
    "lines": ("", lambda number, r: " to ".join(dict.fromkeys((short(r.first), short(r.last))))),
    "couplings": (NUMBER, lambda number, r: r.couplings),
    "kind": ("", lambda number, r: r.kind),
    "streams": ("", lambda number, r: ", ".join(r.streams)),
    "keeps": (NUMBER, lambda number, r: f"{size(r.kept_bytes)} in {counted(r.kept_cuts, 'cut')}"),
    "regenerates": (NUMBER, lambda number, r: size(r.freed_bytes)),
    "codes": (NUMBER, lambda number, r: size(r.code_bytes)),
    "regenerated": ("", lambda number, r: "bit for bit" if r.lossless else "up to rounding"),
}


def regions(e: Findings) -> Iterator[str]:
    """Yield the regions as a table."""
    if not e.regions:
        return
    rows = ""
    for number, r in enumerate(e.regions):
        rows += f"<tr>{''.join(f'<td{look}>{text(of(number, r))}</td>' for look, of in REGION.values())}</tr>"
    caption = "What lies in a region is freed in the forward and regenerated in the backward."
    yield _section("Regions", _table(_heads({head: look for head, (look, _) in REGION.items()}), rows, caption))


def refusals(e: Findings) -> Iterator[str]:
    """Yield the table of refusals, with their reasons and remedies."""
    if not e.refusals:
        return
    found, rows = alike(e.refusals), ""
    for r, times in found[:MOST_REFUSALS]:
        again = f" × {times:,}" if times > 1 else ""
        remedy = f'<div class="remedy">→ {_code(r.kind.remedy)}</div>'
        rows += f'<tr><td class="place" title="{text(r.where)}">{text(short(r.where))}</td>'
        rows += f"<td><code>{text(r.op)}</code>{again}</td><td>{_code(r.detail)}{remedy}</td></tr>"
    more = len(found) - MOST_REFUSALS
    note = f"<p>{counted(more, 'more refusal')} not shown.</p>" if more > 0 else ""
    heads = _heads(dict.fromkeys(("place", "operation", "why, and what to do"), ""))
    yield _section("Left as it was", _table(heads, rows) + note)


def _code(words: str) -> str:
    """Escape text in which what stands between backticks is code."""
    return text(words) if words.count("`") % 2 else re.sub("`([^`]*)`", r"<code>\1</code>", text(words))


# --- every value
HEADS = {
    "name": "",
    "type": "",
    "action": "",
    "how": "",
    "where": "",
    "bytes": NUMBER,
    "region": NUMBER,
    "step": NUMBER,
}


def values(e: Findings) -> Iterator[str]:
    """Yield the table of all values."""
    lines = [(n, v) for n, r in enumerate(e.regions) for v in (*r.entry, *r.values)]
    if not lines:
        return
    rows = "".join(_row(n, v) for n, v in lines[:MOST_ROWS])
    left = len(lines) - MOST_ROWS
    note = f"<p>The first {MOST_ROWS:,} of {len(lines):,} values; `save` as .json for all.</p>" if left > 0 else ""
    frame = 'class="wide tall" tabindex="0" role="region" aria-label="Values"'
    yield _section("Values", note + _table(_heads(HEADS), rows, "", frame), ' class="values"')


def _row(region: int, v: ValueLine) -> str:
    action = f'<span class="{text(v.action)}">{MARKS.get(v.action, "")} {text(v.action)}</span>'
    place = f'<td title="{text(v.where)}">{text(short(v.where))}</td>'
    numbers = f'<td class="number">{size(v.nbytes)}</td><td class="number">{region}</td>'
    return (
        f'<tr><td>{text(v.name)}</td><td>{text(v.type)}</td><td>{action}</td><td class="how">{text(v.how)}</td>{place}'
        f'{numbers}<td class="number">{v.step if v.step >= 0 else ""}</td></tr>\n'
    )

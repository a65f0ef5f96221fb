"""An explanation as a static web page in one file, and as a notebook cell."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from revfx.errors import RevfxError
from revfx.report.data import Findings, RegionInfo, alike, columns, counted, short
from revfx.report.memory import DARK, PALETTE, memory_svg, printable, themed
from revfx.units import size


MAX_REFUSAL_ROWS = 200
RULES = Path(__file__).parent.parent / "data" / "page.css"


def page(e: Findings) -> str:
    """Return a whole page: figures, the picture of memory, regions, refusals, and the text.

    The page is static: it has no script and loads nothing. Matplotlib draws its picture.
    """
    parts = "\n".join(_content(e, _picture(e), "h1"))
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escaped(e.model)}: what revfx finds</title>
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
    """Return the content of a page for a notebook; without matplotlib it has no picture."""
    try:
        drawn = _picture(e)
    except RevfxError:
        drawn = ""
    parts = "\n".join(_content(e, drawn, "h2"))
    return f'<div class="revfx">\n<style>{_style(".revfx")}</style>\n{parts}\n</div>\n'


def _content(e: Findings, drawn: str, heading: str) -> Iterator[str]:
    inputs = f"({', '.join(e.inputs)})"
    yield f'<header><{heading} class="title">{escaped(e.model)}<small>{escaped(inputs)}</small></{heading}>'
    yield f'<p class="lead">{escaped(e.summary.capitalize())}.</p></header>'
    yield from (cards(e), bullets("Advice", e.advice), usage(e), drawn, regions(e))
    yield from (bullets("Graph breaks", e.breaks), refusals(e), bullets("Notes", e.notes))
    as_text = f'<div class="wide"><pre>{escaped(e)}</pre></div>'
    yield f"<section><details><summary>As text</summary>{as_text}</details></section>"


def _picture(e: Findings) -> str:
    if not any(u.live for u in e.ways):
        return ""
    title = "Memory over time"
    frame = f'class="wide" tabindex="0" role="region" aria-label="{title}"'
    return _section(title, f"<div {frame}>{themed(memory_svg(e))}</div>")


def _style(scope: str) -> str:
    """Return the colours as variables of `scope`, and the rules that use them."""
    light, dark = (";".join(f"--{name}:{colour}" for name, colour in c.items()) for c in (PALETTE, DARK))
    rules = RULES.read_text(encoding="utf-8")
    return f"\n{scope} {{ {light} }}\n@media (prefers-color-scheme: dark) {{ {scope} {{ {dark} }} }}\n\n{rules}"


def escaped(words: object) -> str:
    """Escape text for a page: nothing that it holds is a tag or ends an attribute."""
    return html.escape(printable(str(words)))


def _section(title: str, content: str, attributes: str = "") -> str:
    return f"<section{attributes}><h2>{title}</h2>{content}</section>"


NUMBER = ' class="number"'


def _table_html(heads: Mapping[str, str], rows: str, caption: str = "") -> str:
    """Return a table; `heads`: the name of each column, and the attributes of its head."""
    caption = caption and f"<caption>{caption}</caption>"
    head = "".join(f'<th scope="col"{attributes}>{name}</th>' for name, attributes in heads.items())
    return f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


# --- figures
CARDS = (  # title, head of the column, and how the figure is compared
    ("Peak memory of a step", "peak", "as much"),
    ("Kept for the backward", "kept", "as much"),
    ("Seconds of a step", "seconds", "as long"),
    ("FLOPs of a step", "FLOPs", "as many"),
)


def cards(e: Findings) -> str:
    """Return the figures that matter most, plain against revfx: measured ones where there are any."""
    table, found = columns(e.ways), ""
    for title, head, compared in CARDS:
        column = table.get(f"measured {head}") or table.get(head, {})
        if "plain" in column and "revfx" in column:
            (a, plain), (b, ours) = column["plain"], column["revfx"]
            if a and b:
                times = f"{a / b:.1f} × less" if a > b else f"{b / a:.2f} × {compared}"
                found += (
                    f'<div class="card"><div>{title}</div><strong>{times}</strong><div><span class="plain">{plain}'
                    f' plain</span> → <span class="ours">{ours} revfx</span></div></div>'
                )
    return found and f'<div class="cards">{found}</div>'


def usage(e: Findings) -> str:
    """Return the table of a training step, each figure with its part of the plain one."""
    if not e.ways:
        return ""
    found, rows = columns(e.ways), ""
    for way in (u.way for u in e.ways):
        rows += f'<tr><th scope="row">{escaped(way)}</th>'
        for column in found.values():
            (number, words), (plain, _) = column[way], column.get("plain", (None, ""))
            ratio = f" <small>{number / plain:.2f} ×</small>" if way != "plain" and number is not None and plain else ""
            rows += f"<td{NUMBER}>{words or '–'}{ratio}</td>"
        rows += "</tr>"
    caption = (
        "Beyond parameters and their gradients. <em>kept</em>: for the backward, after the forward. Small figures: of"
        " the plain step."
    )
    return _section("One training step", _table_html({"way": "", **dict.fromkeys(found, NUMBER)}, rows, caption))


# --- regions, refusals and lists
def bullets(title: str, lines: Iterable[str]) -> str:
    """Return a section with a list; "" if the list is empty."""
    items = "".join(f"<li>{escaped(line)}</li>" for line in lines)
    return items and _section(title, f"<ul>{items}</ul>", f' class="{title.lower()}"')


# of the table of regions, by head: attributes of the cells, and their content
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


def regions(e: Findings) -> str:
    """Return the regions as a table."""
    if not e.regions:
        return ""
    rows = ""
    for number, r in enumerate(e.regions):
        rows += f"<tr>{''.join(f'<td{look}>{escaped(of(number, r))}</td>' for look, of in REGION.values())}</tr>"
    caption = "What lies in a region is freed in the forward and regenerated in the backward."
    return _section("Regions", _table_html({head: look for head, (look, _) in REGION.items()}, rows, caption))


def refusals(e: Findings) -> str:
    """Return the table of refusals, with their reasons and remedies."""
    if not e.refusals:
        return ""
    found, rows = alike(e.refusals), ""
    for r, times in found[:MAX_REFUSAL_ROWS]:
        again = f" × {times:,}" if times > 1 else ""
        remedy = f'<div class="remedy">→ {_code(r.kind.remedy)}</div>'
        rows += f'<tr><td class="place" title="{escaped(r.where)}">{escaped(short(r.where))}</td>'
        rows += f"<td><code>{escaped(r.op)}</code>{again}</td><td>{_code(r.detail)}{remedy}</td></tr>"
    more = len(found) - MAX_REFUSAL_ROWS
    note = f"<p>{counted(more, 'more refusal')} not shown.</p>" if more > 0 else ""
    heads = {"place": "", "operation": "", "why, and what to do": ""}
    return _section("Left as it was", _table_html(heads, rows) + note)


def _code(words: str) -> str:
    """Escape text with code between backticks."""
    return escaped(words) if words.count("`") % 2 else re.sub("`([^`]*)`", r"<code>\1</code>", escaped(words))

"""An explanation as a static web page in one file, and as a notebook cell."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from revfx.errors import RevfxError
from revfx.report.data import Findings, RegionInfo, alike, columns, place_name, pluralize
from revfx.report.memory import DARK, PALETTE, apply_theme, memory_svg, without_control_characters
from revfx.units import size


MAX_REFUSAL_ROWS = 200
STYLESHEET = Path(__file__).parent.parent / "data" / "page.css"


def page(e: Findings) -> str:
    """Return a whole page: figures, the picture of memory, regions, refusals, and the text.

    The page is static: it has no script and loads nothing. Matplotlib draws its picture.
    """
    content = "\n".join(_content(e, _picture(e), "h1"))
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(e.model)}: what revfx finds</title>
<style>{_style(":root")}
html {{ background: var(--paper) }}
body {{ margin: 0 }}</style>
</head>
<body>
<main class="revfx">
{content}
</main>
</body>
</html>
"""


def fragment(e: Findings) -> str:
    """Return the content of a page for a notebook; without matplotlib it has no picture."""
    try:
        picture = _picture(e)
    except RevfxError:
        picture = ""
    content = "\n".join(_content(e, picture, "h2"))
    return f'<div class="revfx">\n<style>{_style(".revfx")}</style>\n{content}\n</div>\n'


def _content(e: Findings, picture: str, heading: str) -> Iterator[str]:
    inputs = f"({', '.join(e.inputs)})"
    yield f'<header><{heading} class="title">{escape(e.model)}<small>{escape(inputs)}</small></{heading}>'
    yield f'<p class="lead">{escape(e.summary.capitalize())}.</p></header>'
    yield from (_cards(e), _list_html("Advice", e.advice), _usage_html(e), picture, _regions_html(e))
    yield from (_list_html("Graph breaks", e.breaks), _refusals_html(e), _list_html("Notes", e.notes))
    as_text = f'<div class="wide"><pre>{escape(e)}</pre></div>'
    yield f"<section><details><summary>As text</summary>{as_text}</details></section>"


def _picture(e: Findings) -> str:
    if not any(u.live for u in e.ways):
        return ""
    title = "Memory over time"
    frame = f'class="wide" tabindex="0" role="region" aria-label="{title}"'
    return _section(title, f"<div {frame}>{apply_theme(memory_svg(e))}</div>")


def _style(scope: str) -> str:
    """Return the colours as variables of `scope`, and the rules that use them."""
    light = ";".join(map("--{}:{}".format, PALETTE.keys(), PALETTE.values()))
    dark = ";".join(map("--{}:{}".format, DARK.keys(), DARK.values()))
    rules = STYLESHEET.read_text(encoding="utf-8")
    return f"\n{scope} {{ {light} }}\n@media (prefers-color-scheme: dark) {{ {scope} {{ {dark} }} }}\n\n{rules}"


def escape(words: object) -> str:
    """Escape text for a page, so that it has no tags and ends no attribute."""
    return html.escape(without_control_characters(str(words)))


def _section(title: str, content: str, attributes: str = "") -> str:
    return f"<section{attributes}><h2>{title}</h2>{content}</section>"


NUMBER = ' class="number"'


def _table_html(heads: Mapping[str, str], rows: str, caption: str = "") -> str:
    """Return a table; `heads`: the names of the columns, with the attributes of their heads."""
    if caption:
        caption = f"<caption>{caption}</caption>"
    head = "".join(f'<th scope="col"{attributes}>{name}</th>' for name, attributes in heads.items())
    return f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


# --- figures
CARDS = (  # title, head of the column, and words of the comparison
    ("Peak memory of a step", "peak", "as much"),
    ("Kept for the backward", "kept", "as much"),
    ("Seconds of a step", "seconds", "as long"),
    ("FLOPs of a step", "FLOPs", "as many"),
)


def _cards(e: Findings) -> str:
    """Return the figures that matter most, plain against revfx: measured ones if there are any."""
    table, found = columns(e.ways), ""
    for title, head, words in CARDS:
        column = table.get(f"measured {head}") or table.get(head, {})
        plain, plain_text = column.get("plain", (None, ""))
        ours, our_text = column.get("revfx", (None, ""))
        if not plain or not ours:
            continue
        ratio = f"{plain / ours:.1f} × less" if plain > ours else f"{ours / plain:.2f} × {words}"
        found += (
            f'<div class="card"><div>{title}</div><strong>{ratio}</strong><div><span class="plain">{plain_text}'
            f' plain</span> → <span class="ours">{our_text} revfx</span></div></div>'
        )
    return found and f'<div class="cards">{found}</div>'


def _usage_html(e: Findings) -> str:
    """Return the table of a training step, each figure with its ratio to the plain one."""
    if not e.ways:
        return ""
    table, rows = columns(e.ways), ""
    for u in e.ways:
        rows += f'<tr><th scope="row">{escape(u.way)}</th>'
        for column in table.values():
            (figure, words), (plain, _) = column[u.way], column.get("plain", (None, ""))
            rows += f"<td{NUMBER}>{words or '–'}"
            if u.way != "plain" and figure is not None and plain:
                rows += f" <small>{figure / plain:.2f} ×</small>"
            rows += "</td>"
        rows += "</tr>"
    caption = (
        "Beyond parameters and their gradients. <em>kept</em>: for the backward, after the forward. Small figures: of"
        " the plain step."
    )
    return _section("One training step", _table_html({"way": "", **dict.fromkeys(table, NUMBER)}, rows, caption))


# --- regions, refusals and lists
def _list_html(title: str, lines: Iterable[str]) -> str:
    """Return a section with a list; "" if the list is empty."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return items and _section(title, f"<ul>{items}</ul>", f' class="{title.lower()}"')


# The columns of the table of regions, by head: attributes of the cells, and their content.
REGION_COLUMNS: Mapping[str, tuple[str, Callable[[int, RegionInfo], object]]] = {
    "region": (NUMBER, lambda number, r: number),
    "module": ("", lambda number, r: r.module or "the root"),
    "lines": ("", lambda number, r: " to ".join(dict.fromkeys((place_name(r.first), place_name(r.last))))),
    "couplings": (NUMBER, lambda number, r: r.couplings),
    "kind": ("", lambda number, r: r.kind),
    "streams": ("", lambda number, r: ", ".join(r.streams)),
    "keeps": (NUMBER, lambda number, r: f"{size(r.kept_bytes)} in {pluralize(r.kept_cuts, 'cut')}"),
    "regenerates": (NUMBER, lambda number, r: size(r.freed_bytes)),
    "codes": (NUMBER, lambda number, r: size(r.code_bytes)),
    "regenerated": ("", lambda number, r: "bit for bit" if r.lossless else "up to rounding"),
}


def _regions_html(e: Findings) -> str:
    """Return the regions as a table."""
    if not e.regions:
        return ""
    rows = ""
    for number, r in enumerate(e.regions):
        rows += "<tr>"
        for attributes, content in REGION_COLUMNS.values():
            rows += f"<td{attributes}>{escape(content(number, r))}</td>"
        rows += "</tr>"
    heads = {head: attributes for head, (attributes, _) in REGION_COLUMNS.items()}
    caption = "The activations of a region are freed in the forward and regenerated in the backward."
    return _section("Regions", _table_html(heads, rows, caption))


def _refusals_html(e: Findings) -> str:
    """Return the table of refusals, with their reasons and remedies."""
    if not e.refusals:
        return ""
    found, rows = alike(e.refusals), ""
    for r, times in found[:MAX_REFUSAL_ROWS]:
        count = f" × {times:,}" if times > 1 else ""
        remedy = f'<div class="remedy">→ {_code_html(r.kind.remedy)}</div>'
        rows += f'<tr><td class="place" title="{escape(r.where)}">{escape(place_name(r.where))}</td>'
        rows += f"<td><code>{escape(r.op)}</code>{count}</td><td>{_code_html(r.detail)}{remedy}</td></tr>"
    table = _table_html({"place": "", "operation": "", "why, and what to do": ""}, rows)
    hidden = len(found) - MAX_REFUSAL_ROWS
    if hidden > 0:
        table += f"<p>{pluralize(hidden, 'more refusal')} not shown.</p>"
    return _section("Left as it was", table)


def _code_html(words: str) -> str:
    """Escape text with code between backticks."""
    text = escape(words)
    if words.count("`") % 2 == 0:
        text = re.sub("`([^`]*)`", r"<code>\1</code>", text)
    return text

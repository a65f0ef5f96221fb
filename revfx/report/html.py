"""An explanation as a web page: one file that asks for nothing from elsewhere; and what a notebook shows of it."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from revfx.errors import RevfxError
from revfx.report.data import COLUMNS, Findings, RegionInfo, ValueLine, alike, cells, count, counted, short, size
from revfx.report.figures import DARK, PALETTE, printable, themed
from revfx.report.graph import MARKS, graph_svg, has_timeline, memory_svg
from revfx.report.remedies import remedy


MOST_ROWS = 5000  # of the table of values
MOST_REFUSALS = 200
LOOKS = Path(__file__).parent.parent / "data"  # `page.css`, and the one script: the search in the table and its sorting


def page(e: Findings) -> str:
    """Return a whole page: figures, pictures, refusals, and a table of all values that can be searched and sorted.

    `page.html#search=invert` opens it with a search.

    Raises:
        RevfxError: matplotlib is not installed (`pip install 'revfx[viz]'`).
    """
    # the one script is a constant: what comes from the model is escaped text, and never code
    script = _file("page.js")
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
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
{_joined((*_content(e, _pictures(e), "h1"), *values(e), _as_text(e)))}
</main>
<script>{script}</script>
</body>
</html>
"""


def fragment(e: Findings) -> str:
    """Return what a notebook shows: a page without its table of values; without matplotlib also without pictures."""
    try:
        drawn = _pictures(e)
    except RevfxError:
        drawn = ""
    parts = (*_content(e, drawn, "h2"), _as_text(e))
    return f'<div class="revfx">\n<style>{_style(".revfx")}</style>\n{_joined(parts)}\n</div>\n'


def _content(e: Findings, drawn: str, heading: str) -> Iterator[str]:
    """Yield all but the table of values."""
    inputs = f"({', '.join(e.inputs)})"
    yield f'<header><{heading} class="title">{text(e.model)}<small>{text(inputs)}</small></{heading}>'
    yield f'<p class="lead">{text(e.summary.capitalize())}.</p></header>'
    yield from (*cards(e), *listed("Advice", e.advice), *usage(e), drawn)
    yield from (*regions(e.all_regions), *graph_breaks(e), *refusals(e), *listed("Notes", e.notes))


def _pictures(e: Findings) -> str:
    """Draw the pictures of a page.

    Raises:
        RevfxError: matplotlib is not installed.
    """
    drawn = [("Memory over time", memory_svg(e))] if has_timeline(e) else []
    drawn.append(("Graph", graph_svg(e)))
    return "".join(
        f'<section><h2>{name}</h2><div class="wide" tabindex="0" role="region" aria-label="{name}">{themed(svg)}</div>'
        "</section>"
        for name, svg in drawn
    )


def _as_text(e: Findings) -> str:
    return (
        f'<section><details><summary>As text</summary><div class="wide"><pre>{text(e)}</pre></div></details></section>'
    )


def _joined(parts: Iterable[str]) -> str:
    return "\n".join(part for part in parts if part)


def _file(name: str) -> str:
    return "\n" + (LOOKS / name).read_text(encoding="utf-8")


def _style(scope: str) -> str:
    """Return the colours as variables of `scope`, and the rules that use them."""
    light, dark = (";".join(f"--{name}:{colour}" for name, colour in c.items()) for c in (PALETTE, DARK))
    rules = _file("page.css")
    return f"\n{scope} {{ {light} }}\n@media (prefers-color-scheme: dark) {{ {scope} {{ {dark} }} }}\n{rules}"


def text(words: object) -> str:
    """Escape text for a page: nothing that it holds is a tag or ends an attribute."""
    return html.escape(printable(str(words)))


# --- figures
def cards(e: Findings) -> Iterator[str]:
    """Yield the figures that matter most, plain against revfx: measured ones where there are any."""
    plain, ours = e.way("plain"), e.way("revfx")
    if plain is None or ours is None:
        return
    peaks = (plain.measured_peak, ours.measured_peak), (plain.peak, ours.peak)
    kepts = (plain.measured_kept, ours.measured_kept), (plain.kept, ours.kept)
    made: list[str] = []
    for name, (measured, predicted) in (("Peak memory of a step", peaks), ("Kept for the backward", kepts)):
        a, b = measured if None not in measured else predicted
        if a and b:
            made.append(_card(name, size(a), size(b), f"{a / b:.1f} × less" if a > b else f"{b / a:.1f} × more"))
    if plain.seconds and ours.seconds:
        a, b = plain.seconds, ours.seconds
        made.append(_card("Time of a step", f"{a:.3f} s", f"{b:.3f} s", f"{b / a:.2f} × as long"))
    elif plain.flops and ours.flops:
        a, b = plain.flops, ours.flops
        made.append(_card("FLOPs of a step", count(a), count(b), f"{b / a:.2f} × as many"))
    if made:
        yield f'<div class="cards">{"".join(made)}</div>'


def _card(name: str, plain: str, ours: str, ratio: str) -> str:
    return (
        f'<div class="card"><div>{name}</div><strong>{ratio}</strong>'
        f'<div><span class="plain">{plain} plain</span> → <span class="ours">{ours} revfx</span></div></div>'
    )


def usage(e: Findings) -> Iterator[str]:
    """Yield the table of what a training step takes, each figure with what it is of the plain one."""
    if not e.ways:
        return
    rows = {u.way: (cells(u), _numbers(u)) for u in e.ways}
    shown = [i for i in range(len(COLUMNS)) if any(words[i] for words, _ in rows.values())]
    plain = rows["plain"][1] if "plain" in rows else (None,) * len(COLUMNS)
    heads = "".join(f'<th scope="col" class="number">{COLUMNS[i]}</th>' for i in shown)
    lines: list[str] = []
    for way, (words, numbers) in rows.items():
        figures = "".join(
            f'<td class="number">{words[i] or "–"}{_ratio(numbers[i], plain[i]) if way != "plain" else ""}</td>'
            for i in shown
        )
        lines.append(f'<tr><th scope="row">{text(way)}</th>{figures}</tr>')
    yield (
        '<section><h2>One training step</h2><div class="wide"><table><caption>Beyond parameters and their gradients.'
        " <em>kept</em>: for the backward, after the forward. Small figures: of the plain step.</caption>"
        f"<thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></section>"
    )


def _numbers(u: object) -> tuple[float | None, ...]:
    return tuple(getattr(u, n) for n in ("kept", "peak", "flops", "measured_kept", "measured_peak", "seconds"))


def _ratio(number: float | None, plain: float | None) -> str:
    return f" <small>{number / plain:.2f} ×</small>" if number is not None and plain else ""


# --- what was found
def listed(title: str, lines: Iterable[str]) -> Iterator[str]:
    """Yield a section with a list, if there is anything in it."""
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    if items:
        yield f'<section class="{title.lower()}"><h2>{title}</h2><ul>{items}</ul></section>'


def regions(found: Sequence[RegionInfo]) -> Iterator[str]:
    """Yield the regions as a table."""
    if not found:
        return
    names = ("region", "module", "lines", "couplings", "kind", "streams", "keeps", "regenerates", "drift about")
    numeric = {"region", "couplings", "keeps", "regenerates", "drift about"}
    heads = "".join(f'<th scope="col"{_number(n in numeric)}>{n}</th>' for n in names)
    rows: list[str] = []
    for number, r in enumerate(found):
        lines = short(r.first) if r.first == r.last else f"{short(r.first)} to {short(r.last)}"
        kept = f"{size(r.kept_bytes)} in {counted(r.kept_cuts, 'cut')}"
        row = (
            number, r.module or "the root", lines, r.couplings, r.kind, ", ".join(r.streams), kept,
            size(r.freed_bytes), f"{r.drift:.0e}" if r.drift else "0",
        )  # fmt: skip
        rows.append("".join(f"<td{_number(n in numeric)}>{text(c)}</td>" for n, c in zip(names, row, strict=True)))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    yield (
        '<section><h2>Regions</h2><div class="wide"><table><caption>What lies in a region is freed in the forward and'
        f" regenerated in the backward.</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
        "</section>"
    )


def _number(is_one: bool) -> str:
    return ' class="number"' if is_one else ""


def graph_breaks(e: Findings) -> Iterator[str]:
    """Yield the graphs of a compiled model, and why each of them ended."""
    yield from listed("Graphs", (f"graph {g.number}: {counted(len(g.regions), 'region')}" for g in e.graphs))
    yield from listed("Graph breaks", e.breaks)


def refusals(e: Findings) -> Iterator[str]:
    """Yield what was left as it was, why, and what can be done about it."""
    if not e.refusals:
        return
    found = alike(e.refusals)
    rows = "".join(
        f'<tr><td class="place" title="{text(r.where)}">{text(short(r.where))}</td><td><code>{text(r.op)}</code>'
        f"{f' × {times:,}' if times > 1 else ''}</td><td>{_code(r.reason)}{_remedy(r.reason)}</td></tr>"
        for r, times in found[:MOST_REFUSALS]
    )
    more = len(found) - MOST_REFUSALS
    note = f"<p>{counted(more, 'more refusal')} not shown.</p>" if more > 0 else ""
    yield (
        '<section><h2>Left as it was</h2><div class="wide"><table><thead><tr><th scope="col">place</th>'
        f'<th scope="col">operation</th><th scope="col">why, and what to do</th></tr></thead><tbody>{rows}</tbody>'
        f"</table></div>{note}</section>"
    )


def _remedy(reason: str) -> str:
    advice = remedy(reason)
    return "" if advice is None else f'<div class="remedy">→ {_code(advice)}</div>'


def _code(words: str) -> str:
    """Escape text in which what stands between backticks is code."""
    pieces = words.split("`")
    if len(pieces) % 2 == 0:
        return text(words)
    return "".join(f"<code>{text(p)}</code>" if i % 2 else text(p) for i, p in enumerate(pieces))


# --- every value
HEADS = ("name", "type", "action", "how", "where", "bytes", "region", "step")


def values(e: Findings) -> Iterator[str]:
    """Yield the table of all values, with a box to search it."""
    lines = [(n, v) for n, r in enumerate(e.all_regions) for v in (*r.entry, *r.values)]
    if not lines:
        return
    rows = "".join(_row(n, v) for n, v in lines[:MOST_ROWS])
    left = len(lines) - MOST_ROWS
    note = f"<p>The first {MOST_ROWS:,} of {len(lines):,} values; `save` as .json for all.</p>" if left > 0 else ""
    heads = "".join(
        f'<th scope="col"{_number(n in ("bytes", "region", "step"))}><button type="button">{n}</button></th>'
        for n in HEADS
    )
    yield (
        '<section id="values"><h2>Values</h2><p class="search"><label for="search">Search</label>'
        '<input id="search" type="search" autocomplete="off" spellcheck="false" placeholder="invert f32">'
        f'<output id="count" for="search">{counted(len(lines[:MOST_ROWS]), "value")}</output></p>{note}'
        f'<div class="wide tall" tabindex="0" role="region" aria-label="Values"><table><thead><tr>{heads}</tr></thead>'
        f'<tbody id="rows">{rows}</tbody></table></div></section>'
    )


def _row(region: int, v: ValueLine) -> str:
    action = f'<span class="{text(v.action)}">{MARKS.get(v.action, "")} {text(v.action)}</span>'
    place = f'<td title="{text(v.where)}">{text(short(v.where))}</td>'
    numbers = f'<td class="number" data-value="{v.nbytes}">{size(v.nbytes)}</td><td class="number">{region}</td>'
    return (
        f'<tr><td>{text(v.name)}</td><td>{text(v.type)}</td><td>{action}</td><td class="how">{text(v.how)}</td>{place}'
        f'{numbers}<td class="number">{v.step if v.step >= 0 else ""}</td></tr>\n'
    )

"""An explanation as a web page: one file that asks for nothing from elsewhere; and what a notebook shows of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from revfx.errors import RevfxError
from revfx.explanation import Explanation
from revfx.figures import DARK, PALETTE, themed
from revfx.page_parts import cards, graph_breaks, listed, refusals, regions, text, usage, values
from revfx.page_style import SCRIPT, STYLE
from revfx.pictures import all_regions, graph_svg, has_timeline, memory_svg, summary


def page(e: Explanation) -> str:
    """A whole page: figures, pictures, refusals, and a table of all values that can be searched and sorted.

    `page.html#search=invert` opens it with a search.

    Raises:
        RevfxError: matplotlib is not installed (`pip install 'revfx[viz]'`).
    """
    # the one script is a constant: what comes from the model is escaped text, and never code
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
<script>{SCRIPT}</script>
</body>
</html>
"""


def fragment(e: Explanation) -> str:
    """What a notebook shows: a page without its table of values; without matplotlib also without pictures."""
    try:
        drawn = _pictures(e)
    except RevfxError:
        drawn = ""
    parts = (*_content(e, drawn, "h2"), _as_text(e))
    return f'<div class="revfx">\n<style>{_style(".revfx")}</style>\n{_joined(parts)}\n</div>\n'


def _content(e: Explanation, drawn: str, heading: str) -> Iterator[str]:
    """All but the table of values."""
    inputs = f"({', '.join(e.inputs)})"
    yield f'<header><{heading} class="title">{text(e.model)}<small>{text(inputs)}</small></{heading}>'
    yield f'<p class="lead">{text(summary(e).capitalize())}.</p></header>'
    yield from (*cards(e), *listed("Advice", e.advice), *usage(e), drawn)
    yield from (*regions(all_regions(e)), *graph_breaks(e), *refusals(e), *listed("Notes", e.notes))


def _pictures(e: Explanation) -> str:
    """The pictures of a page.

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


def _as_text(e: Explanation) -> str:
    return (
        f'<section><details><summary>As text</summary><div class="wide"><pre>{text(e)}</pre></div></details></section>'
    )


def _joined(parts: Iterable[str]) -> str:
    return "\n".join(part for part in parts if part)


def _style(scope: str) -> str:
    """The colours as variables of `scope`, and the rules that use them."""
    light, dark = (";".join(f"--{name}:{colour}" for name, colour in c.items()) for c in (PALETTE, DARK))
    return f"\n{scope} {{ {light} }}\n@media (prefers-color-scheme: dark) {{ {scope} {{ {dark} }} }}\n{STYLE}"

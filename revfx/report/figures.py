"""Figures of matplotlib, an extra: one way to ask for it, one palette, and SVG that comes out the same each time."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from revfx.errors import RevfxError


if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure
else:
    Axes = Figure = Any  # matplotlib may not be there


# Every colour that a picture uses, by name, and its dark form: a page puts variables in their place.
COLOURS = {
    "paper": ("#ffffff", "#0d1117"), "ink": ("#1f2328", "#e6edf3"),
    "muted": ("#59636e", "#9aa4af"), "faint": ("#d1d9e0", "#343b43"),
    "save": ("#dbeafe", "#12294d"), "save-edge": ("#1d4ed8", "#6ea8fe"),
    "invert": ("#d9f2e0", "#0f3320"), "invert-edge": ("#18713a", "#4cc172"),
    "recompute": ("#fdecc8", "#3f2e08"), "recompute-edge": ("#94600a", "#dba53a"),
    "outside": ("#f0f2f4", "#1c2128"), "outside-edge": ("#808a94", "#7d8791"),
    "plain": ("#6c7681", "#97a1ac"), "revfx": ("#7c3aed", "#b794f6"),
}  # fmt: skip
PALETTE, DARK = ({name: both[i] for name, both in COLOURS.items()} for i in range(2))
LOOKS = {
    "svg.fonttype": "none", "text.color": PALETTE["ink"], "text.parse_math": False,
    "axes.axisbelow": True, "axes.edgecolor": PALETTE["outside-edge"], "axes.labelsize": 8.5,
    "axes.spines.right": False, "axes.spines.top": False,
    "axes.titlelocation": "left", "axes.titlesize": 10.5, "axes.titleweight": "bold",
    "grid.color": PALETTE["faint"], "grid.linewidth": 0.6, "lines.linewidth": 1.5, "lines.markersize": 4,
    "xtick.color": PALETTE["ink"], "xtick.labelsize": 8, "ytick.color": PALETTE["ink"], "ytick.labelsize": 8,
}  # fmt: skip


def figure(who: str, width: float, height: float) -> Figure:
    """Return an empty figure of so many inches; `who` ("`memory_svg`") asks for it.

    Raises:
        RevfxError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise RevfxError(f"{who} needs matplotlib: pip install 'revfx[viz]'") from e
    return Figure(figsize=(width, height), layout="constrained")


def printable(text: str) -> str:
    """Replace the characters that no page or picture can hold, such as those that steer a terminal."""
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)


def picture(who: str, name: str, title: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    """Draw a figure as SVG, with text as text and the same bytes each time.

    Args:
        who: the function that asks for it, for the error where matplotlib is not installed.
        name: prefix of the ids of its parts, as a page may hold several pictures.
        title: its description.
        size: width and height in inches.
        draw: draws on the figure.
    """
    figure(who, *size)  # raises before anything else where it can't be made
    from matplotlib import style, text

    out = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with style.context(["default", {**LOOKS, "svg.hashsalt": name}]):
        fig = figure(who, *size)
        draw(fig)
        written: Any = fig.findobj(text.Text)
        for words in written:
            words.set_text(printable(words.get_text()))
        fig.savefig(out, format="svg", metadata={**nothing, "Title": printable(title)})
    tidy = re.sub(r"<[^>]+>", lambda tag: _tidied(tag[0], name), out.getvalue())
    return "\n".join(line.rstrip() for line in tidy.splitlines()) + "\n"


def _tidied(tag: str, name: str) -> str:
    """Return a tag whose names are the picture's own, with coordinates of two decimals."""
    tag = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", tag)
    return re.sub(r' d="[^"]+"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), tag)


def themed(picture: str) -> str:
    """Return an SVG to put into a page: without its prologue, its colours as variables of the page."""
    picture = picture[picture.index("<svg") :]
    picture = re.sub(r"<metadata>.*?</metadata>\s*", "", picture, flags=re.DOTALL)
    for name, colour in PALETTE.items():
        picture = picture.replace(f": {colour}", f": var(--{name})")
    return picture

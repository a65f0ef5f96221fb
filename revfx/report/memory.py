"""The picture of memory over one training step, plain against revfx, as SVG, and the colours of pictures and pages."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from revfx.errors import RevfxError
from revfx.report.data import Findings, Usage
from revfx.units import binary_unit, size


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Every colour of pictures and pages, by name, with its dark form; a page has variables in their place.
COLOURS = {
    "paper": ("#ffffff", "#0d1117"), "ink": ("#1f2328", "#e6edf3"),
    "muted": ("#59636e", "#9aa4af"), "faint": ("#d1d9e0", "#343b43"),
    "outside": ("#f0f2f4", "#1c2128"), "outside-edge": ("#808a94", "#7d8791"),
    "advice": ("#94600a", "#dba53a"),
    "plain": ("#6c7681", "#97a1ac"), "revfx": ("#7c3aed", "#b794f6"), "fitted": ("#0f766e", "#5eead4"),
}  # fmt: skip
PALETTE = {name: light for name, (light, _) in COLOURS.items()}
DARK = {name: dark for name, (_, dark) in COLOURS.items()}
STYLE: dict[str, Any] = {  # of matplotlib: text stays text, and equal pictures have equal ids
    "svg.fonttype": "none", "svg.hashsalt": "revfx", "text.color": PALETTE["ink"], "text.parse_math": False,
    "axes.axisbelow": True, "axes.edgecolor": PALETTE["outside-edge"], "axes.labelsize": 8.5,
    "axes.spines.right": False, "axes.spines.top": False,
    "axes.titlelocation": "left", "axes.titlesize": 10.5, "axes.titleweight": "bold",
    "grid.color": PALETTE["faint"], "grid.linewidth": 0.6, "lines.linewidth": 1.5, "lines.markersize": 4,
    "xtick.color": PALETTE["ink"], "xtick.labelsize": 8, "ytick.color": PALETTE["ink"], "ytick.labelsize": 8,
}  # fmt: skip
MAX_LINE_POINTS = 400  # each shows the largest value of its operations
MIN_ENLARGED_RATIO = 4  # of the plain peak to revfx's, for a second panel with revfx's line enlarged


def memory_svg(e: Findings) -> str:
    """Draw the live bytes after each operation of one training step, plainly and with revfx, as SVG.

    The same findings give the same bytes.

    Raises:
        RevfxError: there is no timeline of a step, or matplotlib is not installed.
    """
    ways = {u.way: u for u in e.ways if u.live}
    if not ways:
        raise RevfxError(
            "No picture can be drawn: no training step was simulated (never with `backend=`; else `.notes` says why)."
            " Save it as .html or .json."
        )
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RevfxError("No picture can be drawn without matplotlib. Run pip install 'revfx[viz]'.") from error
    title = f"Memory of one training step: {without_control_characters(e.model)}"
    peaks = ", ".join(f"{way} {size(max(u.live))}" for way, u in ways.items())
    metadata: Any = dict.fromkeys(("Creator", "Date", "Format", "Type")) | {"Title": f"{title}; peaks: {peaks}"}
    out = io.StringIO()
    with style.context(["default", STYLE]):
        figure = Figure(layout="constrained")
        _draw(figure, ways, title, None if e.fit is None else e.fit.budget)
        figure.savefig(out, format="svg", metadata=metadata)
    # Two decimals of a point are enough for coordinates.
    short = re.sub(r' d="[^"]+"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), out.getvalue())
    return "\n".join(map(str.rstrip, short.splitlines())) + "\n"


def _draw(figure: Figure, ways: Mapping[str, Usage], title: str, budget: int | None) -> None:
    """Draw all ways on one panel with the budget as a line, and revfx's on a second one where it is small."""
    last = [*ways.values()][-1]
    is_enlarged = False
    if set(ways) == {"plain", "revfx"}:
        is_enlarged = max(ways["plain"].live) > MIN_ENLARGED_RATIO * max(ways["revfx"].live)
    heights = [3, 2] if is_enlarged else [1]
    figure.set_size_inches(7, 4.4 if is_enlarged else 3.1)
    panels: Any = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
    top, bottom = panels[0][0], panels[-1][0]
    split = min(max(last.backward / len(last.live), 0.15), 0.85)  # part of the width for the forward

    _draw_lines(top, ways, split, budget)
    top.set_title(title)
    if is_enlarged:
        _draw_lines(bottom, {"revfx": ways["revfx"]}, split, None)
        bottom.set_title("revfx alone, enlarged", fontsize=8.5, weight="normal", color=PALETTE["revfx"])

    for x, phase in ((split / 2, "forward"), ((1 + split) / 2, "backward")):
        bottom.annotate(phase, (x, 0), (0, -6), xycoords=bottom.get_xaxis_transform(), textcoords="offset points",
                        ha="center", va="top", fontsize=9)  # fmt: skip
    counts = ", ".join(f"{u.backward:,} + {len(u.live) - u.backward:,} ({way})" for way, u in ways.items())
    caption = f"operations of the step: {counts}"
    if len(ways) > 1:
        caption += "; each phase drawn at the same length"
    caption += "\nbeyond parameters and their gradients"
    bottom.set_xlabel(caption, fontsize=7.5, color=PALETTE["muted"], labelpad=18)


def _draw_lines(axes: Axes, ways: Mapping[str, Usage], split: float, budget: int | None) -> None:
    """Draw live bytes over the operations, with labels of the peaks and lines at the backward and at the budget."""
    highest = max(1, *(max(u.live) for u in ways.values()))
    unit, scale = binary_unit(highest)
    for way, u in ways.items():
        xs, ys = thinned(u, split)
        ys = [y / scale for y in ys]
        colour, top = PALETTE[way], max(ys)
        x = xs[ys.index(top)]
        axes.fill_between(xs, ys, color=colour, alpha=0.16, linewidth=0)
        axes.plot(xs, ys, color=colour)
        axes.plot([x], [top], "o", color=colour)
        side, offset = ("right", -7) if x > 0.7 else ("left", 7)
        axes.annotate(f"{way} {size(max(u.live))}", (x, top), (offset, 6), textcoords="offset points",
                      ha=side, fontsize=9, weight="bold", color=colour)  # fmt: skip
    if budget is not None:
        axes.axhline(budget / scale, color=PALETTE["ink"], linewidth=1, linestyle=(0, (1, 2)))
        axes.annotate(f"budget {size(budget)}", (1, budget / scale), (-4, 3), textcoords="offset points",
                      ha="right", fontsize=8, color=PALETTE["ink"])  # fmt: skip
    axes.set(xlim=(0, 1), xticks=[], ylim=(0, 1.2 * highest / scale))
    axes.set_ylabel(unit, color=PALETTE["ink"])
    axes.grid(axis="y")
    axes.axvline(split, color=PALETTE["outside-edge"], linewidth=1, linestyle=(0, (4, 3)))


def thinned(u: Usage, split: float) -> tuple[list[float], list[float]]:
    """Return the points of the line of a step; the forward takes the part `split` of the width.

    Each point stands for several operations, with the largest of their values.
    """
    xs, ys = [0.0], [0.0]
    for values, start, stop in ((u.live[: u.backward], 0.0, split), (u.live[u.backward :], split, 1.0)):
        points = min(len(values), max(1, int(MAX_LINE_POINTS * (stop - start))))
        for i in range(points):
            xs.append(start + (stop - start) * (i + 1) / points)
            ys.append(float(max(values[i * len(values) // points : (i + 1) * len(values) // points])))
    return xs, ys


def without_control_characters(text: str) -> str:
    """Replace the characters that no page or picture can hold, such as control characters of terminals."""
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)


def apply_theme(picture: str) -> str:
    """Return an SVG for a page: without its prologue, and with variables of the page as colours."""
    picture = picture[picture.index("<svg") :]
    picture = re.sub(r"<metadata>.*?</metadata>\s*", "", picture, flags=re.DOTALL)
    for name, colour in PALETTE.items():
        picture = picture.replace(f": {colour}", f": var(--{name})")
    return picture

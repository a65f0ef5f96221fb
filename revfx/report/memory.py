"""Memory over time of one training step, plain against revfx, as SVG."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from revfx.errors import RevfxError
from revfx.report.data import Findings, Timeline
from revfx.report.figures import PALETTE, Axes, Figure, picture
from revfx.units import binary_unit, size


COLUMNS = 400  # points of a line; each shows the most of the operations that fall into it
TICKS = 80  # steps of regions that are marked
ENLARGED = 4  # how many times more the plain step takes before revfx's is drawn again, enlarged


def memory_svg(e: Findings) -> str:
    """Draw the live bytes after each operation of one training step, plainly and with revfx, as SVG."""
    ways = {u.way: u.timeline for u in e.ways if u.timeline is not None}
    if not ways:
        raise RevfxError(
            "No picture can be drawn: this explanation has no timeline of a training step. Its notes say why the step"
            " could not be counted; save it as .html or .json instead."
        )
    last_way = list(ways.values())[-1]
    enlarged = len(ways) == 2 and ways["plain"].peak > ENLARGED * ways["revfx"].peak

    def draw(fig: Figure) -> None:
        shares = [3, 2] if enlarged else [1]
        rows: Any = fig.subplots(len(shares), 1, sharex=True, squeeze=False, height_ratios=shares)
        top, last = rows[0][0], rows[-1][0]
        _lines(top, ways)
        top.set_title(f"Memory of one training step: {e.model}")
        if enlarged:
            _lines(last, {"revfx": ways["revfx"]})
            last.set_title("revfx alone, enlarged", fontsize=8.5, weight="normal", color=PALETTE["revfx"])
        split = _split(last_way)
        for x, words in ((split / 2, "forward"), ((1 + split) / 2, "backward")):
            last.annotate(words, (x, 0), (0, -6), xycoords=last.get_xaxis_transform(), textcoords="offset points",
                          ha="center", va="top", fontsize=9)  # fmt: skip
        counts = ", ".join(f"{t.backward:,} + {len(t.live) - t.backward:,} ({way})" for way, t in ways.items())
        scaled = "; each phase drawn at the same length" * (len(ways) > 1)
        ticks = "; ticks: couplings begin" * any(t.marks for t in ways.values())
        caption = f"operations of the step: {counts}{scaled}\nbeyond parameters and their gradients{ticks}"
        last.set_xlabel(caption, fontsize=7.5, color=PALETTE["muted"], labelpad=18)

    told = "; ".join(f"{way}: at most {size(t.peak)}" for way, t in ways.items())
    height = 4.4 if enlarged else 3.1
    return picture("`memory_svg`", "memory", f"Memory of one training step of {e.model}: {told}", (7, height), draw)


def _split(t: Timeline) -> float:
    """Return which part of the picture's width the forward takes."""
    return min(max(t.backward / len(t.live), 0.15), 0.85)


def _lines(axes: Axes, ways: Mapping[str, Timeline]) -> None:
    """Draw live bytes over the operations, with labels of the peaks, the backward's begin, and where steps begin."""
    highest = max(1, *(t.peak for t in ways.values()))
    unit, scale = binary_unit(highest)
    last = list(ways.values())[-1]
    split = _split(last)
    for way, t in ways.items():
        xs, ys = thinned(t, split)
        colour = PALETTE[way]
        ys = [y / scale for y in ys]
        axes.fill_between(xs, ys, color=colour, alpha=0.16, linewidth=0)
        axes.plot(xs, ys, color=colour)
        top = max(ys)
        x = xs[ys.index(top)]
        axes.plot([x], [top], "o", color=colour)
        axes.annotate(
            f"{way} {size(t.peak)}", (x, top), (-7 if x > 0.4 else 7, 6), textcoords="offset points",
            ha="right" if x > 0.4 else "left", fontsize=9, weight="bold", color=colour,
        )  # fmt: skip
    axes.set_ylim(0, 1.2 * highest / scale)
    axes.set_ylabel(unit, color=PALETTE["ink"])
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    axes.grid(axis="y")
    axes.axvline(split, color=PALETTE["outside-edge"], linewidth=1, linestyle=(0, (4, 3)))
    for at, _ in last.marks[:: 1 + len(last.marks) // TICKS]:
        forward = split * at / max(1, last.backward)
        backward = split + (1 - split) * (at - last.backward) / max(1, len(last.live) - last.backward)
        x = forward if at < last.backward else backward
        axes.axvline(x, 0, 0.035, color=PALETTE["outside-edge"], linewidth=0.7)


def thinned(t: Timeline, split: float) -> tuple[list[float], list[float]]:
    """Return the line of a timeline: each phase has its part of the width, a point is the most that falls into it."""
    xs, ys = [0.0], [0.0]
    for values, start, stop in ((t.live[: t.backward], 0.0, split), (t.live[t.backward :], split, 1.0)):
        columns = min(len(values), max(1, int(COLUMNS * (stop - start))))
        for c in range(columns):
            these = values[c * len(values) // columns : (c + 1) * len(values) // columns]
            xs.append(start + (stop - start) * (c + 1) / columns)
            ys.append(float(max(these)))
    return xs, ys

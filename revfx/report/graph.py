"""Pictures of an explanation, as SVG: the model's graph, and memory over time (`revfx.report.memory`)."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from revfx.errors import Refusal
from revfx.report.data import LISTED, Findings, RegionInfo, alike, counted, short
from revfx.report.figures import PALETTE, Axes, Figure, picture, printable
from revfx.report.graph_layout import SOLVED, Frame, Layout, Node, layout
from revfx.report.memory import memory_svg as memory_svg
from revfx.units import size


MOST_NODES, MOST_REGIONS = 90, 8  # that are drawn
MOST_IN_REGION = 40
# inches
WIDTH, MARGIN = 7.0, 0.3
BOX, TALL, STEP = 1.5, 0.4, 0.7  # width and height of a node, distance of rows
COLUMN = 3.7  # distance of lanes
HEAD, GAP = 0.56, 0.3
MARKS = {"save": "●", "invert": "↑", "recompute": "↻", "outside": ""}
MEANING = {
    "save": "kept for the backward", "invert": "solved from what follows", "recompute": "computed again",
    "outside": "outside of regions, as it was",
}  # fmt: skip


def graph_svg(e: Findings) -> str:
    """Draw a model's regions as SVG: every value by what the backward does with it, layers that come again once."""
    parts = list(_parts(e))
    width = max([WIDTH, *(p.width for p in parts)])
    height = sum(p.height for p in parts)
    tips: dict[str, str] = {}

    def draw(fig: Figure) -> None:
        fig.set_layout_engine("none")
        axes: Any = fig.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        axes.axis("off")
        y = 0.0
        for part in parts:
            part.draw(_Pen(axes, width, y, tips))
            y += part.height

    title = f"What revfx finds in {e.model}: {e.summary}"
    svg = picture("`graph_svg`", "graph", title, (width, height), draw)
    for name, text in tips.items():  # titles, which a browser shows when the pointer rests on the part
        mark = f'<g id="graph-{name}">'
        svg = svg.replace(mark, f"{mark}\n<title>{html.escape(printable(text))}</title>", 1)
    return svg


# --- from top to bottom
@dataclass(frozen=True)
class _Part:
    """A stripe of the picture: how it is drawn below where a pen is, and the room that it takes."""

    draw: Callable[[_Pen], None]
    height: float
    width: float = 0.0


def _parts(e: Findings) -> Iterator[_Part | _Region]:
    regions = e.regions
    yield _title(e)
    left = MOST_NODES
    shown = regions[:MOST_REGIONS]
    for number, region in enumerate(shown):
        if region.before:
            yield _outside(region.before, followed=True)
        found = layout(region, min(left, MOST_IN_REGION))
        left = max(0, left - len(found.nodes))
        following = regions[number + 1].before if region is not regions[-1] else region.after
        yield _Region(number, region, found, followed=region is not shown[-1] or bool(following))
    if len(regions) > MOST_REGIONS:
        yield _note(f"{counted(len(regions) - MOST_REGIONS, 'more region')} not drawn")
    elif regions and regions[-1].after:
        yield _outside(regions[-1].after, followed=False)
    if not regions:
        found = alike(e.refusals)[::-1]
        yield from (_refused(refusal, times) for refusal, times in found[:LISTED])
        if len(found) > LISTED:
            yield _note(f"{counted(len(found) - LISTED, 'more refusal')} not drawn")


class _Pen:
    """Draws at inches from the left and below its own top."""

    def __init__(self, axes: Axes, width: float, top: float, tips: dict[str, str]) -> None:
        self.axes, self.width, self.top, self.tips = axes, width, top, tips

    def text(self, x: float, y: float, text: str, points: float = 8, colour: str = "ink", **options: Any) -> None:
        """Write text at x, its middle at y."""
        options = {"va": "center", "color": PALETTE[colour], **options}
        self.axes.text(x, self.top + y, printable(text), fontsize=points, **options)

    def box(self, x: float, y: float, width: float, height: float, kind: str, tip: str = "", **options: Any) -> None:
        """Draw a box whose middle is (x, y)."""
        from matplotlib.patches import FancyBboxPatch

        corner = x - width / 2, self.top + y - height / 2
        style = f"round,pad=0,rounding_size={min(0.08, height / 3)}"
        options = {"facecolor": PALETTE[kind], "edgecolor": PALETTE[f"{kind}-edge"], "linewidth": 1.1, **options}
        patch = FancyBboxPatch(corner, width, height, boxstyle=style, **options)
        if tip:
            name = f"tip-{len(self.tips)}"
            patch.set_gid(name)
            self.tips[name] = tip
        self.axes.add_patch(patch)

    def note(self, y: float, text: str) -> None:
        """Write a remark in the middle."""
        self.text(self.width / 2, y, text, 8, "muted", ha="center", style="italic")

    def node(self, x: float, y: float, kind: str, name: str, below: str, tip: str, points: float = 8) -> None:
        """Draw a box with a name in it and something below the name."""
        self.box(x, y, BOX, TALL, kind, tip=tip, zorder=2)
        self.text(x, y - 0.08, name, points, ha="center", weight="bold", zorder=3)
        self.text(x, y + 0.1, clipped(below, 26), 6.8, "muted", ha="center", zorder=3)

    def line(self, points: Sequence[tuple[float, float]], colour: str, dashed: bool = False) -> None:
        """Draw a line through the points with round corners, and a head at the last."""
        from matplotlib.patches import FancyArrowPatch
        from matplotlib.path import Path

        at = [(x, self.top + y) for x, y in points]
        path, codes = [at[0]], [Path.MOVETO]
        for before, corner, after in zip(at, at[1:], at[2:], strict=False):
            path += [_towards(corner, before), corner, _towards(corner, after)]
            codes += [Path.LINETO, Path.CURVE3, Path.CURVE3]
        self.axes.add_patch(
            FancyArrowPatch(
                path=Path([*path, at[-1]], [*codes, Path.LINETO]), arrowstyle="-|>,head_length=4,head_width=2.2",
                mutation_scale=1.0, linewidth=1.1, color=PALETTE[colour], linestyle=(0, (3, 2)) if dashed else "-",
                zorder=1, shrinkA=0, shrinkB=0, joinstyle="miter",
            )
        )  # fmt: skip


def _towards(corner: tuple[float, float], to: tuple[float, float], far: float = 0.09) -> tuple[float, float]:
    """Return the point where a round corner begins, half-way at the most."""
    dx, dy = to[0] - corner[0], to[1] - corner[1]
    part = min(0.5, far / max(math.hypot(dx, dy), far))
    return corner[0] + dx * part, corner[1] + dy * part


def _title(e: Findings) -> _Part:
    """Return what model it is, and the legend."""

    def draw(pen: _Pen) -> None:
        pen.text(MARGIN, 0.32, clipped(f"{e.model}({', '.join(e.inputs)})", 70), 12, weight="bold")
        pen.text(MARGIN, 0.6, e.summary, 9, "muted")
        for number, kind in enumerate(MARKS if e.regions else ("outside",)):
            x, y = MARGIN + 0.19 + number % 3 * 2.25, 0.94 + number // 3 * 0.26
            pen.box(x, y, 0.36, 0.18, kind)
            pen.text(x, y, MARKS[kind], 7, f"{kind}-edge", ha="center")
            pen.text(x + 0.26, y, f"{kind}: " * (kind != "outside") + MEANING[kind], 7.5)
        if e.regions:
            for x, colour, words in ((2.25, "outside-edge", "forward"), (4.5, "revfx", "solved from, backward")):
                pen.line(((MARGIN + x, 1.2), (MARGIN + x + 0.37, 1.2)), colour, colour == "revfx")
                pen.text(MARGIN + x + 0.45, 1.2, words, 7.5)

    return _Part(draw, 1.5)


def _note(text: str) -> _Part:
    return _Part(lambda pen: pen.note(0.2, text), 0.4)


def _outside(names: Sequence[str], followed: bool) -> _Part:
    """Return operations between regions."""
    tall = 0.34
    told = clipped(" → ".join(names if len(names) <= 6 else (*names[:3], "…", *names[-2:])), 96)

    def draw(pen: _Pen) -> None:
        x = pen.width / 2
        pen.box(x, tall / 2, pen.width - 2 * MARGIN, tall, "outside")
        pen.text(x, tall / 2, told, 7.5, ha="center")
        if followed:
            pen.line(((x, tall), (x, tall + GAP)), "outside-edge")

    return _Part(draw, tall + GAP)


def _refused(refusal: Refusal, times: int) -> _Part:
    """Return an operation that was left as it was, and why; in so many places alike."""
    where = short(refusal.where)

    def draw(pen: _Pen) -> None:
        x = MARGIN + BOX / 2
        tip = f"{where}: {refusal.op}: {refusal.reason}"
        pen.node(x, TALL / 2, "outside", clipped(refusal.op, 20), where, tip)
        if times > 1:
            pen.text(x + BOX / 2 + 0.16, TALL / 2, f"× {times:,}", 10, weight="bold")
        pen.text(x + BOX / 2 + 0.75, TALL / 2, "\n".join(textwrap.wrap(refusal.reason, 62)[:3]), 8)

    return _Part(draw, TALL + 0.14)


class _Region:
    """The values of a region."""

    def __init__(self, number: int, region: RegionInfo, found: Layout, followed: bool) -> None:
        self.number, self.region, self.found, self.followed = number, region, found, followed
        xs, rows = [n.x for n in found.nodes] or [0.0], max((n.row for n in found.nodes), default=-1) + 1
        self.left, self.span = min(xs), (max(xs) - min(xs)) * COLUMN
        self.width = self.span + BOX + 4 * MARGIN
        self.height = HEAD + rows * STEP + GAP * (2 if found.left_out else 1)

    def place(self, pen: _Pen, node: Node) -> tuple[float, float]:
        """Return the middle of a node."""
        return (pen.width - self.span) / 2 + (node.x - self.left) * COLUMN, HEAD + (node.row + 0.5) * STEP

    def draw(self, pen: _Pen) -> None:
        """Draw the region, its values and what they are made from."""
        r, found = self.region, self.found
        bottom = self.height - GAP
        pen.box(
            pen.width / 2, bottom / 2, pen.width - 2 * MARGIN, bottom, "outside", facecolor="none",
            edgecolor=PALETTE["faint"], zorder=0,
        )  # fmt: skip
        kind = f"{counted(r.couplings, 'coupling')} ({r.kind})"
        name = f"region {self.number}" + f" · {r.module}" * bool(r.module)
        pen.text(2 * MARGIN, 0.2, clipped(f"{name} · {kind}", 80), 8.5, weight="bold")
        kept = f"keeps {size(r.kept_bytes)} in {counted(r.kept_cuts, 'cut')}, codes of {size(r.code_bytes)};"
        kept += f" regenerates {size(r.freed_bytes)}"
        pen.text(2 * MARGIN, 0.4, f"{short(r.first)} to {short(r.last)} · {kept}", 7.5, "muted")
        if self.followed:
            pen.line(((pen.width / 2, bottom), (pen.width / 2, bottom + GAP)), "outside-edge")
        for frame in found.frames:
            self.frame(pen, frame)
        for a, b, kind in found.edges:
            self.edge(pen, found.nodes[a], found.nodes[b], kind == SOLVED)
        for node in found.nodes:
            (x, y), line = self.place(pen, node), node.line
            tip = f"{line.action}: {line.how} ({short(line.where)}), {size(line.nbytes)}"
            points = 8 if len(node.name) <= 20 else 6.4
            pen.node(x, y, line.action, clipped(node.name, 25), f"{MARKS[line.action]} {line.type}", tip, points)
        if found.left_out:
            pen.note(bottom - 0.16, f"{counted(found.left_out, 'more value')} not drawn")

    def frame(self, pen: _Pen, frame: Frame) -> None:
        """Draw a box around what comes again, with how often it does."""
        top, bottom = HEAD + frame.first * STEP + 0.05, HEAD + (frame.last + 1) * STEP - 0.05
        width = min(self.span + BOX + 0.7, pen.width - 2 * MARGIN - 0.3)
        pen.box(
            pen.width / 2, (top + bottom) / 2, width, bottom - top, "outside", facecolor=PALETTE["outside"],
            edgecolor=PALETTE["outside-edge"], linestyle=(0, (1, 2)), zorder=0.5,
        )  # fmt: skip
        text = f"× {frame.times:,}"
        wide = 0.12 + 0.1 * len(text)
        x = pen.width / 2 + width / 2 - 0.1 - wide / 2
        pen.box(x, top, wide, 0.22, "outside", facecolor=PALETTE["paper"], zorder=4)
        pen.text(x, top, text, 9.5, ha="center", weight="bold", zorder=5)

    def edge(self, pen: _Pen, start: Node, end: Node, solved: bool) -> None:
        """Draw an arrow, down for what is read and up for what is solved, beside each other."""
        a, b = self.place(pen, start), self.place(pen, end)
        aside, bend = (0.14, 0.68) if solved else (-0.14, 0.36)  # so that the two kinds don't lie on each other
        down = 1 if start.row < end.row else -1
        x0, y0, x1, y1 = a[0] + aside, a[1] + down * TALL / 2, b[0] + aside, b[1] - down * TALL / 2

        def gap(row: int) -> float:
            return HEAD + max(row, row + down) * STEP + (bend - 0.5) * (STEP - TALL)

        after, before = gap(start.row), gap(end.row - down)
        between = range(min(start.row, end.row) + 1, max(start.row, end.row))
        taken = {n.x for n in self.found.nodes if n.row in between}
        if start.x == end.x and end.x not in taken:
            points = [(x0, y0), (x1, y1)]
        elif end.x not in taken:
            points = [(x0, y0), (x0, after), (x1, after), (x1, y1)]
        elif start.x != end.x and start.x not in taken:
            points = [(x0, y0), (x0, before), (x1, before), (x1, y1)]
        else:  # between the columns
            side = (start.x > end.x) - (start.x < end.x) or (1 if solved else -1)
            x = b[0] + side * (BOX / 2 + 0.1 + 0.06 * (start.row % 3))
            points = [(x0, y0), (x0, after), (x, after), (x, before), (x1, before), (x1, y1)]
        pen.line(points, "revfx" if solved else "outside-edge", solved)


def clipped(text: str, most: int) -> str:
    """Shorten a text to at most so many characters by leaving out some of its middle."""
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[: most - 1 - half]}…{text[-half:]}"

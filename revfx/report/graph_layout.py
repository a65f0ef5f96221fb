"""Where the values of a region lie in a picture of it: what flows on lies in lanes, functions lie between lanes.

A value that the backward solves from another lies in that one's lane, so that a coupling looks as in textbooks: streams
run straight down, and a function goes from one to the other. Layers that come again and again are laid out once.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

from revfx.report.data import RegionInfo, ValueLine, folded


READS, SOLVED = "reads", "solved"  # kinds of edges
Edge = tuple[int, int, str]  # from, to, and of what kind


@dataclass(frozen=True, slots=True)
class Node:
    """A value in a picture, at column `x` (streams at whole numbers, functions at halves) and `row`.

    `name` stands for all values of layers that are drawn once: `add_{1…9}`.
    """

    name: str
    line: ValueLine
    x: float
    row: int


@dataclass(frozen=True, slots=True)
class Frame:
    """Rows `first` to `last`, which come `times` in a row."""

    first: int
    last: int
    times: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The nodes of a region, its edges, frames of what is drawn once, and the values `left_out`."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    frames: tuple[Frame, ...]
    left_out: int = 0


def layout(region: RegionInfo, most: int) -> Layout:
    """Return where to draw the values of a region, of which `most` are drawn, after folding."""
    # a node stands for the values of layers that are drawn once: of them these are the first and the last
    firsts, lasts = list(region.entry), list(region.entry)
    node_of: dict[str, int] = {line.name: i for i, line in enumerate(region.entry)}
    # nodes are in blocks, one under the other: what is from before, what a frame stands for so many times, what is not
    block_of, times_of = [0] * len(firsts), [1]
    at = left_out = 0
    for lines, times in folded(region.values):
        same = region.values[at : at + len(lines) * times]
        at += len(same)
        if left_out or len(firsts) + len(lines) > most:
            left_out += len(same)
            continue
        node_of.update((line.name, len(firsts) + i % len(lines)) for i, line in enumerate(same))
        if times > 1 or times_of[-1] > 1 or len(firsts) == len(region.entry):
            times_of.append(times)
        firsts += lines
        lasts += same[-len(lines) :]
        block_of += [len(times_of) - 1] * len(lines)
    edges = _edges(firsts, lasts, node_of)
    xs = _columns(firsts, edges)
    rows, frames = _rows(block_of, times_of, edges, xs)
    names = (spanned(first.name, last.name) for first, last in zip(firsts, lasts, strict=True))
    nodes = (Node(*one) for one in zip(names, firsts, xs, rows, strict=True))
    return Layout(tuple(nodes), tuple(edges), frames, left_out)


def spanned(first: str, last: str) -> str:
    """Return a name for all from the first to the last: `add_{1…9}`."""
    parts, others = re.split(r"(\d+)", first), re.split(r"(\d+)", last)
    if first == last:
        return first
    if len(parts) != len(others):
        return f"{first} … {last}"
    return "".join(a if a == b else f"{{{a}…{b}}}" for a, b in zip(parts, others, strict=True))


def _edges(firsts: Sequence[ValueLine], lasts: Sequence[ValueLine], node_of: Mapping[str, int]) -> list[Edge]:
    """Return the edges: what a layer reads, by the first of a frame (it lies above), what solves it, by the last."""
    found: dict[Edge, None] = {}
    for node, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
        for names, kind in ((first.reads, READS), (last.solved, SOLVED)):
            found.update(((node_of[n], node, kind), None) for n in names if node_of.get(n, node) != node)
    return list(found)


# --- columns
def _columns(lines: Sequence[ValueLine], edges: Sequence[Edge]) -> list[float]:
    """Return the column of each node."""
    lanes = _lanes(lines, edges)
    xs = [float(lanes.get(i, 0)) for i in range(len(lines))]
    inner = nx.Graph()
    inner.add_nodes_from(i for i in range(len(lines)) if i not in lanes)
    inner.add_edges_from((a, b) for a, b, kind in edges if kind == READS and a not in lanes and b not in lanes)
    for function in nx.connected_components(inner):
        beside = {lanes[a] for a, b, kind in edges if kind == READS and b in function and a in lanes}
        beside |= {lanes[b] for a, b, kind in edges if kind == READS and a in function and b in lanes}
        middle = sum(beside) / len(beside) if beside else 0
        for i in function:
            xs[i] = math.floor(middle) + 0.5
    return xs


def _lanes(lines: Sequence[ValueLine], edges: Sequence[Edge]) -> dict[int, int]:
    """Return the lane of each value that is not inside a function: one for all that follow from each other."""
    solved: dict[int, list[int]] = {}
    for a, b, kind in edges:
        if kind == SOLVED:
            solved.setdefault(b, []).append(a)
    # what is solved from the first cut is what a function gave, not what flows on
    streams = [
        i for i, line in enumerate(lines)
        if line.action != "recompute" and not any(lines[a].step < 0 for a in solved.get(i, ()))
    ]  # fmt: skip
    flow = nx.DiGraph()
    flow.add_nodes_from(streams)
    links = [(i, solved[i][0]) for i in reversed(streams) if i in solved]
    links += [(a, b) for a, b, kind in edges if kind == READS]
    for upper, lower in links:
        if upper < lower and upper in flow and lower in flow and not flow.succ[upper] and not flow.pred[lower]:
            flow.add_edge(upper, lower)
    last_read = {a: max(b for other, b, _ in edges if other == a) for a, _, _ in edges}
    lanes: dict[int, int] = {}
    taken: list[int] = []  # by lane, the last node that needs it
    for chain in map(sorted, nx.weakly_connected_components(flow)):
        first, end = chain[0], chain[-1]
        start = -1 if lines[first].step < 0 else first
        lane = next((k for k, last in enumerate(taken) if last < start), len(taken))
        taken[lane : lane + 1] = [max(end, last_read.get(end, 0))]
        lanes.update(dict.fromkeys(chain, lane))
    return lanes


# --- rows
def _rows(
    block_of: Sequence[int], times_of: Sequence[int], edges: Sequence[Edge], xs: Sequence[float]
) -> tuple[list[int], tuple[Frame, ...]]:
    """Return the row of each node, block under block: below all that it reads, and alone in its column there."""
    rows: list[int] = []
    frames: list[Frame] = []
    for block, nodes in itertools.groupby(range(len(xs)), key=block_of.__getitem__):
        graph, top = nx.DiGraph(), max(rows, default=-1) + 1
        graph.add_nodes_from(nodes)
        graph.add_edges_from((a, b) for a, b, kind in edges if kind == READS and a in graph and b in graph)
        row_of: dict[int, int] = {}
        for generation in nx.topological_generations(graph):
            for i in sorted(generation):
                row = max([top, *(row_of[a] + 1 for a in graph.predecessors(i))])
                taken = {row_of[other] for other in row_of if xs[other] == xs[i]}
                row_of[i] = next(r for r in itertools.count(row) if r not in taken)
        rows.extend(row_of[i] for i in graph)
        if times_of[block] > 1:
            frames.append(Frame(top, max(row_of.values()), times_of[block]))
    return rows, tuple(frames)

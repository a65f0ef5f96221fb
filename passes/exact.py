"""The exact forward of a graph: what its regions invert lies on a grid, so that the inverses give the very bits.

A coupling `y = c*x + r` whose arc a region uses becomes a `Coupling` on the grid; whatever else such an arc starts from
or gives, and no operation that only moves elements made, is rounded where it is made. Streams in half precision, which
have no room for a grid, are carried in float32 and cast for all other readers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from revfx.passes.arcs import Lowered
from revfx.passes.closure import Invert
from revfx.passes.cuts import Stuck
from revfx.passes.facts import CASTS
from revfx.passes.grid import Cast, Coupling, ToGrid, carrier
from revfx.passes.program import Arc, Op, Program
from revfx.passes.regions import Region, find_regions
from revfx.rules import Inverse


Insert = Callable[[fx.Node, Callable[..., Tensor], Sequence[fx.Node], fx.Node], fx.Node]


def exact_regions(program: Program, carries: bool = True) -> tuple[Program, tuple[Region, ...], tuple[Stuck, ...]]:
    """Return the program with only those arcs that can be undone bit for bit, its regions, and where it got stuck.

    Of each operation one arc that rounds is left at most: the one by which a region reaches its cuts. `carries`:
    streams in half precision may be carried in float32.
    """
    possible = _restricted(program, lambda i, arc: _why_not(program, i, arc, carries))
    regions, stuck = find_regions(possible)
    chosen: dict[int, Arc] = {}
    for step in (s for r in regions for s in r.steps):
        for d in step.derive:
            if isinstance(d, Invert) and not d.arc.exact and d.arc in step.arcs:
                chosen[d.op] = d.arc
    if not chosen:
        return possible, regions, stuck
    used = _restricted(possible, lambda i, arc: None if arc.exact or arc is chosen.get(i) else "")
    return used, *find_regions(used)


def _why_not(program: Program, index: int, arc: Arc, carries: bool) -> str | None:
    """Return why an arc has no exact form, or None."""
    half = _is_half(program.values[arc.head].dtype)
    if half and not carries:
        return "no exact inverse: half precision has no room for a grid"
    if arc.exact:
        op = program.ops[index]
        moves = op.moves and op.name.strip("_") not in CASTS
        return "half-precision streams are carried in float32" if half and not moves else None
    if isinstance(arc.coupling, str):
        return f"no exact inverse: {arc.coupling}"
    dtype = program.values[arc.head].dtype
    return None if dtype.is_floating_point else f"no exact inverse: it is {dtype}"


def _restricted(program: Program, why_not: Callable[[int, Arc], str | None]) -> Program:
    """Return the program without the arcs for which there is a reason; no other rounds, so none is barred."""

    def limited(i: int, op: Op) -> Op:
        arcs, refused = list[Arc](), list(op.refused)
        for a in op.arcs:
            if reason := why_not(i, a):
                refused.append((a.head, reason))
            elif reason is None:
                moves = a.exact and isinstance(a.coupling, str)
                arcs.append(a if moves else replace(a, exact=False, barred=None, factor=None, measured=False))
        return replace(op, arcs=tuple(arcs), refused=tuple(refused), terms=())

    return replace(program, ops=[limited(i, op) for i, op in enumerate(program.ops)])


def put_on_grid(lowered: Lowered, regions: Sequence[Region], k: int, insert: Insert) -> None:
    """Make the graph that `lowered` came from compute the exact forward on the grid 2^-k.

    `lowered` holds what `exact_regions` gave. `insert(before, function, arguments, like)` adds a node, described as
    `like` is. New nodes carry their own rules as `meta["directions"]`, by which the graph is to be lowered again.
    """
    rewrite = _Rewrite(lowered, k, insert)
    carried = {v for region in regions for v in rewrite.region(region)}
    for v in sorted(carried):
        rewrite.cast(v)


class _Rewrite:
    def __init__(self, lowered: Lowered, k: int, insert: Insert) -> None:
        self.lowered, self.program, self.k, self.insert = lowered, lowered.program, k, insert
        self.graph = lowered.op_nodes[0].graph
        self.now: dict[int, fx.Node] = dict(enumerate(lowered.value_nodes))
        self.moved: set[fx.Node] = set()  # what was taken from the grid as it is
        self.readers: set[fx.Node] = set()  # of what lies on the grid, as it is carried

    def region(self, region: Region) -> set[int]:
        """Return the values of a region that now lie on the grid."""
        program, must = self.program, _on_grid(self.program, region)
        nodes = self.lowered.op_nodes[region.start : region.stop]
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        # autograd gives an operation and its backward, where a graph holds both, the same number
        start = min((n.meta["seq_nr"] for n in nodes if n.meta.get("seq_nr") is not None), default=0)

        def reads(user: fx.Node) -> bool:  # as part of the region or after it, or in the backward of such
            theirs = user.meta.get("seq_nr")
            return order.get(user, -1) >= order[nodes[0]] and (theirs is None or theirs >= start)

        for v in sorted(v for v in must if program.made_at[v] < region.start):
            self._round(v, nodes[0], reads)
        for i in range(region.start, region.stop):
            op, node = program.ops[i], self.lowered.op_nodes[i]
            if (arc := next((a for a in op.arcs if not a.exact), None)) is not None:
                self._couple(node, op, arc)
                continue
            ins = [v for v in op.ins if _is_float(program, v)]
            moved = op.moves and any(v in must for v in op.outs)
            if moved:
                self.readers.add(node)
                for n in (node, *(self.now[v] for v in op.outs)):
                    n.meta["val"] = pytree.tree_map_only(Tensor, _carried, n.meta["val"])
            if moved and must.issuperset(ins):
                self.moved.update(self.now[v] for v in op.outs)
                continue
            own = node.meta.get("seq_nr")  # its backward reads its own result
            for v in must.intersection(op.outs):
                self._round(v, self.now[v].next, lambda user, own=own: own is None or user.meta.get("seq_nr") != own)
        return must

    def _round(self, v: int, before: fx.Node, replaces: Callable[[fx.Node], bool]) -> None:
        node = self.now[v]
        if node.meta.get("grid") == self.k or node in self.moved:  # by an earlier region
            return
        users = [user for user in node.users if replaces(user)]
        new = self.now[v] = self.insert(before, ToGrid(self.k), (node,), node)
        new.meta.update(directions=(), grid=self.k)
        for user in users:
            user.replace_input_with(node, new)

    def _couple(self, node: fx.Node, op: Op, arc: Arc) -> None:
        assert isinstance(arc.coupling, Coupling)
        x, operands = self.now[arc.head], [self.now[v] for v in arc.tail[1:]]
        for part, reads in replace(arc.coupling, k=self.k).parts(len(operands)):
            given = [operands[i] for i in reads]
            new = self.insert(node, part, (x, *given), node)
            self.readers.add(new)
            if part.bits:
                index = self.insert(node, part.index, (x, new, *given), node)
                index.meta.update(directions=(), kept=True)
                self.readers.add(index)
                given.append(index)
            inverse = Inverse(x, part.inverse, tuple(given), grid=True)
            new.meta.update(directions=(inverse,), grid=self.k)
            x = new
        (y,) = op.outs
        self.now[y] = x
        node.replace_all_uses_with(x)
        self.graph.erase_node(node)

    def cast(self, v: int) -> None:
        """Give all readers but those that take what is carried the dtype that the value had.

        Each casts for itself: a cast that several share would be one more value that lives across cuts.
        """
        dtype, node = self.program.values[v].dtype, self.now[v]
        for user in [u for u in node.users if u not in self.readers] if _is_half(dtype) else ():
            cast = self.insert(user, Cast(dtype), (node,), node)
            cast.meta["directions"] = ()
            user.replace_input_with(node, cast)


def _on_grid(program: Program, region: Region) -> set[int]:
    """Return the values that must lie on the grid: what a used arc gives or starts from, and what that moved from."""
    must: set[int] = set()
    for d in (d for s in region.steps for d in s.derive if isinstance(d, Invert)):
        must.update((d.arc.head, *(d.arc.tail if d.arc.exact else d.arc.tail[:1])))
    for op in reversed(program.ops[region.start : region.stop]):
        if op.moves and any(v in must for v in op.outs):
            must.update(op.ins)
    return {v for v in must if _is_float(program, v)}


def _is_float(program: Program, v: int) -> bool:
    return program.values[v].dtype.is_floating_point and not program.values[v].source


def _is_half(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and carrier(dtype) != dtype


def _carried(t: Tensor) -> Tensor:
    return t.to(carrier(t.dtype)) if t.is_floating_point() else t

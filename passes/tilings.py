"""Arcs between a whole and its parts: those that tile it, and those that were written into a copy of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx

from revfx.passes._torch import is_real
from revfx.passes.facts import assumed
from revfx.passes.program import Arc, Found, Value
from revfx.passes.sizes import fixed
from revfx.rules import Direction, Patch, Tile, op_name


def tilings(
    values: Sequence[Value],
    index: Mapping[fx.Node, int],
    directions: Mapping[fx.Node, Sequence[Direction]],
    outs: Sequence[Sequence[int]],
) -> Iterator[Found]:
    """Yield arcs from parts that tile a value, or complete a patched copy, each with an operation that makes one.

    `directions` holds those of every operation, in order.
    """
    op_nodes = [*directions]

    def moved(ops: Sequence[int], head: int, tail: tuple[int, ...], solve: Callable[..., Tensor], how: str) -> Found:
        text = f"{values[head].name} <- {', '.join(values[v].name for v in tail)}  ({how})"
        read = dict.fromkeys(n for i in ops for n in op_nodes[i].all_input_nodes)
        return min(ops), Arc(head, tail, solve, exact=True, text=text, assumes=assumed(read, index))

    tiles: dict[tuple[int, int], list[tuple[int, int, Tile | Patch]]] = {}
    patches: list[tuple[int, int, Patch]] = []
    for i, found in enumerate(directions.values()):
        for t in found:
            whole = index.get(_copied(t.whole)) if isinstance(t, (Tile, Patch)) else None
            if isinstance(t, Tile) and whole is not None and t.part < len(outs[i]):
                tiles.setdefault((whole, t.dim), []).append((i, outs[i][t.part], t))
            elif isinstance(t, Patch) and whole is not None:
                patches.append((i, outs[i][0], t))
    for (whole, dim), parts in tiles.items():
        yield from (moved(ops, a, (b,), lambda y: y.clone(), "the same part") for ops, a, b in _repeated_parts(parts))
        size = values[whole].shape[dim]
        chosen = _exact_cover([t.index for _, _, t in parts], size) if fixed([size]) else None
        if chosen is None or values[whole].source:
            continue
        use = [parts[k] for k in chosen]
        solve = _assemble(values[whole].shape, dim, tuple((t.index, t.squeezed) for _, _, t in use))
        yield moved([i for i, _, _ in use], whole, tuple(v for _, v, _ in use), solve, "put together")
    for i, patched, p in patches:
        whole = index[_copied(p.whole)]
        if isinstance(p.part, fx.Node) and p.part in index:
            part = index[p.part]
            tiles.setdefault((patched, p.dim), []).append((i, part, p))
        for j, part, t in tiles.get((whole, p.dim), []):
            same = t.index == p.index and t.squeezed == p.squeezed
            if same and isinstance(t, Tile) and not values[whole].source:
                yield moved((i, j), whole, (patched, part), _patch(p), "patch")
            elif set(p.index).isdisjoint(t.index):
                yield moved((i, j), part, (patched,), _take_part(t), "beside the patch")
                tiles.setdefault((patched, p.dim), []).append((j, part, t))


def _copied(node: fx.Node) -> fx.Node:
    """Return the node that a node is a copy of: parts of one are parts of the other."""
    while op_name(node.target) == "clone" and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _repeated_parts(parts: Sequence[tuple[int, int, Tile | Patch]]) -> Iterator[tuple[tuple[int, int], int, int]]:
    """Yield pairs of values that are the same part, taken more than once, and the two operations that take it."""
    first: dict[tuple[Sequence[int], bool], tuple[int, int]] = {}
    for i, v, t in parts:
        j, same = first.setdefault((t.index if isinstance(t.index, range) else tuple(t.index), t.squeezed), (i, v))
        if same != v:
            yield (i, j), v, same
            yield (i, j), same, v


def _patch(p: Patch) -> Callable[..., Tensor]:
    def solve(patched: Tensor, part: Tensor) -> Tensor:
        part = part.unsqueeze(p.dim) if p.squeezed else part
        if isinstance(p.index, range):
            return torch.slice_scatter(patched, part, p.dim, p.index.start, p.index.stop, p.index.step)
        return patched.index_copy(p.dim, index(patched), part)

    index = _on_device(p.index)
    return solve


def _take_part(t: Tile | Patch) -> Callable[..., Tensor]:
    """Return the function that takes a part out of its whole."""
    index, dim, at = _on_device(t.index), t.dim, t.index
    if not isinstance(at, range):
        return lambda y: y.index_select(dim, index(y))
    taken = at.start if t.squeezed else slice(at.start, at.stop, at.step)
    return lambda y: y[(*[slice(None)] * dim, taken)]


def _on_device(positions: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Return the function of a tensor that gives `positions` as an index on its device, made once for each."""
    on = functools.cache(lambda device: torch.tensor(positions, device=device))
    return lambda like: on(like.device) if is_real(like) else on.__wrapped__(like.device)


def _exact_cover(parts: Sequence[Sequence[int]], size: int) -> list[int] | None:
    """Return indices of parts that together hit each of 0..size-1 once, longest first; None if none do."""
    chosen, left = list[int](), set(range(size))
    first = [min(p, default=-1) for p in parts]
    dense = [len(p) == max(p, default=-1) - first[k] + 1 for k, p in enumerate(parts)]
    while left:
        want = min(left)
        fits = [k for k, p in enumerate(parts) if first[k] == want and left.issuperset(p)]
        if not fits:
            return None
        chosen.append(max(fits, key=lambda k: (not dense[k], len(parts[k]))))
        left.difference_update(parts[chosen[-1]])
    return chosen or None


def _assemble(shape: tuple[int, ...], dim: int, parts: tuple[tuple[Sequence[int], bool], ...]) -> Callable[..., Tensor]:
    """Return the function that puts parts together; functional, since it is traced into compiled graphs as well."""
    positions = [i for index, _ in parts for i in index]
    in_order = positions == sorted(positions)
    ranges = [index for index, _ in parts if isinstance(index, range)]
    back = _on_device(sorted(range(len(positions)), key=positions.__getitem__))

    def solve(*tensors: Tensor) -> Tensor:
        whole = [t.unsqueeze(dim) if gone else t for t, (_, gone) in zip(tensors, parts, strict=True)]
        if in_order or len(ranges) < len(parts):
            put = torch.cat(whole, dim)
            return put if in_order else put.index_select(dim, back(put))
        put = whole[0].new_empty(shape)
        for tensor, index in zip(whole, ranges, strict=True):
            put = torch.slice_scatter(put, tensor, dim, index.start, index.stop, index.step)
        return put

    return solve

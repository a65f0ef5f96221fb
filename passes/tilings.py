"""Arcs between a whole and its parts: parts that tile a value, and parts that were written into a copy of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx

from revfx.passes._torch import is_real
from revfx.passes.facts import index_facts
from revfx.passes.program import Arc, Found, Value
from revfx.passes.sizes import is_fixed
from revfx.rules import Direction, Patch, Tile, op_name


class PlacedPart(NamedTuple):
    """A value that is a part of another one: the operation that makes it, its number, and its place in the whole."""

    op: int
    value: int
    place: Tile | Patch


def tiling_arcs(
    values: Sequence[Value],
    index: Mapping[fx.Node, int],
    directions: Mapping[fx.Node, Sequence[Direction]],
    outs: Sequence[Sequence[int]],
) -> Iterator[Found]:
    """Yield arcs from parts that tile a value or complete a patched copy, each with the first operation involved.

    Args:
        values: the values of the program.
        index: the number of each node's value.
        directions: those of every operation, in program order.
        outs: the results of every operation.
    """
    op_nodes = [*directions]

    def moving_arc(ops: Sequence[int], head: int, tail: Sequence[int], solve: Callable[..., Tensor], how: str) -> Found:
        text = f"{values[head].name} <- {', '.join(values[v].name for v in tail)}  ({how})"
        read: dict[fx.Node, None] = {}
        for op in ops:
            read.update(dict.fromkeys(op_nodes[op].all_input_nodes))
        return min(ops), Arc(head, tuple(tail), solve, exact=True, text=text, assumes=index_facts(read, index))

    # Collect the parts of each value along each dimension, and the copies of a value with a part written into them.
    parts: dict[tuple[int, int], list[PlacedPart]] = {}
    patched: list[tuple[int, int, Patch]] = []
    for op, found in enumerate(directions.values()):
        for place in found:
            if not isinstance(place, (Tile, Patch)):
                continue
            whole = index.get(_copied(place.whole))
            if whole is None:
                continue
            if isinstance(place, Patch):
                patched.append((op, outs[op][0], place))
            elif place.part < len(outs[op]):
                parts.setdefault((whole, place.dim), []).append(PlacedPart(op, outs[op][place.part], place))

    # Equal parts give each other back. Parts that cover all positions give the whole back.
    for (whole, dim), tiles in parts.items():
        for pair, head, other in _repeated_parts(tiles):
            yield moving_arc(pair, head, (other,), lambda y: y.clone(), "the same part")
        size = values[whole].shape[dim]
        if values[whole].source or not is_fixed([size]):
            continue
        cover = _exact_cover(tiles, size)
        if cover:
            solve = _assemble(values[whole].shape, dim, [tile.place for tile in cover])
            ops, tail = [tile.op for tile in cover], [tile.value for tile in cover]
            yield moving_arc(ops, whole, tail, solve, "put together")

    # A patched copy and the part that was overwritten give the whole back. Parts beside the patch are in the copy, too.
    for op, copy, patch in patched:
        whole = index[_copied(patch.whole)]
        copy_parts = parts.setdefault((copy, patch.dim), [])
        if isinstance(patch.part, fx.Node) and patch.part in index:
            copy_parts.append(PlacedPart(op, index[patch.part], patch))
        for tile in parts.get((whole, patch.dim), []):
            is_same = tile.place.index == patch.index and tile.place.squeezed == patch.squeezed
            if is_same and isinstance(tile.place, Tile) and not values[whole].source:
                yield moving_arc((op, tile.op), whole, (copy, tile.value), _write_part(patch), "patch")
            elif set(patch.index).isdisjoint(tile.place.index):
                yield moving_arc((op, tile.op), tile.value, (copy,), _take_part(tile.place), "beside the patch")
                copy_parts.append(tile)


def _copied(node: fx.Node) -> fx.Node:
    """Return the node that a node is a copy of: parts of one are parts of the other."""
    while op_name(node.target) == "clone" and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _repeated_parts(parts: Sequence[PlacedPart]) -> Iterator[tuple[tuple[int, int], int, int]]:
    """Yield pairs of values that are the same part, in both directions, behind the two operations that take it."""
    first: dict[tuple[Sequence[int], bool], PlacedPart] = {}
    for part in parts:
        positions = part.place.index
        if not isinstance(positions, range):
            positions = tuple(positions)
        same = first.setdefault((positions, part.place.squeezed), part)
        if same.value != part.value:
            yield (part.op, same.op), part.value, same.value
            yield (part.op, same.op), same.value, part.value


def _write_part(patch: Patch) -> Callable[..., Tensor]:
    """Return the function that writes a part into a patched copy."""
    index_on = _index_on_device(patch.index)

    def solve(patched: Tensor, part: Tensor) -> Tensor:
        if patch.squeezed:
            part = part.unsqueeze(patch.dim)
        if isinstance(patch.index, range):
            return _scatter_slice(patched, part, patch.dim, patch.index)
        return patched.index_copy(patch.dim, index_on(patched), part)

    return solve


def _scatter_slice(whole: Tensor, part: Tensor, dim: int, at: range) -> Tensor:
    return torch.slice_scatter(whole, part, dim, at.start, at.stop, at.step)


def _take_part(place: Tile | Patch) -> Callable[..., Tensor]:
    """Return the function that takes a part out of its whole."""
    index_on, dim, at = _index_on_device(place.index), place.dim, place.index
    if not isinstance(at, range):
        return lambda y: y.index_select(dim, index_on(y))
    taken = at.start if place.squeezed else slice(at.start, at.stop, at.step)
    return lambda y: y[(*[slice(None)] * dim, taken)]


def _index_on_device(positions: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Return a function that makes `positions` an index on a tensor's device, once for each device."""
    make = functools.cache(lambda device: torch.tensor(positions, device=device))
    return lambda like: make(like.device) if is_real(like) else make.__wrapped__(like.device)


def _exact_cover(parts: Sequence[PlacedPart], size: int) -> list[PlacedPart]:
    """Return parts that together hold each of 0..size-1 once; an empty list if none do.

    Of several that fit, strided parts come first, then longer ones.
    """
    by_start: dict[int, list[PlacedPart]] = {}
    for part in parts:
        if len(part.place.index) > 0:
            by_start.setdefault(min(part.place.index), []).append(part)

    def preference(part: PlacedPart) -> tuple[bool, int]:
        positions = part.place.index
        return len(positions) <= max(positions) - min(positions), len(positions)

    chosen, left = list[PlacedPart](), set(range(size))
    while left:
        fits = [part for part in by_start.get(min(left), []) if left.issuperset(part.place.index)]
        if not fits:
            return []
        chosen.append(max(fits, key=preference))
        left.difference_update(chosen[-1].place.index)
    return chosen


def _assemble(shape: tuple[int, ...], dim: int, places: Sequence[Tile | Patch]) -> Callable[..., Tensor]:
    """Return the function that puts parts together.

    It writes nothing in place, since it is traced into compiled graphs as well.
    """
    positions, ranges, squeezed = list[int](), list[range](), list[bool]()
    for place in places:
        positions += place.index
        squeezed.append(place.squeezed)
        if isinstance(place.index, range):
            ranges.append(place.index)
    in_order = positions == sorted(positions)
    order = _index_on_device(sorted(range(len(positions)), key=positions.__getitem__))

    def solve(*tensors: Tensor) -> Tensor:
        parts = [t.unsqueeze(dim) if gone else t for t, gone in zip(tensors, squeezed, strict=True)]
        if in_order:
            return torch.cat(parts, dim)
        if len(ranges) < len(parts):
            whole = torch.cat(parts, dim)
            return whole.index_select(dim, order(whole))
        whole = parts[0].new_empty(shape)
        for part, at in zip(parts, ranges, strict=True):
            whole = _scatter_slice(whole, part, dim, at)
        return whole

    return solve

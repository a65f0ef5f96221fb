"""Inverse rules of operations that only compiled graphs spell out: slices, scatters and copies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from revfx.rules import Direction, Inverse, NoInverse, Patch, Tile, arguments, aten, meta, register_inverse
from revfx.rules.layout import part_of, reshaped, shape_of


@register_inverse(aten.slice.Tensor)
def slice_(node: fx.Node) -> Iterator[Direction]:
    """`y = a[..., start:end:step, ...]`, a part of a along one dimension."""
    a, dim, start, end, step = arguments(node, "input", dim=0, start=None, end=None, step=1)
    shape = shape_of(a)
    dim = dim % len(shape)
    index = range(shape[dim])[start:end:step]
    yield reshaped(a) if len(index) == shape[dim] else Tile(a, dim, index)


@register_inverse(aten.slice_scatter.default, aten.select_scatter.default)
def scatter(node: fx.Node) -> Iterator[Direction]:
    """`y = a with a[..., i, ...] = b`, for a slice or an index i; `b = y[..., i, ...]`, and y holds the rest of a."""
    squeezed = node.target is aten.select_scatter.default
    names = {"index": None} if squeezed else {"start": None, "end": None, "step": 1}
    a, b, dim, *at = arguments(node, "input", "src", dim=0, **names)
    shape = shape_of(a)
    dim = dim % len(shape)
    i: Any = at[0] % shape[dim] if squeezed else slice(*at)
    yield part_of(node, b, lambda y: y[(*[slice(None)] * dim, i)])
    yield Patch(a, dim, range(i, i + 1) if squeezed else range(shape[dim])[i], squeezed, part=b)


@register_inverse(aten.copy.default)
def copy(node: fx.Node) -> Iterator[Direction]:
    """`y = b`, written over a; `b = y`."""
    a, b = arguments(node, "input", "src")
    yield NoInverse(a, "it is overwritten")
    if meta(a).dtype != meta(b).dtype:
        yield NoInverse(b, f"the cast from {meta(b).dtype} to {meta(a).dtype} loses bits")
    elif meta(a).device != meta(b).device or shape_of(a) != shape_of(b):
        yield NoInverse(b, "`copy` repeats it or moves it to another device")
    else:
        yield Inverse(b, lambda y: y.clone(), exact=True)

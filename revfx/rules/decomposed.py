"""Inverse rules of operations that only compiled graphs spell out: slices, scatters, copies and decomposed indexing."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from revfx.rules import Direction, Inverse, NoInverse, Patch, Tile, arguments, aten, meta, register_inverse
from revfx.rules.layout import part_of, permuted


@register_inverse(aten.slice.Tensor)
def slice_(node: fx.Node) -> Iterator[Direction]:
    """`y = a[..., start:end:step, ...]`, a part of a along one dimension."""
    a, dim, start, end, step = arguments(node, "input", dim=0, start=None, end=None, step=1)
    shape = tuple(meta(a).shape)
    dim = dim % len(shape)
    index = range(shape[dim])[start:end:step]
    if len(index) == shape[dim]:
        yield Inverse(a, lambda y: y.reshape(shape), exact=True)
    else:
        yield Tile(a, dim, index)


@register_inverse(aten.slice_scatter.default)
def slice_scatter(node: fx.Node) -> Iterator[Direction]:
    """`y = a with a[start:end:step] = b`; `b = y[start:end:step]`, and y holds the rest of a."""
    a, b, dim, start, end, step = arguments(node, "input", "src", dim=0, start=None, end=None, step=1)
    index = range(meta(a).shape[dim])[start:end:step]
    yield part_of(node, b, lambda y: y[(*[slice(None)] * (dim % y.dim()), slice(start, end, step))])
    yield Patch(a, dim % meta(a).dim(), index, part=b)


@register_inverse(aten.select_scatter.default)
def select_scatter(node: fx.Node) -> Iterator[Direction]:
    """`y = a with a.select(dim, i) = b`; `b = y.select(dim, i)`, and y holds the rest of a."""
    a, b, dim, i = arguments(node, "input", "src", "dim", "index")
    i = i % meta(a).shape[dim]
    yield part_of(node, b, lambda y: y.select(dim, i))
    yield Patch(a, dim % meta(a).dim(), range(i, i + 1), squeezed=True, part=b)


@register_inverse(aten.copy.default)
def copy(node: fx.Node) -> Iterator[Direction]:
    """`y = b`, written over a; `b = y`."""
    a, b = arguments(node, "input", "src")
    yield NoInverse(a, "it is overwritten")
    if meta(a).dtype != meta(b).dtype:
        yield NoInverse(b, f"the cast from {meta(b).dtype} to {meta(a).dtype} loses bits")
    elif meta(a).device != meta(b).device or tuple(meta(a).shape) != tuple(meta(b).shape):
        yield NoInverse(b, "`copy` repeats it or moves it to another device")
    else:
        yield Inverse(b, lambda y: y.clone(), exact=True)


@register_inverse(aten.expand.default)
def expand(node: fx.Node) -> Iterator[Direction]:
    """`y = a.expand(shape)` that repeats nothing; `a = y.reshape(a.shape)`."""
    a = arguments(node, "input")[0]
    shape = tuple(meta(a).shape)
    if meta(a).numel() == meta(node).numel():
        yield Inverse(a, lambda y: y.reshape(shape), exact=True)
    else:
        yield NoInverse(a, "`expand` repeats it")


@register_inverse(aten.index.Tensor, aten._unsafe_index.Tensor)
def index(node: fx.Node) -> Iterator[Direction]:
    """`y = a[:, p]` for a permutation p; `a = y[:, argsort(p)]`."""
    a, indices = arguments(node, "input", "indices")
    real = [(d, i) for d, i in enumerate(indices) if i is not None]
    if len(real) == 1:
        yield from permuted(a, *real[0])
    else:
        yield NoInverse(a, "an index in more than one dimension is not followed")

"""Inverse rules of operations that only move elements; they return the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from revfx.errors import Reason
from revfx.rules import (
    Direction,
    Inverse,
    NoInverse,
    Patch,
    Tile,
    arguments,
    aten,
    fake_result,
    operands,
    register_inverse,
)


def shape_of(node: Any) -> tuple[int, ...]:
    return tuple(fake_result(node).shape)


@register_inverse(
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.clone.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.detach.default,
    aten.expand.default,
)
def reshape(node: fx.Node) -> Iterator[Direction]:
    """`y = a.view(shape)`; `a = y.view(a.shape)`: all elements, in the same order."""
    (a,) = arguments(node, "input")
    if fake_result(a).dtype != fake_result(node).dtype:
        yield NoInverse(a, "a view with another dtype is not followed", Reason.LAYOUT)
    elif node.target is aten.expand.default and fake_result(a).numel() != fake_result(node).numel():
        yield NoInverse(a, "`expand` repeats it", Reason.LAYOUT)
    else:
        yield _reshape_back(a)


def _reshape_back(a: Any) -> Direction:
    """Return the inverse of an operation that keeps all elements in their order."""
    shape = shape_of(a)
    return Inverse(a, lambda y: y.reshape(shape), exact=True)


@register_inverse(aten.permute.default)
def permute(node: fx.Node) -> Iterator[Direction]:
    """`y = a.permute(d)`; `a = y.permute(argsort(d))`."""
    a, *dims = operands(node)
    n = len(shape_of(a))
    if dims and isinstance(dims[0], (tuple, list)):
        dims = dims[0]
    back = sorted(range(n), key=lambda i: dims[i] % n)
    yield Inverse(a, lambda y: y.permute(back), exact=True)


@register_inverse(aten.transpose.int)
def transpose(node: fx.Node) -> Iterator[Direction]:
    """`y = a.transpose(i, j)`; `a = y.transpose(i, j)`."""
    a, i, j = operands(node)
    yield Inverse(a, lambda y: y.transpose(i, j), exact=True)


@register_inverse(aten.t.default)
def transpose_matrix(node: fx.Node) -> Iterator[Direction]:
    """`y = a.t()`; `a = y.t()`."""
    (a,) = arguments(node, "input")
    yield Inverse(a, lambda y: y.t(), exact=True)


@register_inverse(aten.flip.default, torch.ops.prims.rev.default)
def flip(node: fx.Node) -> Iterator[Direction]:
    """`y = a.flip(d)`; `a = y.flip(d)`."""
    a, *dims = operands(node)
    yield Inverse(a, lambda y: y.flip(*dims), exact=True)


@register_inverse(aten.roll.default)
def roll(node: fx.Node) -> Iterator[Direction]:
    """`y = a.roll(s, d)`; `a = y.roll(-s, d)`."""
    a, shifts, dims = arguments(node, "input", "shifts", dims=())
    if dims is None:
        dims = ()  # over the flattened tensor
    if not isinstance(shifts, (tuple, list)):
        shifts = [shifts]
    back = [-s for s in shifts]
    yield Inverse(a, lambda y: y.roll(back, dims), exact=True)


@register_inverse(aten.pixel_shuffle.default, aten.pixel_unshuffle.default)
def pixel_shuffle(node: fx.Node) -> Iterator[Direction]:
    """`y = pixel_shuffle(a, r)`; `a = pixel_unshuffle(y, r)`, and vice versa."""
    a, r = operands(node)
    back = F.pixel_shuffle if "unshuffle" in str(node.target) else F.pixel_unshuffle
    shape = shape_of(a)

    def by(y: Tensor) -> Tensor:
        if not y.numel():  # without elements, torch's two functions are not inverse in their shapes
            return y.reshape(shape)
        return back(y, r)

    yield Inverse(a, by, exact=True)


@register_inverse(aten.channel_shuffle.default, aten.native_channel_shuffle.default)
def channel_shuffle(node: fx.Node) -> Iterator[Direction]:
    """`y = channel_shuffle(a, g)`; `a = channel_shuffle(y, C/g)`."""
    a, groups = operands(node)
    back = shape_of(a)[1] // groups
    yield Inverse(a, lambda y: torch.channel_shuffle(y, back), exact=True)


@register_inverse(aten.copy.default)
def copy(node: fx.Node) -> Iterator[Direction]:
    """`y = b`, written over a; `b = y`."""
    a, b = arguments(node, "input", "src")
    yield NoInverse(a, "it is overwritten")
    x, y = fake_result(a), fake_result(b)
    if x.dtype != y.dtype:
        yield NoInverse(b, f"the cast from {y.dtype} to {x.dtype} loses bits", Reason.LOSES_BITS)
    elif x.device != y.device or shape_of(a) != shape_of(b):
        yield NoInverse(b, "`copy` repeats it or moves it to another device", Reason.LAYOUT)
    else:
        yield Inverse(b, lambda y: y.clone(), exact=True)


# --- a whole from its parts, and parts from their whole
@register_inverse(aten.cat.default)
def cat(node: fx.Node) -> Iterator[Direction]:
    """`y = cat([a, b, ...], d)`; each part is a slice of y."""
    for part, dim, start, size in joined(node):
        yield _solve_part(node, part, lambda y, dim=dim, start=start, size=size: y.narrow(dim, start, size))


def joined(node: fx.Node) -> Iterator[tuple[Any, int, int, int]]:
    """Yield the operands of `cat`: each with the dimension, its first index along it, and its size."""
    parts, dim, axis = arguments(node, "tensors", dim=0, axis=None)
    dim = (dim if axis is None else axis) % fake_result(node).dim()
    start = 0
    for part in parts:
        if len(shape_of(part)) == fake_result(node).dim():  # else it is an empty vector, which fits to any shape
            size = shape_of(part)[dim]
            yield part, dim, start, size
            start += size


def _solve_part(node: fx.Node, part: Any, by: Callable[..., Tensor], given: tuple[Any, ...] = ()) -> Direction:
    """Return the inverse for one of several tensors that are put together; there is none if its dtype changed.

    Args:
        node: the operation.
        part: the operand.
        by: the function that takes it out of the result.
        given: the operands that `by` takes as well.
    """
    if fake_result(part).dtype != fake_result(node).dtype:
        return NoInverse(
            part, f"it is turned into {fake_result(node).dtype} when it is put together with others", Reason.LOSES_BITS
        )
    return Inverse(part, by, given, exact=True)


@register_inverse(aten.stack.default)
def stack(node: fx.Node) -> Iterator[Direction]:
    """`y = stack([a, b, ...], d)`; each part is `y.select(d, i)`."""
    parts, dim = arguments(node, "tensors", dim=0)
    for i, part in enumerate(parts):
        yield _solve_part(node, part, lambda y, i=i: y.select(dim, i))


@register_inverse(aten.split.Tensor, aten.split_with_sizes.default)
def split(node: fx.Node) -> Iterator[Direction]:
    """`a_i = a[..., start_i:stop_i, ...]`: the parts of a split tile it along one dimension."""
    a, _, dim = arguments(node, "input", "sizes", dim=0)
    dim = dim % len(shape_of(a))
    start = 0
    for i, part in enumerate(node.meta["val"]):
        stop = start + part.shape[dim]
        yield Tile(a, dim, range(start, stop), part=i)
        start = stop


@register_inverse(aten.unbind.int)
def unbind(node: fx.Node) -> Iterator[Direction]:
    """`a_i = a.select(d, i)`."""
    a, dim = arguments(node, "input", dim=0)
    dim = dim % len(shape_of(a))
    for i in range(len(node.meta["val"])):
        yield Tile(a, dim, range(i, i + 1), part=i, squeezed=True)


@register_inverse(aten.select.int)
def select(node: fx.Node) -> Iterator[Direction]:
    """`y = a.select(dim, i)`."""
    a, dim, i = arguments(node, "input", "dim", "index")
    dim = dim % len(shape_of(a))
    i = i % shape_of(a)[dim]
    yield Tile(a, dim, range(i, i + 1), squeezed=True)


@register_inverse(aten.slice.Tensor)
def slice_(node: fx.Node) -> Iterator[Direction]:
    """`y = a[..., start:end:step, ...]`, a part of a along one dimension."""
    a, dim, start, end, step = arguments(node, "input", dim=0, start=None, end=None, step=1)
    shape = shape_of(a)
    dim = dim % len(shape)
    index = range(shape[dim])[start:end:step]
    if len(index) == shape[dim]:
        yield _reshape_back(a)
    else:
        yield Tile(a, dim, index)


@register_inverse(aten.slice_scatter.default)
def slice_scatter(node: fx.Node) -> Iterator[Direction]:
    """`y = a with a[..., start:end:step, ...] = b`; b is that slice of y, and y holds the rest of a."""
    a, b, dim, *bounds = arguments(node, "input", "src", dim=0, start=None, end=None, step=1)
    shape = shape_of(a)
    dim = dim % len(shape)
    index = slice(*bounds)
    yield _solve_part(node, b, lambda y: y[(*[slice(None)] * dim, index)])
    yield Patch(a, dim, range(shape[dim])[index], part=b)


@register_inverse(aten.select_scatter.default)
def select_scatter(node: fx.Node) -> Iterator[Direction]:
    """`y = a with a[..., i, ...] = b`; `b = y[..., i, ...]`, and y holds the rest of a."""
    a, b, dim, i = arguments(node, "input", "src", "dim", "index")
    shape = shape_of(a)
    dim = dim % len(shape)
    i = i % shape[dim]
    yield _solve_part(node, b, lambda y: y.select(dim, i))
    yield Patch(a, dim, range(i, i + 1), squeezed=True, part=b)


@register_inverse(aten.index.Tensor, aten._unsafe_index.Tensor)
def getitem(node: fx.Node) -> Iterator[Direction]:
    """`y = a[:, p]` for a permutation p, or a part of a along one dimension."""
    a, index = arguments(node, "input", "index")
    indexed = _indexed_dimensions(index)
    if len(indexed) == 1:
        yield from _solve_indexed(a, *indexed[0])
    else:
        yield NoInverse(a, SEVERAL_DIMENSIONS, Reason.LAYOUT)


SEVERAL_DIMENSIONS = "parts along more than one dimension are not put together again"


def _indexed_dimensions(index: Sequence[Any]) -> list[tuple[int, Any]]:
    """Return the dimensions that are indexed, each with its index."""
    return [(dim, i) for dim, i in enumerate(index) if i is not None]


@register_inverse(aten.index_put.default)
def put_at(node: fx.Node) -> Iterator[Direction]:
    """`y = a with a[..., i, ...] = b`; `b = y[..., i, ...]`, and y holds the rest of a."""
    a, index, b, accumulate = arguments(node, "input", "index", "other", accumulate=False)
    indexed = _indexed_dimensions(index)
    if accumulate or len(indexed) != 1:
        yield NoInverse(a, "it is added to" if accumulate else SEVERAL_DIMENSIONS, Reason.LAYOUT)
        return
    dim, i = indexed[0]
    positions = _index_positions(i, shape_of(a)[dim])
    if positions is None:
        yield NoInverse(a, "it is overwritten")
        return
    part = None
    if isinstance(b, fx.Node) and shape_of(b) == (*shape_of(a)[:dim], len(positions), *shape_of(a)[dim + 1 :]):
        yield _solve_part(node, b, lambda y, p: y[(*[slice(None)] * dim, p)], (i,))
        if fake_result(b).dtype == fake_result(a).dtype:
            part = b
    yield Patch(a, dim, positions, part=part)


@register_inverse(aten.index_select.default)
def index_select(node: fx.Node) -> Iterator[Direction]:
    """`y = a.index_select(d, p)` for a permutation p; `a = y.index_select(d, argsort(p))`."""
    a, dim, index = arguments(node, "input", "dim", "index")
    if shape_of(a):
        yield from _solve_indexed(a, dim % len(shape_of(a)), index)
    else:
        yield NoInverse(a, "a value without dimensions is not followed through an index", Reason.LAYOUT)


def _index_positions(index: Any, size: int) -> Sequence[int] | None:
    """Return the positions that a constant index selects; None if it is unknown, or selects a position twice."""
    values = index.meta.get("constant") if isinstance(index, fx.Node) else torch.as_tensor(index)
    if values is None or values.dim() != 1:
        return None
    numbers = values.tolist()  # plain Python from here, as fake tensors may be active
    if values.dtype == torch.bool:
        positions = [i for i, is_selected in enumerate(numbers) if is_selected]
    else:
        positions = [i % size for i in numbers]
    return positions if len(set(positions)) == len(positions) else None


def _solve_indexed(a: fx.Node, dim: int, index: Any) -> Iterator[Direction]:
    """Yield the inverse of indexing `a` along `dim`.

    The index has to be a constant, or known to be a permutation. A plan that uses the inverse must guard both.
    """
    size = shape_of(a)[dim]
    if isinstance(index, fx.Node) and "permutation" in index.meta.get("facts", ()) and shape_of(index) == (size,):
        yield Inverse(a, lambda y, p: y.index_select(dim, torch.argsort(p)), (index,), exact=True)
        return
    if isinstance(index, fx.Node) and index.meta.get("constant") is None:
        yield NoInverse(a, "the index is not a constant, so it can't be known to be a permutation", Reason.LAYOUT)
        return
    positions = _index_positions(index, size)
    if positions is None:
        yield NoInverse(a, "the index takes a position twice, or has more than one dimension", Reason.LAYOUT)
    elif len(positions) < size or not isinstance(index, fx.Node):
        yield Tile(a, dim, positions)
    else:
        yield Inverse(a, lambda y, p: y.index_select(dim, torch.argsort(p % size)), (index,), exact=True)

"""Draws of operands for rules that move elements, and the table of all draws by operation."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from rules_samples import (
    ANY,
    Draw,
    Sample,
    Strategy,
    between,
    cast,
    chosen,
    linear,
    named,
    overload,
    product,
    quotient,
    shapes,
    signed,
    tensor,
    with_product,
)  # fmt: skip
from torch import nn


ALL, NONE = frozenset({0}), frozenset[int]()


def some(draw: Draw, least: int = 1, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    """A tensor of any dtype."""
    return tensor(draw, shapes(draw, least) if shape is None else shape, draw(st.sampled_from(ANY)))


def dim_of(draw: Draw, t: torch.Tensor) -> int:
    """One of its dimensions, counted from either end."""
    return draw(st.integers(-t.dim(), t.dim() - 1))


def as_it_is(draw: Draw, op: object) -> Sample:
    """Operations without arguments; `t` takes two dimensions at the most."""
    least, most = (0, 2) if named(op) == "t" else (1, 3)
    return Sample((some(draw, shape=shapes(draw, least, most)),), ALL)


def viewed(draw: Draw, op: object) -> Sample:
    """Other shapes of as many elements, contiguous ones as `view` asks for; also other dtypes."""
    name = named(op)
    a = some(draw, 2).contiguous()
    if name in ("flatten", "unflatten", "Unflatten"):
        if name == "flatten":
            return Sample((a, draw(st.sampled_from([0, 1])), -1), ALL)
        return Sample((a, 0, (1, a.shape[0])), ALL) if name == "unflatten" else Sample((a,), ALL)
    if name in ("view_as", "reshape_as"):
        return Sample((a, torch.zeros(a.numel())), ALL)
    if name == "view" and isinstance(op, str) and draw(st.integers(0, 4)) == 0:
        to = draw(st.sampled_from([torch.int64, torch.float64]))
        a = tensor(draw, (3, 2), torch.float64).contiguous()
        return Sample((a, to), ALL if to == a.dtype else NONE)
    shape = [*reversed(a.shape)] if draw(st.booleans()) else [a.numel()]
    return Sample((a, shape), ALL)


def squeezed(draw: Draw, op: object) -> Sample:
    """`squeeze` of dimensions of any size, and `unsqueeze`."""
    a = some(draw)
    kind = overload(op)
    if named(op) == "unsqueeze":
        return Sample((a, draw(st.integers(-a.dim() - 1, a.dim()))), ALL)
    if kind == "default" or (not kind and draw(st.booleans())):
        return Sample((a,), ALL)
    return Sample((a, [dim_of(draw, a)] if kind == "dims" else dim_of(draw, a)), ALL)


def turned(draw: Draw, op: object) -> Sample:
    """`permute`, `transpose` and their other names, `movedim`, `flip`, `roll`, `T`."""
    name = named(op)
    a = some(draw, 2)
    dims = draw(st.permutations(range(a.dim())))
    dims = [d - a.dim() if draw(st.booleans()) else d for d in dims]
    if name == "permute":
        return Sample((a, dims), ALL)
    if name == "getattr":
        attribute = draw(st.sampled_from(["mT", "T", "real", "data"] if a.dim() == 2 else ["mT"]))
        return Sample((a, attribute), ALL if attribute in ("T", "mT") else NONE)
    if name in ("flip", "rev"):
        chosen_dims = dims[: draw(st.integers(0, len(dims)))]
        return Sample((a, [d % a.dim() for d in chosen_dims] if name == "rev" else chosen_dims), ALL)
    if name == "roll":
        if draw(st.booleans()):
            return Sample((a, [draw(st.integers(-5, 5))]), ALL)
        twice = [dims[0]] * 2 if draw(st.booleans()) else dims[:2]
        return Sample((a, [draw(st.integers(-5, 5)), 1], twice), ALL)
    if name in ("movedim", "moveaxis"):
        many = draw(st.booleans())
        return Sample((a, dims[:2], [d % a.dim() for d in reversed(dims[:2])]) if many else (a, dims[0], dims[1]), ALL)
    return Sample((a, dims[0], draw(st.sampled_from(dims))), ALL)


def shuffled(draw: Draw, op: object) -> Sample:
    """`pixel_shuffle`, its inverse, and `channel_shuffle`."""
    name, n = named(op), draw(st.sampled_from([0, 1, 2]))
    shape = {"pixel_shuffle": (n, 8, 3, 2), "pixel_unshuffle": (n, 2, 4, 6)}.get(name, (n + 1, 6, 3))
    a = tensor(draw, shape)
    return Sample((a, 3 if "channel" in name and draw(st.booleans()) else 2), ALL)


def joined(draw: Draw, op: object) -> Sample:
    """`cat` and `stack`: of several dtypes, of one tensor twice, of nothing."""
    shape = shapes(draw, 1)
    dtypes = [draw(st.sampled_from(ANY)) for _ in range(draw(st.integers(1, 3)))]
    if draw(st.booleans()):
        dtypes = dtypes[:1] * len(dtypes)
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    parts: list[torch.Tensor] = []
    for dtype in dtypes:
        size = list(shape)
        if named(op) != "stack":
            size[dim] = draw(st.integers(0, 3))
        parts.append(parts[0] if parts and draw(st.integers(0, 5)) == 0 else tensor(draw, tuple(size), dtype))
    made = torch.result_type(parts[0], parts[0])
    for p in parts:
        made = torch.promote_types(made, p.dtype)
    unique = list({id(p): p for p in parts}.values())
    return Sample((parts, dim), frozenset(i for i, p in enumerate(unique) if p.dtype == made))


def apart(draw: Draw, op: object) -> Sample:
    """`chunk`, `split`, `tensor_split`, `unbind`: in places that may overlap or leave gaps."""
    name, a = named(op), some(draw)
    dim = dim_of(draw, a)
    n = a.shape[dim]
    if name == "unbind":
        return Sample((a, dim), ALL)
    if name == "tensor_split" and draw(st.booleans()):
        at = draw(st.lists(st.integers(-n - 1, n + 1), min_size=1, max_size=3))
        parts = [i for start, stop in zip([None, *at], [*at, None], strict=True) for i in range(n)[start:stop]]
        return Sample((a, at, dim), ALL if {*parts} == {*range(n)} else NONE)  # some may do
    if name == "split_with_sizes" or (name == "split" and not overload(op) and draw(st.booleans())):
        first = draw(st.integers(0, n))
        return Sample((a, [first, n - first], dim), ALL)
    return Sample((a, draw(st.integers(1, 4)), dim), ALL)


def part(draw: Draw, op: object) -> Sample:
    """`narrow`, `select`, `slice`: all of a dimension, or not."""
    a = some(draw, shape=tuple(max(1, n) for n in shapes(draw, 1)))
    dim, name = dim_of(draw, a), named(op)
    n = a.shape[dim]
    if name == "select":
        return Sample((a, dim, draw(st.integers(-n, n - 1))), ALL if n == 1 else NONE)
    start = draw(st.integers(-n, n - 1))
    if name == "narrow":
        length = draw(st.integers(0, n - start % n))
        return Sample((a, dim, start, length), ALL if length == n else NONE)
    stop, step = draw(st.integers(-n, n + 2)), draw(st.sampled_from([1, 1, 2]))
    return Sample((a, dim, start, stop, step), ALL if len(range(n)[start:stop:step]) == n else NONE)


def indexed(draw: Draw, op: object) -> Sample:
    """Indexing by a tensor that is a buffer: a permutation, or one that repeats or leaves out; and by slices."""
    a = some(draw, shape=tuple(max(1, n) for n in shapes(draw, 1)))
    dim, name = dim_of(draw, a), named(op)
    n = a.shape[dim]
    at = torch.tensor(draw(st.permutations(range(n)) | st.lists(st.integers(-n, n - 1), min_size=1, max_size=5)))
    before = [slice(None)] * (dim % a.dim())
    if name == "getitem" and draw(st.integers(0, 2)) == 0:
        i = draw(st.sampled_from([slice(0, 2), slice(None, None, 2), 0, -1, ..., None, True, [0]]))
        whole = isinstance(i, slice) and len(range(n)[i]) == n
        full = i is ... or i is None or whole or (n == 1 and type(i) is int and i in (0, -1))
        return Sample((a, (*before, i)), ALL if full and not isinstance(i, list) else NONE)
    solved = ALL if sorted(i % n for i in at.tolist()) == list(range(n)) else NONE
    if name == "getitem":
        return Sample((a, (*before, at)), solved, constants=frozenset({1}))
    index: tuple[Any, ...] = ([*([None] * len(before)), at],) if "index_select" not in name else (dim, at)
    return Sample((a, *index), solved, constants=frozenset({1}))


def written(draw: Draw, op: object) -> Sample:
    """`slice_scatter` and `select_scatter` into part of a tensor, also of another dtype; `copy` over all of it."""
    name = named(op)
    a = tensor(draw, (3, 4), torch.float64)
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    solved = frozenset({1} if dtype == a.dtype else ())
    if name == "copy":
        b = tensor(draw, draw(st.sampled_from([(3, 4), (1, 4)])), dtype)
        return Sample((a, b), solved if b.shape == a.shape else NONE)
    if name == "index_put":
        index, added = draw(st.lists(st.integers(-4, 3), min_size=1, max_size=4)), draw(st.booleans())
        once = not added and len({i % 4 for i in index}) == len(index)
        args = a, [None, torch.tensor(index)], tensor(draw, (3, len(index)), dtype), added
        return Sample(args, frozenset({1} if once else ()), constants=frozenset({1}))
    if name == "select_scatter":
        return Sample((a, tensor(draw, (3,), dtype), -1, draw(st.integers(-4, 3))), solved)
    start, step = draw(st.integers(0, 3)), draw(st.sampled_from([1, 2]))
    return Sample((a, tensor(draw, (3, len(range(start, 4, step))), dtype), 1, start, 4, step), solved)


def expanded(draw: Draw, op: object) -> Sample:
    """`expand` that repeats, or only puts dimensions of size 1 in front."""
    a = some(draw)
    times = draw(st.sampled_from([1, 1, 3]))
    repeated = times != 1 and math.prod(a.shape) > 0
    return Sample((a, [times, *a.shape]), NONE if repeated else ALL)


STRATEGIES: dict[str, Strategy] = {
    **dict.fromkeys(("add", "sub", "subtract", "rsub"), linear),
    **dict.fromkeys(("mul", "multiply"), product),
    **dict.fromkeys(("div", "divide", "true_divide", "truediv"), quotient),
    **dict.fromkeys(("addcmul", "addcdiv"), with_product),
    **dict.fromkeys(("to", "float", "double", "half", "bfloat16", "type", "type_as", "cpu", "to_copy",
                     "convert_element_type"), cast),
    **dict.fromkeys(("neg", "negative"), signed),
    "lerp": between, "where": chosen,
    **dict.fromkeys(("ravel", "clone", "contiguous", "Identity", "Flatten", "alias", "detach", "lift_fresh_copy", "t"),
                    as_it_is),
    **dict.fromkeys(("reshape", "view", "view_as", "reshape_as", "flatten", "unflatten", "unsafe_view"), viewed),
    **dict.fromkeys(("squeeze", "unsqueeze"), squeezed),
    **dict.fromkeys(("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "flip", "rev", "roll",
                     "getattr"), turned),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle"), shuffled),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), joined),
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "tensor_split", "unbind"), apart),
    **dict.fromkeys(("narrow", "select", "slice"), part),
    **dict.fromkeys(("getitem", "index_select", "index", "unsafe_index"), indexed),
    **dict.fromkeys(("slice_scatter", "select_scatter", "copy", "index_put"), written),
    "expand": expanded,
}  # fmt: skip
ELSEWHERE: dict[object, str] = {"cuda": "the rule of `to`", nn.Unflatten: "in test_rules.py: it has arguments"}

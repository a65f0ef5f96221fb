"""What every rule of the table is tried on: draws of operands, and which of them the result determines.

A sample says by itself, from the operands alone, which of them can be solved for. It shares no code with the rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from revfx.rules import op_name


FLOATS = (torch.float64, torch.float32, torch.bfloat16)
ANY = (*FLOATS, torch.int64, torch.int8, torch.bool)


@dataclass(frozen=True)
class Sample:
    """Arguments of an operation, and the places of the tensors among them (flattened) that it can be solved for."""

    args: tuple[Any, ...]
    solved: frozenset[int]
    kwargs: dict[str, Any] = field(default_factory=dict)
    amplification: float = 1.0
    constants: frozenset[int] = frozenset()  # places of those that are buffers of the model


Draw = Callable[[st.SearchStrategy[Any]], Any]
Strategy = Callable[[Draw, object], Sample]


# --- operands
def tensor(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """A tensor that is contiguous, transposed, a part of a larger one, or one row that is repeated."""
    size = [*shape]
    layout = draw(st.sampled_from(["contiguous", "transposed", "part", "repeated"]))
    if layout == "part" and size:
        size[-1] = 2 * size[-1] + 1
    if layout == "repeated" and size and size[0]:
        size[0] = 1
    if layout == "transposed":
        size.reverse()
    made = _numbers(draw, tuple(size), dtype)
    if layout == "transposed":
        return made.permute(*reversed(range(made.dim()))) if size else made
    if layout == "part" and size:
        return made[..., 1::2]
    return made.expand(shape)


def _numbers(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    low, high = (0, 2) if dtype == torch.bool else (-3, 4)
    return torch.randint(low, high, shape, generator=generator).to(dtype)


def shapes(draw: Draw, least: int = 0, most: int = 3) -> tuple[int, ...]:
    """Up to three dimensions, of sizes 0 and 1 as well."""
    return tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 4]), min_size=least, max_size=most)))


def narrowed(draw: Draw, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that can be broadcast to `shape`."""
    cut = shape[draw(st.integers(0, len(shape))) :] if draw(st.integers(0, 3)) == 0 else shape
    return tuple(1 if draw(st.integers(0, 5)) == 0 else n for n in cut)


def numbers(draw: Draw) -> Any:
    """A number of any kind, of either sign; also 0, and some that are not finite or that some dtypes don't hold."""
    return draw(
        st.sampled_from([2, -3, 0.25, -1.7, True, 1, 1.0, -1, 0, 0.0, False, math.inf, math.nan, 1e-60, 1e60])
        | st.floats(0.1, 4.0)
    )


def usable(number: Any, dtype: torch.dtype) -> bool:
    """Whether multiplying by it can be undone in that dtype."""
    info = torch.finfo(dtype)
    return info.tiny <= abs(number) <= info.max


def determined(y: Tensor, operand: Any) -> bool:
    """Whether an elementwise operation keeps an operand's shape and dtype."""
    floating = isinstance(operand, Tensor) and operand.is_floating_point()
    return floating and operand.dtype == y.dtype and operand.shape == y.shape


def grown(*numbers: Any) -> float:
    return max([1.0, *(1 / abs(n) for n in numbers if n and math.isfinite(n))])


# --- arithmetic
def overload(op: object) -> str:
    """`Tensor` of `aten.add.Tensor`; nothing of a function or method."""
    return str(op).rpartition(".")[2] if type(op).__name__ == "OpOverload" else ""


def named(op: object) -> str:
    """The name without what tells spellings apart: `add` of `__iadd__`."""
    name = op_name(op).strip("_")
    return name[1:] if name in ("iadd", "radd", "isub", "imul", "rmul") else name


def takes_keywords(op: object) -> bool:
    """Whether an operation has a further argument: operators don't."""
    return not (op.startswith("__") if isinstance(op, str) else type(op).__module__ == "builtins" and _operator(op))


def _operator(op: object) -> bool:
    return getattr(op, "__module__", "") == "_operator"


def two(draw: Draw, op: object, dtypes: tuple[torch.dtype, ...] = (*FLOATS, torch.int64)) -> tuple[Tensor, Any]:
    """Two operands, the second of which may be a number, or the first one again."""
    shape = shapes(draw)
    mine = draw(st.sampled_from(dtypes))
    other = mine if draw(st.integers(0, 2)) else draw(st.sampled_from(dtypes))
    a = tensor(draw, narrowed(draw, shape), mine)
    kind = overload(op)
    if kind.startswith("Scalar") or (not kind and draw(st.integers(0, 2)) == 0):
        return a, numbers(draw)
    return a, a if draw(st.integers(0, 9)) == 0 else tensor(draw, narrowed(draw, shape), other)


def linear(draw: Draw, op: object) -> Sample:
    """`add`, `sub` and `rsub`, also with `alpha`."""
    a, b = two(draw, op)
    if named(op) != "add" and isinstance(b, bool):
        b = 3
    alpha = draw(st.sampled_from([1, 2, -3, 0, 0.5, -1.5])) if takes_keywords(op) and draw(st.booleans()) else 1
    y = a + b
    scaled = 0 if named(op) == "rsub" else 1
    solved = {i for i, x in enumerate((a, b)) if determined(y, x) and a is not b and (alpha or i != scaled)}
    return Sample((a, b), frozenset(solved), {"alpha": alpha} if alpha != 1 else {}, grown(alpha))


def product(draw: Draw, op: object) -> Sample:
    """A product by a number, or by a factor that nothing bounds."""
    a, b = two(draw, op)
    solved = not isinstance(b, Tensor) and determined(a * b, a) and usable(b, a.dtype)
    return Sample((a, b), frozenset({0} if solved else ()), {}, 1.0 if isinstance(b, Tensor) else grown(b))


def quotient(draw: Draw, op: object) -> Sample:
    """A quotient, also with `rounding_mode`."""
    a, b = two(draw, op)
    if isinstance(b, Tensor) and b is not a:
        b = torch.where(b.abs() < 0.1, torch.ones((), dtype=b.dtype), b)
    with_mode = "mode" in overload(op) or (named(op) in ("div", "divide") and not overload(op))
    mode = draw(st.sampled_from([None, None, None, "floor", "trunc"])) if with_mode else None
    if mode and not isinstance(b, Tensor):
        b = 2
    solved = mode is None and determined(torch.true_divide(a, b), a) and a is not b
    if solved and not isinstance(b, Tensor):
        solved = bool(b) and usable(1 / b, a.dtype)
    by = 64.0 if isinstance(b, Tensor) else max(1.0, abs(b)) if b == b else 1.0
    return Sample((a, b), frozenset({0} if solved else ()), {"rounding_mode": mode} if with_mode else {}, by)


def with_product(draw: Draw, op: object) -> Sample:
    """`a + value*b*c` and `a + value*b/c`."""
    shape, dtype = shapes(draw), draw(st.sampled_from(FLOATS))
    other = dtype if draw(st.integers(0, 3)) else draw(st.sampled_from(FLOATS))
    a, b, c = (tensor(draw, narrowed(draw, shape), d) for d in (dtype, other, other))
    c = torch.where(c.abs() < 0.1, torch.ones((), dtype=c.dtype), c)
    b = a if draw(st.integers(0, 9)) == 0 else b
    value = draw(st.sampled_from([1, 2, -0.5, 0, True]))
    solved = determined(a + b * c, a) and b is not a
    return Sample((a, b, c), frozenset({0} if solved else ()), {"value": value}, 64.0)


def between(draw: Draw, op: object) -> Sample:
    """`lerp` by a number, or by a tensor."""
    shape, dtype = shapes(draw), draw(st.sampled_from((torch.float64, torch.float32)))
    a, b = (tensor(draw, narrowed(draw, shape), dtype) for _ in range(2))
    b = a if draw(st.integers(0, 9)) == 0 else b
    weight = draw(st.sampled_from([0, 1, 0.0, 1.0, 0.3, -0.5, 2, 0.75]))
    if overload(op) == "Tensor" or (not overload(op) and draw(st.integers(0, 3)) == 0):
        return Sample((a, b, torch.full((), 0.3, dtype=dtype)), frozenset())
    scales = ((a, 1 - weight), (b, weight))
    solved = {i for i, (x, w) in enumerate(scales) if determined(a + b, x) and w and a is not b}
    return Sample((a, b, weight), frozenset(solved), {}, 4 * grown(weight, 1 - weight))


def chosen(draw: Draw, op: object) -> Sample:
    """`where`, whose halves are put together elsewhere: neither half gives an operand by itself."""
    shape = shapes(draw)
    a, b = (tensor(draw, shape) for _ in range(2))
    mask = tensor(draw, shape, torch.bool)
    return Sample((a, mask, b) if isinstance(op, str) else (mask, a, b), frozenset())


# --- one operand
def signed(draw: Draw, op: object) -> Sample:
    """Any tensor whose dtype has a sign; of whole numbers also the one whose negative wraps around."""
    a = tensor(draw, shapes(draw), draw(st.sampled_from([*FLOATS, torch.int8, torch.int64])))
    return Sample((a.clone().fill_(-128) if a.dtype == torch.int8 and draw(st.booleans()) else a,), frozenset({0}))


WIDER = {
    torch.float16: (torch.float16, *FLOATS[:2]),
    torch.bfloat16: FLOATS,
    torch.float32: FLOATS[:2],
    torch.float64: FLOATS[:1],
}
CASTS = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}


def cast(draw: Draw, op: object) -> Sample:
    """A cast, to a dtype that may hold less; `cpu` keeps it."""
    a = tensor(draw, shapes(draw), draw(st.sampled_from([torch.float16, *ANY])))
    name = named(op)
    to = CASTS.get(name) or (a.dtype if name == "cpu" else draw(st.sampled_from(ANY)))
    solved = frozenset({0} if to in WIDER.get(a.dtype, ()) else ())
    if name == "type_as":
        return Sample((a, torch.zeros(1, dtype=to)), solved)
    if name == "to_copy":
        return Sample((a,), solved, {"dtype": to})
    return Sample((a, to) if name in ("to", "type", "convert_element_type") else (a,), solved)

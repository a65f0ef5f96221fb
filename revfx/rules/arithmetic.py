"""Inverse rules of arithmetic and of casts: sums, products, and single operations of both."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from revfx.errors import Reason
from revfx.rules import (
    Direction,
    Inverse,
    Masked,
    NoInverse,
    Scalar,
    arguments,
    aten,
    fake_result,
    nothing,
    register_inverse,
)


def scaled(value: Any, alpha: float, dtype: torch.dtype | None = None) -> Any:
    """Return `alpha * value` as something to subtract (no truth values), without a copy where alpha is 1.

    It is multiplied in `dtype`, that of the result: in a narrower one the product would be rounded.
    """
    if dtype is not None and alpha != 1 and isinstance(value, Tensor):
        value = value.to(dtype)
    truth = value.dtype == torch.bool if isinstance(value, Tensor) else isinstance(value, bool)
    return value if alpha == 1 and not truth else alpha * value


def _is_plain_term(value: Any, alpha: float) -> bool:
    """Return whether a term of a sum is a tensor of numbers, taken once."""
    result = fake_result(value) if isinstance(value, fx.Node) and alpha == 1 else None
    return isinstance(result, Tensor) and result.dtype != torch.bool


# --- arithmetic: y = a + alpha*b and its relatives
# `alpha=` and `value=` take a tensor of no dimensions as well, and so does the old order `torch.add(a, alpha, b)`.
SCALED = "a tensor stands where a number scales an operand"


@register_inverse(aten.add.Tensor, aten.add.Scalar)
def add(node: fx.Node) -> Iterator[Direction]:
    """`y = a + alpha*b`; `a = y - alpha*b`, `b = (y - a)/alpha`."""
    a, b, alpha = arguments(node, "input", "other", alpha=1)
    if isinstance(alpha, fx.Node):
        yield from (NoInverse(operand, SCALED, Reason.ZERO_FACTOR) for operand in (a, b))
        return
    by = operator.sub if _is_plain_term(b, alpha) else lambda y, b: y - scaled(b, alpha, y.dtype)
    yield Inverse(a, by, (b,), rest=lambda b: scaled(b, alpha))
    by = operator.sub if _is_plain_term(a, alpha) else lambda y, a: y - a if alpha == 1 else (y - a) / alpha
    yield Inverse(b, by, (a,), factor=alpha, rest=lambda a: a)


@register_inverse(aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Tensor, aten.rsub.Scalar)
def sub(node: fx.Node) -> Iterator[Direction]:
    """`y = a - alpha*b`, of `rsub` for its operands the other way round; `a = y + alpha*b`, `b = (a - y)/alpha`."""
    a, b, alpha = arguments(node, "input", "other", alpha=1)
    a, b = (b, a) if "rsub" in str(node.target) else (a, b)
    if isinstance(alpha, fx.Node):
        yield from (NoInverse(operand, SCALED, Reason.ZERO_FACTOR) for operand in (a, b))
        return
    by = operator.add if _is_plain_term(b, alpha) else lambda y, b: y + scaled(b, alpha, y.dtype)
    yield Inverse(a, by, (b,), rest=lambda b: scaled(b, -alpha))
    yield Inverse(b, lambda y, a: a - y if alpha == 1 else (a - y) / alpha, (a,), factor=-alpha, rest=lambda a: a)


@register_inverse(aten.neg.default)
def neg(node: fx.Node) -> Iterator[Direction]:
    """`y = -a`; `a = -y`."""
    (a,) = arguments(node, "input")
    yield Inverse(a, lambda y: -y, exact=True, factor=-1, rest=nothing)


@register_inverse(aten.mul.Tensor, aten.mul.Scalar)
def mul(node: fx.Node) -> Iterator[Direction]:
    """`y = a*b`; `a = y/b`, `b = y/a`, each where the other factor is bounded away from zero."""
    a, b = arguments(node, "input", "other")
    yield Inverse(a, lambda y, b: y / b, (b,), factor=b, rest=nothing)
    yield Inverse(b, lambda y, a: y / a, (a,), factor=a, rest=nothing)


@register_inverse(aten.div.Tensor, aten.div.Scalar, aten.div.Tensor_mode, aten.div.Scalar_mode)
def div(node: fx.Node) -> Iterator[Direction]:
    """`y = a/b`; `a = y*b`, `b = a/y`."""
    a, b, rounding = arguments(node, "input", "other", rounding_mode=None)
    if rounding is not None:
        yield NoInverse(a, f"division with rounding_mode={rounding!r} loses the remainder")
        return
    yield Inverse(a, lambda y, b: y * b, (b,), factor=b, reciprocal=True, rest=nothing)
    yield Inverse(b, lambda y, a: a / y, (a,), coded=True)


@register_inverse(aten.addcmul.default, aten.addcdiv.default)
def add_product(node: fx.Node) -> Iterator[Direction]:
    """`y = a + value*b*c` or `y = a + value*b/c`; `a` is y less the same."""
    a, b, c, value = arguments(node, "input", "tensor1", "tensor2", value=1)
    if isinstance(value, fx.Node):
        yield NoInverse(a, SCALED, Reason.ZERO_FACTOR)
        return
    divides = "addcdiv" in str(node.target)
    add, product = (torch.addcdiv, operator.truediv) if divides else (torch.addcmul, operator.mul)
    by, rest = lambda y, b, c: add(y, b, c, value=-value), lambda b, c: scaled(product(b, c), value)
    yield Inverse(a, by, (b, c), rest=rest)


@register_inverse(aten.lerp.Scalar, aten.lerp.Tensor)
def lerp(node: fx.Node) -> Iterator[Direction]:
    """`y = (1-w)*a + w*b` for a number w; `a = (y - w*b)/(1-w)`, `b = (y - (1-w)*a)/w`."""
    a, b, w = arguments(node, "input", "end", "weight")
    if not isinstance(w, Scalar) or isinstance(w, bool):
        why = "lerp with a tensor weight is not bounded away from zero"
        yield from (NoInverse(operand, why, Reason.ZERO_FACTOR) for operand in (a, b))
        return
    yield Inverse(a, lambda y, b: (y - w * b) / (1 - w), (b,), factor=1 - w, rest=lambda b: w * b)
    yield Inverse(b, lambda y, a: (y - (1 - w) * a) / w, (a,), factor=w, rest=lambda a: (1 - w) * a)


@register_inverse(aten.where.self)
def select_by_mask(node: fx.Node) -> Iterator[Direction]:
    """`y = where(m, a, b)`: a where m holds, b elsewhere; the unselected elements of either are not in y."""
    if len(node.args) != 3:
        return
    mask, a, b = node.args
    yield NoInverse(a, "`where` drops the elements that its mask does not select")
    yield NoInverse(b, "`where` drops the elements that its mask selects")
    yield Masked(a, mask, True, b)
    yield Masked(b, mask, False, a)


# --- casts
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@register_inverse(aten._to_copy.default, torch.ops.prims.convert_element_type.default)
def cast(node: fx.Node) -> Iterator[Direction]:
    """`y = a.to(wider)`; `a = y.to(a.dtype)`, exactly; a narrowing cast loses bits, which a code may hold."""
    (a,) = arguments(node, "input")
    before, after = fake_result(a), fake_result(node)
    floats = before.dtype in FLOATS and after.dtype in FLOATS
    if floats and torch.promote_types(before.dtype, after.dtype) == after.dtype:
        moved = before.device != after.device
        yield Inverse(a, lambda y: y.to(before.device, before.dtype) if moved else y.to(before.dtype), exact=True)
    elif floats and before.device == after.device:
        yield Inverse(a, lambda y: y.to(before.dtype), coded=True)
    else:
        yield NoInverse(a, f"the cast from {before.dtype} to {after.dtype} loses bits", Reason.LOSES_BITS)

"""Inverse rules of arithmetic and of casts: sums, products, and single operations of both."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
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
    register_inverse,
    zero,
)


def _scale(value: Any, alpha: float, dtype: torch.dtype | None = None) -> Any:
    """Return `alpha * value`; `value` itself if alpha is 1, but never a bool, which can't be subtracted.

    Args:
        value: a tensor or a number.
        alpha: its factor.
        dtype: of the multiplication; in a narrower one than the result's the product would be rounded.
    """
    is_bool = isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool)
    if alpha == 1 and not is_bool:
        return value
    if dtype is not None and alpha != 1 and isinstance(value, Tensor):
        value = value.to(dtype)
    return alpha * value


def _is_plain_term(value: Any, alpha: float) -> bool:
    """Return whether a term of a sum is a tensor of numbers with the factor 1."""
    if not isinstance(value, fx.Node) or alpha != 1:
        return False
    result: Any = fake_result(value)  # a number, if it is an item of a tensor
    return isinstance(result, Tensor) and result.dtype != torch.bool


def _with_term(op: Callable[..., Any], term: Any, alpha: float) -> Callable[..., Any]:
    """Return the function of y and the term that computes `op(y, alpha * term)`; codecs know plain `op`s."""
    if _is_plain_term(term, alpha):
        return op
    return lambda y, value: op(y, _scale(value, alpha, y.dtype))


def _without_term(term: Any, alpha: float) -> Callable[..., Any]:
    """Return the function of `y = term + alpha*b` and the term that computes b."""
    if _is_plain_term(term, alpha):
        return operator.sub
    return lambda y, value: _divide(y - _scale(value, 1), alpha)


def _divide(value: Any, alpha: float) -> Any:
    return value if alpha == 1 else value / alpha


# --- arithmetic: y = a + alpha*b and its relatives
# `alpha=` and `value=` take a tensor of no dimensions as well, and so does the old order `torch.add(a, alpha, b)`.
TENSOR_FACTOR = "a tensor stands where a number scales an operand"


@register_inverse(aten.add.Tensor, aten.add.Scalar)
def add(node: fx.Node) -> Iterator[Direction]:
    """`y = a + alpha*b`; `a = y - alpha*b`, `b = (y - a)/alpha`."""
    a, b, alpha = arguments(node, "input", "other", alpha=1)
    if isinstance(alpha, fx.Node):
        yield NoInverse(a, TENSOR_FACTOR, Reason.ZERO_FACTOR)
        yield NoInverse(b, TENSOR_FACTOR, Reason.ZERO_FACTOR)
        return
    yield Inverse(a, _with_term(operator.sub, b, alpha), (b,), rest=lambda b: _scale(b, alpha))
    yield Inverse(b, _without_term(a, alpha), (a,), factor=alpha, rest=lambda a: a)


@register_inverse(aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Tensor, aten.rsub.Scalar)
def sub(node: fx.Node) -> Iterator[Direction]:
    """`y = a - alpha*b`; `a = y + alpha*b`, `b = (a - y)/alpha`. `rsub` has its operands in the opposite order."""
    a, b, alpha = arguments(node, "input", "other", alpha=1)
    if "rsub" in str(node.target):
        a, b = b, a
    if isinstance(alpha, fx.Node):
        yield NoInverse(a, TENSOR_FACTOR, Reason.ZERO_FACTOR)
        yield NoInverse(b, TENSOR_FACTOR, Reason.ZERO_FACTOR)
        return
    yield Inverse(a, _with_term(operator.add, b, alpha), (b,), rest=lambda b: _scale(b, -alpha))
    yield Inverse(b, lambda y, a: _divide(a - y, alpha), (a,), factor=-alpha, rest=lambda a: a)


@register_inverse(aten.neg.default)
def neg(node: fx.Node) -> Iterator[Direction]:
    """`y = -a`; `a = -y`."""
    (a,) = arguments(node, "input")
    yield Inverse(a, lambda y: -y, exact=True, factor=-1, rest=zero)


@register_inverse(aten.mul.Tensor, aten.mul.Scalar)
def mul(node: fx.Node) -> Iterator[Direction]:
    """`y = a*b`; `a = y/b`, `b = y/a`, if the other factor is bounded away from zero."""
    a, b = arguments(node, "input", "other")
    yield Inverse(a, lambda y, b: y / b, (b,), factor=b, rest=zero)
    yield Inverse(b, lambda y, a: y / a, (a,), factor=a, rest=zero)


@register_inverse(aten.div.Tensor, aten.div.Scalar, aten.div.Tensor_mode, aten.div.Scalar_mode)
def div(node: fx.Node) -> Iterator[Direction]:
    """`y = a/b`; `a = y*b`, `b = a/y`."""
    a, b, rounding = arguments(node, "input", "other", rounding_mode=None)
    if rounding is not None:
        yield NoInverse(a, f"division with rounding_mode={rounding!r} loses the remainder")
        return
    yield Inverse(a, lambda y, b: y * b, (b,), factor=b, reciprocal=True, rest=zero)
    yield Inverse(b, lambda y, a: a / y, (a,), coded=True)


@register_inverse(aten.addcmul.default, aten.addcdiv.default)
def add_product(node: fx.Node) -> Iterator[Direction]:
    """`y = a + value*b*c` or `y = a + value*b/c`; a is y minus the same product."""
    a, b, c, value = arguments(node, "input", "tensor1", "tensor2", value=1)
    if isinstance(value, fx.Node):
        yield NoInverse(a, TENSOR_FACTOR, Reason.ZERO_FACTOR)
        return
    add_to, multiply = torch.addcmul, operator.mul
    if "addcdiv" in str(node.target):
        add_to, multiply = torch.addcdiv, operator.truediv
    by, rest = lambda y, b, c: add_to(y, b, c, value=-value), lambda b, c: _scale(multiply(b, c), value)
    yield Inverse(a, by, (b, c), rest=rest)


@register_inverse(aten.lerp.Scalar, aten.lerp.Tensor)
def lerp(node: fx.Node) -> Iterator[Direction]:
    """`y = (1-w)*a + w*b` for a number w; `a = (y - w*b)/(1-w)`, `b = (y - (1-w)*a)/w`."""
    a, b, w = arguments(node, "input", "end", "weight")
    if not isinstance(w, Scalar) or isinstance(w, bool):
        reason = "lerp with a tensor weight is not bounded away from zero"
        yield NoInverse(a, reason, Reason.ZERO_FACTOR)
        yield NoInverse(b, reason, Reason.ZERO_FACTOR)
        return
    yield Inverse(a, lambda y, b: (y - w * b) / (1 - w), (b,), factor=1 - w, rest=lambda b: w * b)
    yield Inverse(b, lambda y, a: (y - (1 - w) * a) / w, (a,), factor=w, rest=lambda a: (1 - w) * a)


@register_inverse(aten.where.self)
def select_by_mask(node: fx.Node) -> Iterator[Direction]:
    """`y = where(m, a, b)`: a if m is True, else b; the unselected elements of both are not in y."""
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
    are_floats = before.dtype in FLOATS and after.dtype in FLOATS
    is_same_device = before.device == after.device
    if are_floats and torch.promote_types(before.dtype, after.dtype) == after.dtype:
        options = (before.dtype,) if is_same_device else (before.device, before.dtype)
        yield Inverse(a, lambda y: y.to(*options), exact=True)
    elif are_floats and is_same_device:
        yield Inverse(a, lambda y: y.to(before.dtype), coded=True)
    else:
        yield NoInverse(a, f"the cast from {before.dtype} to {after.dtype} loses bits", Reason.LOSES_BITS)

"""Inverse rules of invertible linear maps: products by a square matrix, however it is spelled, on any dimension.

`y = a @ m`; `a = y @ inverse(m)`, for a matrix that follows from parameters and constants alone. How well that is
conditioned is a question of price: of the bytes that the code takes, which makes up for the rounding of the product. A
convolution that takes its input apart into blocks (kernel = stride, 1x1 among them) is a product by the matrix of its
weight, and a transposed one is its dual: with `w` as [groups, n, n], the weight of the inverse is `inverse(w).mT`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from revfx import _torch
from revfx.rules import Direction, Inverse, arguments, aten, fake_result, register_inverse


class _InverseMatrix:
    """The inverses of square matrices, computed in float64 and rounded to their dtype.

    A forward makes new ones, since a fused optimizer's step counts no version, and its backward takes the same ones,
    which are kept for as long as their matrices.
    """

    def __init__(self) -> None:
        # By where a matrix lies: its memory, its version, and the inverse.
        self._made: dict[Any, tuple[weakref.ref[Any], int, Tensor]] = {}

    def __call__(self, m: Tensor) -> Tensor:
        needs_grad = torch.is_grad_enabled() and m.requires_grad
        if torch.compiler.is_compiling() or needs_grad or _torch.is_fake(m):
            return inverted(m)
        storage, version, key = m.untyped_storage(), _torch.version(m), (m.data_ptr(), m.shape, m.stride())
        known = self._made.get(key)
        if known is not None and known[0]() is storage and known[1] == version and _torch.graph_task_id() != -1:
            return known[2]
        self._made = {k: known for k, known in self._made.items() if known[0]() is not None}
        self._made[key] = weakref.ref(storage), version, (inverse := inverted(m))
        return inverse


def inverted(m: Tensor) -> Tensor:
    """Return the inverse; where there is none its numbers are not finite, which the host does not wait to learn."""
    return torch.linalg.inv_ex(m.to(torch.promote_types(m.dtype, torch.float64)))[0].to(m.dtype)


def _is_matrix(m: Any) -> bool:
    """Return whether an operand may be inverted: spread over processes it is not whole, and mps has no float64."""
    if not isinstance(m, fx.Node) or not _torch.is_plain(fake_result(m)):
        return False
    return fake_result(m).dim() >= 2 and fake_result(m).layout == torch.strided and fake_result(m).device.type != "mps"


def _may_solve(node: fx.Node, a: Any, m: Any) -> bool:
    """Return whether a product has the dtype of its operand `a`, and its other one is a square matrix."""
    if not isinstance(a, fx.Node) or fake_result(a).dtype != fake_result(node).dtype or not _is_matrix(m):
        return False
    sizes: list[Any] = [*fake_result(m).shape[-2:]]
    return all(isinstance(n, int) for n in sizes) and sizes[0] == sizes[1]


@register_inverse(aten.mm.default, aten.bmm.default)
def matmul(node: fx.Node) -> Iterator[Direction]:
    """`y = a @ m`; `a = y @ inverse(m)`, and `m @ a` likewise."""
    a, other, mat2 = arguments(node, "input", "other", mat2=None)
    yield from _products(node, a, mat2 if other is None else other, None)


@register_inverse(aten.addmm.default)
def addmm(node: fx.Node) -> Iterator[Direction]:
    """`y = c + a @ m`; `a = (y - c) @ inverse(m)`."""
    c, a, b, beta, alpha = arguments(node, "input", "mat1", "mat2", beta=1, alpha=1)
    if (alpha, beta) == (1, 1):
        yield from _products(node, a, b, c)


def _products(node: fx.Node, a: Any, b: Any, c: Any) -> Iterator[Direction]:
    left, right = _InverseMatrix(), _InverseMatrix()
    if _may_solve(node, a, b):
        yield Inverse(a, lambda y, m, c: torch.matmul(_minus(y, c), right(m)), (b, c), coded=True, matrix=b)
    if _may_solve(node, b, a):
        yield Inverse(b, lambda y, m, c: torch.matmul(left(m), _minus(y, c)), (a, c), coded=True, matrix=a)


def _minus(y: Tensor, c: Tensor | None) -> Tensor:
    return y if c is None else y - c


# --- convolutions that take their input apart


@register_inverse(aten.convolution.default)
def aten_convolution(node: fx.Node) -> Iterator[Direction]:
    """Return the same of both, as compiled graphs spell them."""
    yield from _convolution(node, *node.args)


def _convolution(
    node: fx.Node, a: Any, w: Any, b: Any, stride: Any, padding: Any, dilation: Any, transposed: Any,
    further: Any, groups: Any,
) -> Iterator[Direction]:  # fmt: skip
    if not _is_matrix(w):
        return
    shape = tuple(fake_result(w).shape)
    n, kernel = shape[0] // groups, shape[2:]
    none = (0,) * len(kernel)
    apart = [_each(x, kernel) for x in (stride, padding, further)] == [kernel, none, none]
    dense = math.prod(kernel) == 1 or set(_each(dilation, kernel)) == {1}
    sizes: list[Any] = [*fake_result(a).shape[-len(kernel) :]]
    whole = transposed or all(isinstance(n, int) and n % k == 0 for n, k in zip(sizes, kernel, strict=True))
    same_dtype = fake_result(a).dtype == fake_result(node).dtype
    if not (apart and dense and whole and math.prod(shape[1:]) == n and same_dtype):
        return
    inverse = _InverseMatrix()

    def by(y: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        dual = inverse(w.reshape(groups, n, n)).mT.reshape(shape)
        y = _minus(y, None if b is None else b.view(-1, *(1 for _ in kernel)))
        return torch.convolution(y, dual, None, kernel, none, (1,) * len(kernel), not transposed, none, groups)

    yield Inverse(a, by, (w, b), coded=True, matrix=w)


def _each(given: Any, kernel: Sequence[int]) -> tuple[Any, ...]:
    """Return a value for each dimension, given one for all or one for each."""
    if given == "valid":
        return (0,) * len(kernel)
    each = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    return each * len(kernel) if len(each) == 1 else each

"""Inverse rules of invertible linear maps: products by a square matrix, and convolutions of separate blocks.

`y = a @ m`; `a = y @ inverse(m)`, for a matrix that follows from parameters and constants alone. A badly conditioned
matrix costs bytes, as the code that corrects the rounding of the product grows. A convolution with kernel = stride (1x1
among them) cuts its input into blocks, and is a product by the matrix of its weight. A transposed one is its dual: with
`w` as [groups, n, n], the weight of the inverse is `inverse(w).mT`.
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

    A forward computes new ones, since a fused optimizer's step counts no version. Its backward reuses them. They are
    kept for as long as their matrices.
    """

    def __init__(self) -> None:
        # By the layout of a matrix: its storage, its version, and the inverse.
        self._cache: dict[Any, tuple[weakref.ref[Any], int, Tensor]] = {}

    def __call__(self, m: Tensor) -> Tensor:
        needs_grad = torch.is_grad_enabled() and m.requires_grad
        if torch.compiler.is_compiling() or needs_grad or _torch.is_fake(m):
            return invert_matrix(m)
        storage, version, key = m.untyped_storage(), _torch.version(m), (m.data_ptr(), m.shape, m.stride())
        known = self._cache.get(key)
        is_backward = _torch.graph_task_id() != -1
        if known is not None and known[0]() is storage and known[1] == version and is_backward:
            return known[2]
        self._cache = {k: entry for k, entry in self._cache.items() if entry[0]() is not None}
        inverse = invert_matrix(m)
        self._cache[key] = weakref.ref(storage), version, inverse
        return inverse


def invert_matrix(m: Tensor) -> Tensor:
    """Return the inverse; that of a singular matrix is not finite, and the host does not wait to check that."""
    return torch.linalg.inv_ex(m.to(torch.promote_types(m.dtype, torch.float64)))[0].to(m.dtype)


def _is_matrix(m: Any) -> bool:
    """Return whether an operand can be inverted: it is no DTensor, and its device has float64, unlike mps."""
    if not isinstance(m, fx.Node) or not _torch.is_plain(fake_result(m)):
        return False
    return fake_result(m).dim() >= 2 and fake_result(m).layout == torch.strided and fake_result(m).device.type != "mps"


def _is_solvable(node: fx.Node, a: Any, m: Any) -> bool:
    """Return whether a product has the dtype of its operand `a`, and the other operand is a square matrix."""
    if not isinstance(a, fx.Node) or fake_result(a).dtype != fake_result(node).dtype or not _is_matrix(m):
        return False
    sizes: list[Any] = [*fake_result(m).shape[-2:]]
    return all(isinstance(n, int) for n in sizes) and sizes[0] == sizes[1]


@register_inverse(aten.mm.default, aten.bmm.default)
def matmul(node: fx.Node) -> Iterator[Direction]:
    """`y = a @ m`; `a = y @ inverse(m)`, and `m @ a` likewise."""
    a, other, mat2 = arguments(node, "input", "other", mat2=None)
    yield from _solve_product(node, a, mat2 if other is None else other, None)


@register_inverse(aten.addmm.default)
def addmm(node: fx.Node) -> Iterator[Direction]:
    """`y = c + a @ m`; `a = (y - c) @ inverse(m)`."""
    c, a, b, beta, alpha = arguments(node, "input", "mat1", "mat2", beta=1, alpha=1)
    if (alpha, beta) == (1, 1):
        yield from _solve_product(node, a, b, c)


def _solve_product(node: fx.Node, a: Any, b: Any, c: Any) -> Iterator[Direction]:
    """Yield the inverses of `y = a @ b + c` for a and b; c may be None."""
    left, right = _InverseMatrix(), _InverseMatrix()
    if _is_solvable(node, a, b):
        yield Inverse(a, lambda y, m, c: torch.matmul(_subtract(y, c), right(m)), (b, c), coded=True, matrix=b)
    if _is_solvable(node, b, a):
        yield Inverse(b, lambda y, m, c: torch.matmul(left(m), _subtract(y, c)), (a, c), coded=True, matrix=a)


def _subtract(y: Tensor, c: Tensor | None) -> Tensor:
    return y if c is None else y - c


@register_inverse(aten.convolution.default)
def aten_convolution(node: fx.Node) -> Iterator[Direction]:
    """`y = convolution(a, w) + b` with kernel = stride; `a = conv_transpose(y - b, dual of w)`, and vice versa."""
    args: Any = node.args
    a, w, b, stride, padding, dilation, transposed, output_padding, groups = args
    if not _is_matrix(w):
        return
    shape = tuple(fake_result(w).shape)
    n, kernel = shape[0] // groups, shape[2:]
    zeros, ones = (0,) * len(kernel), (1,) * len(kernel)

    # Each output depends on one block of the input, and each element of the input belongs to one block.
    has_blocks = [_per_dimension(x, kernel) for x in (stride, padding, output_padding)] == [kernel, zeros, zeros]
    is_dense = math.prod(kernel) == 1 or _per_dimension(dilation, kernel) == ones
    sizes: list[Any] = [*fake_result(a).shape[-len(kernel) :]]
    is_covered = transposed or all(isinstance(s, int) and s % k == 0 for s, k in zip(sizes, kernel, strict=True))
    is_square = math.prod(shape[1:]) == n
    if not (has_blocks and is_dense and is_covered and is_square and fake_result(a).dtype == fake_result(node).dtype):
        return
    inverse = _InverseMatrix()

    def by(y: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        dual = inverse(w.reshape(groups, n, n)).mT.reshape(shape)
        if b is not None:
            y = y - b.view(-1, *ones)
        return torch.convolution(y, dual, None, kernel, zeros, ones, not transposed, zeros, groups)

    yield Inverse(a, by, (w, b), coded=True, matrix=w)


def _per_dimension(value: Any, kernel: Sequence[int]) -> tuple[Any, ...]:
    """Return a value for each dimension of a kernel, from one per dimension or one for all."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * len(kernel) if len(values) == 1 else values

"""The format of codes, which all implementations share.

Elements are coded in the order of memory, complex ones as pairs. Their bits are read as integers in the order of the
numbers: the bits of negative numbers are inverted, except for the sign. The **distance** of an element from its
prediction is then nearly always a small integer, across zero too.

- `packed`: `width` bits of each distance (0, 2, 4 or 8), in blocks of 256 elements. With F = 8 / width, byte i of a
  block holds elements i, i + 256/F, i + 2*256/F, ..., the first one in its lowest bits. The last block has as many
  bytes as elements, if these are fewer.
- Elements that need more bits are **escapes**. `values` has their bits, and `places` their indices in a group of 2,048
  elements. `spans` has two numbers for each group: the index of its first escape, and the end of its escapes.
- `words`: the **fingerprint** of the tensor. The first word is a checksum over its memory in words of 32 bits. Each
  word has a random weight (by its index in a row of 128) and a random key (of the row). So a change of a word, or an
  exchange of two, always changes the sum. The bits of 16 elements follow, evenly spaced.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from revfx import _torch
from revfx.layout import flatten_storage, is_dense


WIDTHS = (0, 2, 4, 8)  # bits
BLOCK = 256  # elements
GROUP = 2048  # elements
ROW = 128  # words of 32 bits
SAMPLE = 16  # elements
INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes an element
PLACE_BYTES, SPAN_BYTES = 2, 8


@dataclass(frozen=True, slots=True)
class Code:
    """The correction of a tensor's prediction.

    Attributes:
        packed: uint8.
        spans: int32, two numbers for each group.
        values: integers of as many bytes as an element has.
        places: int16.
        words: int64, the fingerprint.
        count: the number of escapes if only the device knows it; those beyond the length of `values` are lost.
    """

    width: int
    packed: Tensor
    spans: Tensor
    values: Tensor
    places: Tensor
    words: Tensor
    count: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of the code."""
        parts = self.packed, self.spans, self.values, self.places, self.words
        return parts if self.count is None else (*parts, self.count)

    @property
    def nbytes(self) -> int:
        """The bytes of the code."""
        return sum([t.nbytes for t in self.tensors])


@dataclass(frozen=True, slots=True)
class Prediction:
    """The result of an inverse: `tensors[0]`, or the difference or sum of two that is not computed yet.

    Attributes:
        tensors: of one dtype; or the first one of float32, and the second one of float16 or bfloat16.
        by: `operator.sub` or `operator.add`; None if the prediction is computed.
    """

    tensors: tuple[Tensor, ...]
    by: Callable[..., Any] | None = None

    @property
    def like(self) -> Tensor:
        """A tensor with the shape, strides, dtype and device of the prediction."""
        return self.tensors[0]

    def compute(self) -> Prediction:
        """Return the prediction as one tensor, with the same bits for every NaN: those of kernels differ."""
        if self.by is None:
            return self
        t = self.by(*self.tensors)
        numbers = torch.view_as_real(t) if t.is_complex() else t
        numbers.masked_fill_(numbers.isnan(), math.nan)
        return Prediction((t,))


def predict(solve: Callable[..., Tensor], *tail: Tensor) -> Prediction:
    """Return the prediction `solve(*tail)`; codecs compute a difference or sum of tensors with the same layout."""
    if (solve is operator.sub or solve is operator.add) and _have_same_layout(*tail):
        return Prediction(tail, solve)
    with torch.no_grad():
        return Prediction((solve(*tail),))


AUTOCAST_DTYPES = (torch.bfloat16, torch.float16)  # of results under autocast, which are added to float32


def _have_same_layout(y: Tensor, h: Tensor) -> bool:
    """Return whether two plain dense tensors have their elements in the same order; `h` may be narrower."""
    return (
        (y.dtype == h.dtype or (y.dtype == torch.float32 and h.dtype in AUTOCAST_DTYPES))
        and y.shape == h.shape
        and y.stride() == h.stride()
        and _torch.is_plain(y)
        and _torch.is_plain(h)
        and (y.is_floating_point() or y.is_complex())
        and is_dense(y)
        and not (y.is_conj() or h.is_conj() or y.is_neg() or h.is_neg())
    )


def bits_of(t: Tensor) -> Tensor:
    """Return the bits of a tensor as integers, in the order of memory: a view if it is dense."""
    if t.is_complex():
        t = torch.view_as_real(t.resolve_conj())
    else:
        t = t.resolve_neg()
    # A single element may have any stride; the view needs the stride 1.
    return flatten_storage(t).contiguous().as_strided((t.numel(),), (1,)).view(INTEGER[t.element_size()])


def marks_of(t: Tensor, positive: bool) -> Tensor:
    """Return whether each element is not zero; instead, whether it is positive or NaN."""
    return (t <= 0).logical_not_() if positive else t != 0


def tensor_of(bits: Tensor, like: Tensor) -> Tensor:
    """Return the tensor with these bits and the layout of `like`; a contiguous one if that is not dense."""
    t = bits.view(like.dtype)
    if is_dense(like):
        return t.as_strided(like.shape, like.stride())
    return t.view(like.shape)


def with_layout_of(like: Tensor, x: Tensor) -> Tensor:
    """Return `x`, or a copy of it, with the strides of `like`, or a contiguous copy if that is not dense."""
    if not is_dense(like):
        return x.contiguous()
    if x.stride() == like.stride():
        return x
    return torch.empty_like(like).copy_(x)


def allocate_result(like: Tensor, reusable: Tensor | None) -> Tensor:
    """Return an uninitialised tensor with the layout of a prediction; `reusable` itself, if it has that layout."""
    if not is_dense(like):
        return torch.empty(like.shape, dtype=like.dtype, device=like.device)
    if reusable is None or reusable.stride() != like.stride() or reusable.dtype != like.dtype:
        return torch.empty_like(like)
    if reusable.is_conj() or reusable.is_neg():
        return torch.empty_like(like)
    return reusable


def reals_per_element(t: Tensor) -> int:
    """Return 2 for complex tensors, else 1."""
    return 1 + t.is_complex()


def groups_of(n: int) -> int:
    """Return the number of groups of n elements."""
    return -(-n // GROUP)


def packed_bytes(n: int, width: int) -> int:
    """Return the bytes of the packed distances of n elements."""
    bytes_of_block = width * (BLOCK // 8)
    return n // BLOCK * bytes_of_block + min(n % BLOCK, bytes_of_block)


def word_count(element_size: int) -> int:
    """Return the number of words in a fingerprint."""
    return 1 + SAMPLE * element_size // 8


def nbytes_of(n: int, element_size: int, width: int, escapes: int) -> int:
    """Return the bytes of a code without its fingerprint, which has a constant size.

    Args:
        n: elements.
        element_size: bytes of an element.
        width: bits of a packed distance.
        escapes: their number.
    """
    return packed_bytes(n, width) + SPAN_BYTES * groups_of(n) + escapes * (element_size + PLACE_BYTES)

"""The format of codes, which all implementations share.

The elements of a tensor are taken in the order of memory, complex ones as pairs, and their bits are read as integers in
the order of the numbers: those of negative ones, but for the sign, are turned around. The **distance** k of an element
from its prediction is then a small integer nearly everywhere, across zero too.

- `packed`: `width` bits of each distance (0, 2, 4 or 8), in blocks of 256 elements. With F = 8 / width, byte i of a
  block holds elements i, i + 256/F, i + 2*256/F, ..., the first one in its lowest bits. The last block has as many
  bytes as elements, if these are fewer.
- Elements that need more bits are **escapes**: `values` has their bits, `places` where they are in their
  group of 2,048 elements, and `spans` for each group the first of its escapes and the end of them.
- `words`: the **fingerprint** of the tensor. The first word is a sum over its memory in words of 32 bits, each times a
  random weight (by its place in a row of 128) and a random key (of the row), so that a change of a word, or an exchange
  of two, always changes the sum. Then come the bits of 16 elements, evenly spaced.
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
from revfx.layout import flat, is_dense


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
        count: escapes that there were, where only the device knows; those beyond the room in `values` are lost.
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
        """All that is stored."""
        parts = self.packed, self.spans, self.values, self.places, self.words
        return parts if self.count is None else (*parts, self.count)

    @property
    def nbytes(self) -> int:
        """Bytes that the code takes."""
        return sum([t.nbytes for t in self.tensors])


@dataclass(frozen=True, slots=True)
class Prediction:
    """The result of an inverse: `tensors[0]`, or the difference or sum of two, not yet computed.

    Attributes:
        tensors: of one dtype, or the second one of float16 or bfloat16 and the first one of float32.
        by: `operator.sub` or `operator.add`; None if the tensor is there.
    """

    tensors: tuple[Tensor, ...]
    by: Callable[..., Any] | None = None

    @property
    def like(self) -> Tensor:
        """A tensor with the shape, strides, dtype and device of the prediction."""
        return self.tensors[0]

    def compute(self) -> Prediction:
        """Return the prediction with its tensor."""
        if self.by is None:
            return self
        t = self.by(*self.tensors)  # which NaN a kernel gives is up to it, so it is always the same one
        numbers = torch.view_as_real(t) if t.is_complex() else t
        numbers.masked_fill_(numbers.isnan(), math.nan)
        return Prediction((t,))


def predict(solve: Callable[..., Tensor], *tail: Tensor) -> Prediction:
    """Return the prediction `solve(*tail)`; a difference or sum of tensors that lie alike is left to the codec."""
    if (solve is operator.sub or solve is operator.add) and _lie_alike(*tail):
        return Prediction(tail, solve)
    with torch.no_grad():
        return Prediction((solve(*tail),))


NARROW = (torch.bfloat16, torch.float16)  # results under autocast, which are added to float32


def _lie_alike(y: Tensor, h: Tensor) -> bool:
    """Return whether the elements of two plain tensors lie in the same order; `h` may be narrower."""
    return (
        (y.dtype == h.dtype or (y.dtype == torch.float32 and h.dtype in NARROW))
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
    t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t.resolve_neg()
    # a view with the stride 1 even of one element, which may have any
    return flat(t).contiguous().as_strided((t.numel(),), (1,)).view(INTEGER[t.element_size()])


def tensor_of(bits: Tensor, like: Tensor) -> Tensor:
    """Return the tensor with these bits and the layout of `like`; a contiguous one if that is not dense."""
    t = bits.view(like.dtype)
    return t.as_strided(like.shape, like.stride()) if is_dense(like) else t.view(like.shape)


def laid_out_as(like: Tensor, x: Tensor) -> Tensor:
    """Return `x`, or a copy of it, with the strides of `like`, or a contiguous copy if that is not dense."""
    if not is_dense(like):
        return x.contiguous()
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)


def memory_for(like: Tensor, spent: Tensor | None) -> Tensor:
    """Return a tensor for a result like a prediction: `spent`, if it lies in memory as the result will."""
    if not is_dense(like):
        return torch.empty(like.shape, dtype=like.dtype, device=like.device)
    if spent is None or spent.stride() != like.stride() or spent.dtype != like.dtype:
        return torch.empty_like(like)
    return torch.empty_like(like) if spent.is_conj() or spent.is_neg() else spent


def groups_of(n: int) -> int:
    """Return the number of groups of n elements."""
    return -(-n // GROUP)


def packed_bytes(n: int, width: int) -> int:
    """Return how many bytes the packed distances of n elements take."""
    bytes_of_block = width * (BLOCK // 8)
    return n // BLOCK * bytes_of_block + min(n % BLOCK, bytes_of_block)


def word_count(element_size: int) -> int:
    """Return of how many words a fingerprint consists."""
    return 1 + SAMPLE * element_size // 8


def nbytes_of(n: int, element_size: int, width: int, escapes: int) -> int:
    """Return the bytes of a code of n elements, less those of the fingerprint, which do not grow with n."""
    return packed_bytes(n, width) + SPAN_BYTES * groups_of(n) + escapes * (element_size + PLACE_BYTES)

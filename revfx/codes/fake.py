"""Codes of fake tensors: the allocations of the C and Triton implementations, without numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from revfx.codes.format import (
    INTEGER,
    Code,
    Prediction,
    allocate_result,
    groups_of,
    packed_bytes,
    reals_per_element,
    word_count,
)


def encode(x: Tensor, prediction: Prediction, width: int, capacity: int | None = None) -> Code:
    """Return the code of `x` with `capacity` escapes."""
    return empty_code(x, x.numel() * reals_per_element(x), width, capacity or 0)


def decode(prediction: Prediction, code: Code, reusable: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the tensor with this code, and its fingerprint; see `revfx.codes.decode`."""
    return allocate_result(prediction.like, reusable), torch.empty_like(code.words)


def fingerprint(t: Tensor) -> Tensor:
    """Return the fingerprint of a tensor of any dtype."""
    return t.new_empty(word_count(t.element_size() // reals_per_element(t)), dtype=torch.int64)


def empty_code(like: Tensor, n: int, width: int, escapes: int) -> Code:
    """Return a code without numbers.

    Args:
        like: a tensor with the dtype and device of the coded one.
        n: real elements.
        width: bits per element.
        escapes: their number.
    """
    size = like.element_size() // reals_per_element(like)
    return Code(
        width,
        packed=like.new_empty(packed_bytes(n, width), dtype=torch.uint8),
        spans=like.new_empty((groups_of(n), 2), dtype=torch.int32),
        values=like.new_empty(escapes, dtype=INTEGER[size]),
        places=like.new_empty(escapes, dtype=torch.int16),
        words=like.new_empty(word_count(size), dtype=torch.int64),
    )


def pack_marks(t: Tensor, positive: bool = False) -> Tensor:
    """Return one bit per element of a tensor; see `revfx.codes.pack_marks`."""
    return t.new_empty(-(-t.numel() // 8), dtype=torch.uint8)


def unpack_marks(packed: Tensor, elements: int, dtype: torch.dtype) -> Tensor:
    """Return zeros and ones from their bits; see `revfx.codes.unpack_marks`."""
    return packed.new_empty(elements, dtype=dtype)

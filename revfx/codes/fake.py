"""Codes of fake tensors: the allocations of the implementations with one kernel each way, without numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from revfx.codes.format import INTEGER, Code, Prediction, groups_of, memory_for, packed_bytes, word_count


def encode(x: Tensor, prediction: Prediction, width: int, room: int | None = None) -> Code:
    """Return the code of `x`, with as many escapes as there is room for."""
    return empty_code(x, x.numel() * (1 + x.is_complex()), width, room or 0)


def decode(prediction: Prediction, code: Code, spent: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the tensor of which `code` was made, with the strides of the prediction, and its fingerprint."""
    return memory_for(prediction.like, spent), torch.empty_like(code.words)


def fingerprint(t: Tensor) -> Tensor:
    """Return the fingerprint of a tensor of any dtype."""
    return t.new_empty(word_count(_size_of(t)), dtype=torch.int64)


def empty_code(like: Tensor, n: int, width: int, escapes: int) -> Code:
    """Return a code of `n` real elements, such as those of `like`, of which so many are escapes."""
    size = _size_of(like)
    return Code(
        width,
        packed=like.new_empty(packed_bytes(n, width), dtype=torch.uint8),
        spans=like.new_empty((groups_of(n), 2), dtype=torch.int32),
        values=like.new_empty(escapes, dtype=INTEGER[size]),
        places=like.new_empty(escapes, dtype=torch.int16),
        words=like.new_empty(word_count(size), dtype=torch.int64),
    )


def _size_of(t: Tensor) -> int:
    """Return the bytes of a real element."""
    return t.element_size() // (1 + t.is_complex())

"""Tensors of which only one bit an element matters: what is positive, and what is not zero."""

from __future__ import annotations

import torch
from torch import Tensor

from revfx.layout import flat


_GATHER = 0x0102040810204080  # the sum of 2^(7k): brings the lowest bits of eight bytes into the highest byte
_SPREAD = 0x0101010101010101
_EACH = 0x8040201008040201 - (1 << 64)  # of byte k the bit k


def encode(marked: Tensor) -> Tensor:
    """Return booleans, in the order of memory, as bytes of eight; they are written over."""
    bits = flat(marked).view(torch.uint8)
    if bits.numel() % 8:
        bits = torch.cat((bits, bits.new_zeros(-bits.numel() % 8)))
    return bits.view(torch.int64).mul_(_GATHER).bitwise_right_shift_(56).to(torch.uint8)


def decode(code: Tensor, elements: int, dtype: torch.dtype) -> Tensor:
    """Return a flat tensor of so many ones and zeros."""
    spread = code.to(torch.int64).mul_(_SPREAD).bitwise_and_(_EACH)
    return spread.view(torch.uint8)[:elements].ne(0).to(dtype)

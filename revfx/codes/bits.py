"""Bits in the place of tensors of which only the positive elements matter, and of zeros and ones that were drawn."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from revfx import _torch
from revfx.codes.implementations import implementation
from revfx.layout import flat


_GATHER = 0x0102040810204080  # the sum of 2^(7k): brings the lowest bits of eight bytes into the highest byte


def encode(marked: Tensor) -> Tensor:
    """Return booleans, in the order of memory, as bytes of eight; they are written over."""
    if kernels := _kernels(marked):
        return kernels.pack_marks(marked)
    bits = flat(marked).view(torch.uint8)
    if bits.numel() % 8:
        bits = torch.cat((bits, bits.new_zeros(-bits.numel() % 8)))
    return bits.view(torch.int64).mul_(_GATHER).bitwise_right_shift_(56).to(torch.uint8)


def decode(code: Tensor, elements: int, dtype: torch.dtype) -> Tensor:
    """Return a flat tensor of so many ones and zeros."""
    if kernels := _kernels(code):
        return kernels.unpack_marks(code, elements, dtype)
    return _eights(code.device).index_select(0, code.int()).view(torch.uint8)[:elements].to(dtype)


def _kernels(t: Tensor) -> Any:
    """Return the module with kernels for the device of `t`, or None if operators of torch run there."""
    if _torch.is_fake(t) or implementation(t.device) != "triton":
        return None
    return importlib.import_module("revfx.codes.triton")


@functools.cache
def _eights(device: torch.device) -> Tensor:
    """Return for each byte its bits as bytes, in one number."""
    bits = torch.arange(256, dtype=torch.uint8, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return bits.to(torch.uint8).view(torch.int64).flatten()

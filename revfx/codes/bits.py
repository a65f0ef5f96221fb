"""Bits that replace a tensor if only the signs of its elements matter, or if they are random zeros and ones."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from revfx import _torch
from revfx.codes.implementations import implementation
from revfx.layout import flatten_storage


_GATHER = 0x0102040810204080  # the sum of 2^(7k): a product moves the lowest bits of eight bytes into the highest byte


def encode(marked: Tensor) -> Tensor:
    """Return booleans, in the order of memory, as bits in bytes; the booleans are overwritten."""
    kernels = _kernels(marked)
    if kernels is not None:
        return kernels.pack_marks(marked)
    bits = flatten_storage(marked).view(torch.uint8)
    if bits.numel() % 8:
        bits = torch.cat((bits, bits.new_zeros(-bits.numel() % 8)))
    return bits.view(torch.int64).mul_(_GATHER).bitwise_right_shift_(56).to(torch.uint8)


def decode(code: Tensor, elements: int, dtype: torch.dtype) -> Tensor:
    """Return a flat tensor of `elements` ones and zeros from their bits."""
    kernels = _kernels(code)
    if kernels is not None:
        return kernels.unpack_marks(code, elements, dtype)
    return _bits_of_bytes(code.device).index_select(0, code.int()).view(torch.uint8)[:elements].to(dtype)


def _kernels(t: Tensor) -> Any:
    """Return the module with kernels for the device of `t`, or None if operators of torch serve it."""
    if _torch.is_fake(t) or implementation(t.device) != "triton":
        return None
    return importlib.import_module("revfx.codes.triton")


@functools.cache
def _bits_of_bytes(device: torch.device) -> Tensor:
    """Return, for each value of a byte, its bits as eight bytes in an int64."""
    bits = torch.arange(256, dtype=torch.uint8, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return bits.to(torch.uint8).view(torch.int64).flatten()

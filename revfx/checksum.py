"""Checksums of tensors, and samples of their elements, taken without a wait for the device."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from revfx import _torch
from revfx.layout import flat, is_dense


COLUMNS = 1021  # places that are told apart, at least; an odd number, as rows of data are no multiples of it


def elements(t: Tensor, most: int) -> Tensor:
    """Return a view of some elements, complex ones as pairs: across memory, or its longest dimension if not dense."""
    if t.is_complex():
        t = torch.view_as_real(t.resolve_conj())
    if t.dtype.itemsize < 2 and t.dtype.is_floating_point:
        t = t.float()
    n, stride = t.numel(), 1
    if not is_dense(t):
        n, stride = max(zip(t.shape, t.stride(), strict=True))
    return t.as_strided((min(n, most),), (max(1, n // most) * stride,))


def checksum(t: Tensor) -> Tensor:
    """Return an int64 scalar that differs, but for chance, where any bit of `t` or the order does."""
    if t.is_complex():
        t = torch.view_as_real(t.resolve_conj())
    bits, size = flat(t), t.element_size()
    whole = bits.numel() - bits.numel() % (8 // size) if bits.storage_offset() * size % 8 == 0 else 0
    if 0 < whole < bits.numel():  # sums of anything else than int64 make a copy of it all
        return checksum(bits[:whole]) * 3 + checksum(bits[whole:])
    bits = bits.view(torch.int64 if whole else _BITS_OF[size])
    n = bits.numel()
    if n > 2 * COLUMNS:  # in rows, each a little longer than the way to the next, so that they cover all
        rows = -(-n // max(COLUMNS, math.isqrt(n)))
        step = (n // rows - 1) | 1
        bits = bits.as_strided((rows, n - (rows - 1) * step), (step, 1)).sum(0)
        n = bits.numel()
    weights = (_weights.__wrapped__ if _torch.is_fake(t) else _weights)(t.device, 1 << (n - 1).bit_length())[:n]
    return bits.dot(weights) if t.is_cpu and bits.dtype == torch.int64 else (bits * weights).sum()


_BITS_OF = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@functools.cache
def _weights(device: torch.device, size: int) -> Tensor:
    return (torch.arange(size, device="cpu") * 0x1E3779B97F4A7C15 | 1).to(device)

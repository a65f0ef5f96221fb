"""Tensors of which a few bits an element matter: what is positive, what is not zero, where in its window it lies."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from revfx.fit.tape import Op, Spot
from revfx.layout import flat


_GATHER = 0x0102040810204080  # the sum of 2^(7k): brings the lowest bits of eight bytes into the highest byte


def encode(marked: Tensor) -> Tensor:
    """Return booleans, in the order of memory, as bytes of eight; they are written over."""
    bits = flat(marked).view(torch.uint8)
    if bits.numel() % 8:
        bits = torch.cat((bits, bits.new_zeros(-bits.numel() % 8)))
    return bits.view(torch.int64).mul_(_GATHER).bitwise_right_shift_(56).to(torch.uint8)


def decode(code: Tensor, elements: int, dtype: torch.dtype) -> Tensor:
    """Return a flat tensor of so many ones and zeros."""
    return _eights(code.device).index_select(0, code.int()).view(torch.uint8)[:elements].to(dtype)


@functools.cache
def _eights(device: torch.device) -> Tensor:
    """Return for each byte its bits as bytes, in one number."""
    bits = torch.arange(256, dtype=torch.uint8, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return bits.to(torch.uint8).view(torch.int64).flatten()


# --- what operators of the backward read of what autograd keeps for them
@dataclass(frozen=True)
class Mark:
    """What is kept in the place of a tensor: so many `bits` an element, and `more` bytes for a moment on either way.

    Here nothing but the shape, of a tensor that is contiguous.
    """

    bits: ClassVar[int] = 0
    more: ClassVar[int] = 0

    def encode(self, t: Tensor) -> Tensor:
        """Return the code of a tensor."""
        return t.new_zeros(())

    def decode(self, code: Tensor, spot: Spot) -> Tensor:
        """Return what is read in its place."""
        return code.expand(spot.shape)


class Sign(Mark):
    """Which elements are not less than or equal to zero: ones, and zeros elsewhere, are read in their place."""

    bits, more = 1, 2

    def encode(self, t: Tensor) -> Tensor:
        return encode((t <= 0).logical_not_())

    def decode(self, code: Tensor, spot: Spot) -> Tensor:
        return decode(code, math.prod(spot.shape), spot.dtype).as_strided(spot.shape, spot.stride)


@dataclass(frozen=True)
class Window(Mark):
    """Which element of its window each maximum is: rows and columns of windows of a plane that is `width` wide."""

    width: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    bits, more = 8, 32

    def _first(self, size: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the first row and the first column of each window."""
        rows, columns = (
            torch.arange(n, device=device) * self.stride[i] - self.padding[i] for i, n in enumerate(size[-2:])
        )
        return rows[:, None], columns

    def encode(self, t: Tensor) -> Tensor:
        row, column = self._first(t.shape, t.device)
        down = (t.div(self.width, rounding_mode="floor") - row).div_(self.dilation[0], rounding_mode="floor")
        along = (t % self.width - column).div_(self.dilation[1], rounding_mode="floor")
        return down.mul_(self.kernel[1]).add_(along).to(torch.uint8)

    def decode(self, code: Tensor, spot: Spot) -> Tensor:
        row, column = self._first(code.shape, code.device)
        t = code.to(torch.int64)
        along = (t % self.kernel[1]).mul_(self.dilation[1]).add_(column)
        return (
            t.div_(self.kernel[1], rounding_mode="floor").mul_(self.dilation[0]).add_(row).mul_(self.width).add_(along)
        )


def mark_of(op: Op, argument: int) -> Mark | None:
    """Return what is enough of an argument that an operator of the backward reads; None where all of it is."""
    aten: Any = torch.ops.aten
    if op.func == aten.threshold_backward.default and argument == 1 and op.args[2] == 0:
        return Sign()
    if op.func == aten.max_pool2d_with_indices_backward.default and argument:
        spot = op.args[1]
        if argument == 1:
            return Mark() if spot.stride == torch.empty(spot.shape, device="meta").stride() else None
        kernel, stride, padding, dilation = (_pair(op.args[i]) for i in (2, 3, 4, 5))
        if math.prod(kernel) <= 256:
            return Window(spot.shape[-1], kernel, stride if any(stride) else kernel, padding, dilation)
    return None


def _pair(given: Any) -> tuple[int, int]:
    return (given[0], given[-1]) if given else (0, 0)

"""One bit per element in the place of a saved tensor, where the backward reads no more than that."""

from __future__ import annotations

from torch import Tensor

from revfx.codes import bits
from revfx.engine import dispatch


class BitMask:
    """A tensor of ones and zeros, stored as one bit per element."""

    def __init__(self, t: Tensor, mask: Tensor) -> None:
        self._shape, self._stride, self._dtype = t.shape, t.stride(), t.dtype
        self._bits = bits.encode(mask)

    def fetch(self, slot: int) -> Tensor:
        """Return the tensor of ones and zeros."""
        with dispatch.replaying():
            return bits.decode(self._bits, self._shape.numel(), self._dtype).as_strided(self._shape, self._stride)


def positive_mask(t: Tensor) -> BitMask:
    """Mark the elements that are positive or NaN."""
    with dispatch.unseen():
        return BitMask(t, (t.detach() <= 0).logical_not_())


def nonzero_mask(t: Tensor) -> BitMask:
    """Mark the elements that are not zero."""
    with dispatch.unseen():
        return BitMask(t, t.detach() != 0)

"""One bit per element in the place of a saved tensor, where the backward reads no more than that."""

from __future__ import annotations

from torch import Tensor

from revfx.codes import pack_marks, unpack_marks
from revfx.engine import dispatch


class BitMask:
    """A tensor of ones and zeros, stored as one bit per element."""

    def __init__(self, t: Tensor, positive: bool) -> None:
        self._shape, self._stride, self._dtype = t.shape, t.stride(), t.dtype
        with dispatch.unseen():
            self._bits = pack_marks(t.detach(), positive)

    def fetch(self, slot: int) -> Tensor:
        """Return the tensor of ones and zeros."""
        with dispatch.replaying():
            return unpack_marks(self._bits, self._shape.numel(), self._dtype).as_strided(self._shape, self._stride)


def positive_mask(t: Tensor) -> BitMask:
    """Mark the elements that are positive or NaN."""
    return BitMask(t, positive=True)


def nonzero_mask(t: Tensor) -> BitMask:
    """Mark the elements that are not zero."""
    return BitMask(t, positive=False)

"""Marks: one bit an element in the place of a tensor of which no more is read."""

from __future__ import annotations

from torch import Tensor

from revfx.codes import bits
from revfx.engine import dispatch


class Mark:
    """A tensor of which one bit an element is kept, and read as ones and zeros."""

    def __init__(self, t: Tensor, marked: Tensor) -> None:
        self._shape, self._stride, self._dtype = t.shape, t.stride(), t.dtype
        self._bits = bits.encode(marked)

    def fetch(self, slot: int) -> Tensor:
        """Return a tensor with ones in the place of marked elements, and zeros elsewhere."""
        with dispatch.replaying():
            return bits.decode(self._bits, self._shape.numel(), self._dtype).as_strided(self._shape, self._stride)


def positive(t: Tensor) -> Mark:
    """Return marks of the positive elements, and of those that are no numbers."""
    with dispatch.unseen():
        return Mark(t, (t.detach() <= 0).logical_not_())


def nonzero(t: Tensor) -> Mark:
    """Return marks of the elements that are not zero."""
    with dispatch.unseen():
        return Mark(t, t.detach() != 0)

"""The choice of a code's width and capacity, by the earlier codes of the same value."""

from __future__ import annotations

from torch import Tensor

from revfx import _torch
from revfx.codes.fake import empty_code
from revfx.codes.format import WIDTHS, Code, Prediction, nbytes_of, reals_per_element
from revfx.codes.implementations import count_escapes, encode


ESCAPE_COST = 2  # bytes that the time of an escape is worth
MIN_BYTES = 1 << 12  # of a tensor: the code of a smaller one is not worth its time
MAX_BYTES = 1 << 32  # of a tensor: escapes are counted in 32 bits
TYPICAL_WIDTH, TYPICAL_ESCAPES = 2, 0.018  # bits, and escapes per element, of a code without numbers
UNEXPECTED_SHARE = 64  # elements per escape, beyond twice the last count, from which escapes are counted again
CAPACITY_FACTOR, MIN_CAPACITY = 1.5, 64  # on accelerators: times the last count of escapes, and at least


def pays_for(x: Tensor, nbytes: int) -> bool:
    """Return whether a code of `x`, of that many bytes, may be worth its time."""
    is_number = x.is_floating_point() or x.is_complex()
    return MIN_BYTES < nbytes < MAX_BYTES and is_number and x.element_size() > 1


def is_counted(t: Tensor) -> bool:
    """Return whether the host knows the number of selected elements of `t` without waiting for a device."""
    return t.device.type == "cpu"


class Codec:
    """The coding of one value of a program: the smallest one in the calls so far.

    Escapes are counted in calls 1, 2, 4, 8 ... and after a call with far more of them than expected. In other calls
    the host waits for no numbers.

    Attributes:
        width: bits; None if the value is smaller than its code, or too small to be worth the time of a code.
        wide: 8 bits are expected.
        counts_next: whether the next call counts escapes.
        escapes: their last count.
        capacity: the number of escapes that a code can hold, on an accelerator.
    """

    def __init__(self, wide: bool = False) -> None:
        self.calls: int = 0
        self.escapes: int = 0
        self.wide: bool = wide
        self.width: int | None = None
        self.capacity: int | None = None
        self.counts_next: bool = True

    def needs_prediction(self, x: Tensor) -> bool:
        """Return whether the next call encodes `x`, or counts escapes, and so needs the prediction."""
        self.calls += 1
        self.counts_next = self.counts_next or self.calls & (self.calls - 1) == 0
        return (self.counts_next or self.width is not None) and _torch.is_plain(x) and pays_for(x, x.nbytes)

    def encode(self, x: Tensor, prediction: Prediction) -> Code | None:
        """Return the code of `x`, or None if `x` itself is smaller."""
        like = prediction.like
        if x.shape != like.shape or x.dtype != like.dtype:
            return None
        if _torch.is_fake(x) or _torch.is_fake(like):
            width = 8 if self.wide else TYPICAL_WIDTH
            return encode(x, prediction, width, _typical_escapes(x, x.numel()))
        if self.counts_next and not _torch.is_capturing(x):
            self._choose(x, prediction)
        width = self.width  # another thread may choose another one
        if width is None:
            return None
        code = encode(x, prediction, width, self.capacity)
        self.counts_next = self.capacity is None and len(code.values) > 2 * self.escapes + x.numel() // UNEXPECTED_SHARE
        return code if code.nbytes - code.words.nbytes < x.nbytes else None

    def _choose(self, x: Tensor, prediction: Prediction) -> None:
        """Choose the width with the least bytes of the code of `x`; the time of escapes counts as bytes."""
        counts = dict(zip(WIDTHS, count_escapes(x, prediction), strict=True))
        n, size = x.numel() * reals_per_element(x), x.element_size() // reals_per_element(x)
        nbytes = {w: nbytes_of(n, size, w, counts[w]) for w in WIDTHS}
        best = min(WIDTHS, key=lambda w: nbytes[w] + ESCAPE_COST * counts[w])
        self.counts_next = False
        self.width = best if nbytes[best] < x.nbytes else None
        self.escapes = counts[best]
        self.capacity = None if is_counted(x) else int(CAPACITY_FACTOR * self.escapes) + MIN_CAPACITY


def _typical_escapes(x: Tensor, n: int) -> int:
    """Return the typical number of escapes in the code of a tensor like `x` with n elements."""
    return int(TYPICAL_ESCAPES * n * reals_per_element(x))


def typical_code(x: Tensor, n: int) -> Code:
    """Return a code without numbers, of a typical size, of a tensor like `x` with n elements."""
    return empty_code(x, n * reals_per_element(x), TYPICAL_WIDTH, _typical_escapes(x, n))

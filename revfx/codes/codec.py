"""Choosing the width and the room of a code, by the codes of the same value so far."""

from __future__ import annotations

from torch import Tensor

from revfx import _torch
from revfx.codes.fake import empty_code
from revfx.codes.format import WIDTHS, Code, Prediction, nbytes_of
from revfx.codes.implementations import count_escapes, encode


ESCAPE_COST = 2  # bytes that the time of an escape is worth
MIN_BYTES = 1 << 12  # of a tensor: the code of so small a one is not worth its time
MAX_BYTES = 1 << 32  # of a tensor: escapes are counted in 32 bits
TYPICAL_WIDTH, TYPICAL_ESCAPES = 2, 0.018  # bits, and escapes an element, of a code where there are no numbers
RECOUNTED = 64  # one escape in so many elements, besides twice the last count, has them counted again
ROOM_FACTOR, MIN_ROOM = 1.5, 64  # times the escapes that were counted, and at least: room on accelerators


def pays_for(x: Tensor, nbytes: int) -> bool:
    """Return whether a code of `x`, of that many bytes, may be worth its time."""
    is_number = x.is_floating_point() or x.is_complex()
    return MIN_BYTES < nbytes < MAX_BYTES and is_number and x.element_size() > 1


def is_counted(t: Tensor) -> bool:
    """Return whether the host knows at once how many elements of `t` an operation found."""
    return t.device.type == "cpu"


class Codec:
    """The coding of one value of a program: the smallest one in the calls so far.

    Escapes are counted in the first call, the second, the fourth, the eighth... and where there were far more of them
    than expected; in between nothing waits for numbers.

    Attributes:
        width: None where the value itself is smaller than its code, or so small that a code is not worth its time.
        wide: 8 bits are expected.
        due: the next call counts.
        room: for escapes, on an accelerator.
    """

    def __init__(self, wide: bool = False) -> None:
        self.calls, self.escapes, self.wide = 0, 0, wide
        self.width: int | None = None
        self.room: int | None = None
        self.due = True

    def asks(self, x: Tensor) -> bool:
        """Return whether the next call makes a code of `x`, or counts, and so needs the prediction."""
        self.calls += 1
        self.due = self.due or self.calls & (self.calls - 1) == 0
        return (self.due or self.width is not None) and _torch.is_plain(x) and pays_for(x, x.nbytes)

    def encode(self, x: Tensor, prediction: Prediction) -> Code | None:
        """Return the code of `x`, or None where keeping `x` takes less."""
        like = prediction.like
        if x.shape != like.shape or x.dtype != like.dtype:
            return None
        if _torch.is_fake(x) or _torch.is_fake(like):  # as long as such a code is wont to be
            return encode(x, prediction, 8 if self.wide else TYPICAL_WIDTH, usual_escapes(x, x.numel()))
        if self.due and not _torch.is_capturing(x):
            self._choose(x, prediction)
        width = self.width  # another thread may choose another one
        if width is None:
            return None
        code = encode(x, prediction, width, self.room)
        self.due = self.room is None and len(code.values) > 2 * self.escapes + x.numel() // RECOUNTED
        return code if code.nbytes - code.words.nbytes < x.nbytes else None

    def _choose(self, x: Tensor, prediction: Prediction) -> None:
        """Choose the width of the smallest code of `x`, with the time that escapes take."""
        counts = dict(zip(WIDTHS, count_escapes(x, prediction), strict=True))
        n, size = x.numel() * (1 + x.is_complex()), x.element_size() // (1 + x.is_complex())
        nbytes = {w: nbytes_of(n, size, w, counts[w]) for w in WIDTHS}
        best = min(WIDTHS, key=lambda w: nbytes[w] + ESCAPE_COST * counts[w])
        self.due = False
        self.width = best if nbytes[best] < x.nbytes else None
        self.escapes = counts[best]
        self.room = None if is_counted(x) else int(ROOM_FACTOR * self.escapes) + MIN_ROOM


def usual_escapes(x: Tensor, n: int) -> int:
    """Return how many escapes the code of a tensor like `x`, of n elements, is wont to have."""
    return int(TYPICAL_ESCAPES * n * (1 + x.is_complex()))


def expected(x: Tensor, n: int) -> Code:
    """Return a code of a tensor like `x`, of `n` elements, without numbers, as large as such are wont to be."""
    return empty_code(x, n * (1 + x.is_complex()), TYPICAL_WIDTH, usual_escapes(x, n))

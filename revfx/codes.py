"""Codes: what an inverse that rounds misses, so that prediction and code together are the value, bit for bit.

Forward: `code = encode(x, predicted)`, where `predicted` is what the inverse gives; backward: `x = decode(predicted,
code)`. Numbers of one sign and dtype are ordered as their bits are, read as integers, so the distance k of x from its
prediction is a small integer nearly everywhere. It is stored in 0, 2, 4 or 8 bits an element; where it does not fit, an
*escape* stores x itself. So whatever x and the prediction are (NaN, inf, -0, of different signs), x comes back; and
where the prediction was made by a kernel that does not round alike every time, an element is off by rounding, no more.
(One exception, as no kernel makes them: of 16 bits, a NaN of nearly all ones next to a prediction near 0 comes as 0.)

Bytes of a code of n elements of b bytes: n*width/8 + (4 + b)*escapes. After the "bits" by which MacKay et al. (2018,
https://arxiv.org/abs/1810.10999) and Maclaurin et al. (2015, https://arxiv.org/abs/1502.03492) make fixed-point
arithmetic reversible; here the arithmetic is the model's own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from revfx import _torch
from revfx.layout import flat, is_dense


WIDTHS = (0, 2, 4, 8)
SLOW = 4  # bytes
SMALL = 1 << 12  # bytes: a code of so few is not worth its time
GROUPED = 1 << 14  # elements from which escapes are looked for in groups of eight
TYPICAL, USUAL = 2, 0.018  # bits, and the share of escapes, that a code is taken to have where there are no numbers
MANY = 64  # one escape in so many elements, besides twice what was measured, has codes measured again
HEADROOM, LEAST = 1.5, 64  # how many escapes are made room for on an accelerator, of what was seen

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Code:
    """The distances of a value from its prediction in `width` bits an element, packed into bytes (none of width 0), and
    for the elements at `positions`, in the order of memory, their bits.

    `lost` counts the escapes for which there was no room, on a device where the host does not know how many there are.
    """

    width: int
    packed: Tensor | None
    positions: Tensor
    bits: Tensor
    lost: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that the code takes."""
        packed = 0 if self.packed is None else self.packed.numel()
        return packed + self.positions.numel() * (self.positions.element_size() + self.bits.element_size())


def pays_for(x: Tensor, nbytes: int) -> bool:
    """Return whether a code of `x`, of that many bytes, may be worth its time."""
    return nbytes > SMALL and (x.is_floating_point() or x.is_complex())


class Codec:
    """How one value of a program is coded: what the calls so far have shown to be smallest.

    The distances are measured in the first call, the second, the fourth, the eighth... and where there were far more
    escapes than expected; in between nothing waits for numbers. `width` None: the value itself is smaller, or so small
    that a code is not worth its time.
    """

    def __init__(self) -> None:
        self.calls = self.escapes = 0
        self.width: int | None = None
        self.capacity: int | None = None
        self.due = True

    def asks(self, x: Tensor) -> bool:
        """Return whether the next call makes a code of `x`, or measures, and so needs the prediction."""
        self.calls += 1
        self.due = self.due or self.calls & (self.calls - 1) == 0
        return _torch.is_plain(x) and pays_for(x, x.nbytes) and (self.due or self.width is not None)

    def encode(self, x: Tensor, predicted: Tensor, spent: bool = False) -> Code | None:
        """Return the code of `x`, or None where keeping `x` takes less; `spent`: see `encode`."""
        if x.shape != predicted.shape or x.dtype != predicted.dtype:
            return None
        if _torch.is_fake(predicted):
            return _expected(x)
        if self.due:
            self.due = False
            self.width, self.escapes = cheapest(x, predicted)
            self.capacity = None if is_counted(x) else int(HEADROOM * self.escapes) + LEAST
        if self.width is None:
            return None
        code = encode(x, predicted, self.width, self.capacity, spent)
        self.due = self.capacity is None and code.positions.numel() > 2 * self.escapes + x.numel() // MANY
        return code if code.nbytes < x.nbytes else None


def encode(x: Tensor, predicted: Tensor, width: int, capacity: int | None = None, spent: bool = False) -> Code:
    """Return the code of `x`, next to `predicted`, in `width` bits an element; with room for `capacity` escapes, where
    the host must not wait to learn how many there are. `spent`: the prediction's memory may be written to.

    >>> code = encode(x, y - h, 2)
    >>> torch.equal(decode(y - h, code), x)
    True
    """
    p = _bits(predicted)
    bits = _bits(x if x.stride() == predicted.stride() else torch.empty_like(predicted).copy_(x))
    far = 2 * width == 8 * p.element_size()  # so many bits that from infinity it is not far to the negative numbers
    packed, escaped = _narrowed(torch.sub(bits, p, out=p) if spent and not far else bits - p, width)
    if far:
        escaped |= ((bits ^ p) >> 15).to(torch.bool)
    if capacity is None:
        positions, lost = _positions(escaped), None
    else:
        found = torch.nonzero_static(escaped, size=capacity, fill_value=0)
        positions, lost = found.view(-1), (torch.count_nonzero(escaped) - capacity).clamp_(min=0)
    return Code(width, packed, positions.to(torch.int32), bits.index_select(0, positions), lost)


def decode(predicted: Tensor, code: Code) -> Tensor:
    """Return the value of which `code` was made, with the strides of `predicted`."""
    p = _bits(predicted)
    if code.packed is None:
        bits = p.clone()
    else:
        bits = _widened(code.packed, code.width, p)
        if p.element_size() == 2:
            # A prediction that is not quite what it was may be so near to 0 that k takes it beyond, to a NaN. Of wider
            # numbers one in 2^40 is: as near to 0 as the last bit of what was added, and next to a multiple of that.
            torch.maximum(bits, (p & torch.iinfo(p.dtype).max).neg_(), out=bits)
        bits += p
    bits.index_put_((code.positions,), code.bits)
    return _unbits(bits, predicted)


def cheapest(x: Tensor, predicted: Tensor) -> tuple[int | None, int]:
    """Return the width of the cheapest code of `x`, None where `x` itself is smaller, and how many escapes it has.

    The time that an escape takes counts as `SLOW` bytes. The host waits for the numbers.
    """
    k = _bits(x if x.stride() == predicted.stride() else torch.empty_like(predicted).copy_(x)) - _bits(predicted)
    beyond = [torch.count_nonzero((k + (1 << w - 1)) >> w if w else k) for w in WIDTHS]
    escapes = dict(zip(WIDTHS, torch.stack(beyond).tolist(), strict=True))
    size = {w: k.numel() * w / 8 + n * (4 + k.element_size()) for w, n in escapes.items()}
    best = min(WIDTHS, key=lambda w: size[w] + SLOW * escapes[w])
    return (best, escapes[best]) if size[best] < x.nbytes else (None, 0)


# --- bits
def _bits(t: Tensor) -> Tensor:
    """Return the bits of a tensor as integers, in the order of memory."""
    t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    return flat(t).view(_INTEGER[t.element_size()])


def _unbits(bits: Tensor, like: Tensor) -> Tensor:
    t = bits.view(like.dtype)
    return t.as_strided(like.shape, like.stride()) if is_dense(like) else t.view(like.shape)


# Four numbers of two bits, each in a byte of one int32, come to lie beside each other in its highest byte by one
# multiplication; two of four bits, in an int16, likewise.
_FIELDS = {2: (torch.int32, 1 << 24 | 1 << 18 | 1 << 12 | 1 << 6, 24), 4: (torch.int16, 1 << 8 | 1 << 4, 8)}


def _narrowed(k: Tensor, width: int) -> tuple[Tensor | None, Tensor]:
    """Return the lowest `width` bits of integers, packed, and a byte for each that is other than zero where it has
    more; in eights, filled up. The integers are used up.
    """
    if width == 0:
        return None, k.to(torch.bool)
    if width == 8:
        return k.to(torch.uint8), k.add_(128).bitwise_right_shift_(8).to(torch.bool)
    n = k.numel()
    k.clamp_(-(1 << (width - 1)) - 1, 1 << (width - 1))  # those next beyond stand for all others
    if n % 8:
        low = k.new_zeros(n + -n % 8, dtype=torch.int8)
        low[:n] = k
    else:
        low = k.to(torch.int8)
    words = low.view(torch.int64)
    # the sign of an integer that fits is repeated in the highest of its bits
    escaped = (words >> (8 - width)).bitwise_xor_(words).bitwise_and_(_repeated(1 << (width - 1)))
    dtype, gather, shift = _FIELDS[width]
    fields = words.bitwise_and_(_repeated((1 << width) - 1)).view(dtype)
    return fields.mul_(gather).bitwise_right_shift_(shift).to(torch.uint8), escaped.view(torch.uint8)


def _repeated(byte: int) -> int:
    return int.from_bytes(bytes([byte] * 8), "little")


def _widened(packed: Tensor, width: int, like: Tensor) -> Tensor:
    """Return the integers whose lowest bits were packed, as many and of the dtype as `like`."""
    if width == 8:
        return packed.view(torch.int8).to(like.dtype)
    table = like.new_empty(256, dtype=_FIELDS[width][0]) if _torch.is_fake(like) else _table(width, like.device)
    low = table.index_select(0, packed.to(torch.int32)).view(torch.int8)
    return (low[: like.numel()] if low.numel() != like.numel() else low).to(like.dtype)


@functools.cache
def _table(width: int, device: torch.device) -> Tensor:
    """Return for each byte the integers whose lowest bits it holds, each in a byte of one number."""
    fields = torch.arange(256).unsqueeze(1) >> torch.arange(0, 8, width)
    half = 1 << (width - 1)
    return ((fields + half) % (1 << width) - half).to(torch.int8).view(_FIELDS[width][0]).view(-1).to(device)


def _positions(escaped: Tensor) -> Tensor:
    """Return where bytes are not zero, int64; of many in two steps, by groups of eight."""
    if escaped.numel() < GROUPED or escaped.numel() % 8:
        return escaped.nonzero().view(-1)
    groups = escaped.view(torch.int64).nonzero().view(-1)
    row, column = escaped.view(-1, 8).index_select(0, groups).nonzero().unbind(1)
    return torch.add(column, groups.index_select(0, row), alpha=8)


def is_counted(t: Tensor) -> bool:
    """Return whether the host knows at once how many elements of `t` an operation found."""
    return t.device.type == "cpu"


def _expected(x: Tensor) -> Code:
    """Return a code of a tensor without numbers, as large as such are wont to be."""
    n = x.numel() * (2 if x.is_complex() else 1)
    escapes = int(USUAL * n)
    packed = x.new_empty(-(-n * TYPICAL // 8), dtype=torch.uint8)
    bits = x.new_empty(escapes, dtype=_INTEGER[x.nbytes // max(n, 1) or 4])
    return Code(TYPICAL, packed, x.new_empty(escapes, dtype=torch.int32), bits)

"""Codes: what an inverse that rounds misses, so that prediction and code together are the value, bit for bit.

Forward: `code = encode(x, predicted)`, where `predicted` is what the inverse gives; backward: `x = decode(predicted,
code)`. Numbers of one sign and dtype are ordered as their bits are, read as integers, so the distance k of x from its
prediction is a small integer nearly everywhere. It is stored in 0, 2, 4 or 8 bits an element. Where one of four
neighbours needs more, all four are an *escape*, which stores 8 bits of each; where 8 are too few, it is *far*, and
stores the four values; where all elements have 8 bits, single ones are far. So whatever x and the prediction are (NaN,
inf, -0, of different signs), x comes back; and where the prediction was made by a kernel that does not round alike
every time, an element is off by rounding, no more.

Bytes of a code of n elements of b bytes: n*width/8 + (2 + 4)*escapes + (8 + 4*b)*far ones, in 8 bits n + (2 + b)*far
ones. After the "bits" by which MacKay et al. (2018, https://arxiv.org/abs/1810.10999) and Maclaurin et al. (2015,
https://arxiv.org/abs/1502.03492) make fixed-point arithmetic reversible; here the arithmetic is the model's own.
"""

from __future__ import annotations

import functools
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from revfx import _torch
from revfx.layout import flat, is_dense


WIDTHS = (0, 2, 4, 8)
FOUR = 4  # elements that escape together: as distances of 8 bits, they are one int32
FAR = 128  # a distance that 8 bits do not hold; in 8 bits both 128 and -128 are -128, which stands for all such
BLOCK = 1 << 16  # escapes and far ones are found by the lowest 16 bits of where they are
SLOW = 2  # bytes
FEW = 32  # escapes, which are not worth the time to make them small
MIN_CODE_BYTES = 1 << 12  # bytes: a code of so few is not worth its time
TYPICAL, USUAL = 2, 0.018  # bits, and escapes an element, that a code is taken to have where there are no numbers
foreseen = ContextVar("revfx_foreseen", default=TYPICAL)  # bits, while steps run on fake tensors
MANY = 64  # one escape in so many elements, besides twice what was measured, has codes measured again
HEADROOM, LEAST = 1.5, 64  # how many escapes are made room for on an accelerator, of what was seen

Room = tuple[int, int]  # for so many escapes, and so many far ones
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Code:
    """The distances of a value from its prediction, in the order of memory, by fours.

    `packed`: `width` bits of each, in bytes (None of width 0, and of width 8, whose distances are `near`). `near`: 8
    bits of each in the escapes, which lie at `where`. `values`: the bits of the fours at `far` (of width 8: of the
    elements there), None where there are none. `lost` counts those that found no room, where the host can't know.
    """

    width: int
    packed: Tensor | None
    where: Tensor | None
    near: Tensor | None
    far: Tensor | None
    values: Tensor | None
    lost: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that the code takes."""
        return sum([t.nbytes for t in (self.packed, self.where, self.near, self.far, self.values) if t is not None])

    @property
    def escapes(self) -> int:
        """How many escapes and far ones there are."""
        return sum([len(t) for t in (self.where, self.far) if t is not None])


def pays_for(x: Tensor, nbytes: int) -> bool:
    """Return whether a code of `x`, of that many bytes, may be worth its time."""
    return nbytes > MIN_CODE_BYTES and (x.is_floating_point() or x.is_complex())


class Codec:
    """How one value of a program is coded: what the calls so far have shown to be smallest.

    The distances are measured in the first call, the second, the fourth, the eighth... and where there were far more
    escapes than expected; in between nothing waits for numbers. `wide`: 8 bits are expected. `width` None: the value
    itself is smaller, or so small that a code is not worth its time.
    """

    def __init__(self, wide: bool = False) -> None:
        self.calls, self.escapes, self.wide = 0, 0, wide
        self.width: int | None = None
        self.room: Room | None = None
        self.due, self.direct = True, False

    def asks(self, x: Tensor) -> bool:
        """Return whether the next call makes a code of `x`, or measures, and so needs the prediction."""
        self.calls += 1
        self.due = self.due or self.calls & (self.calls - 1) == 0
        return _torch.is_plain(x) and pays_for(x, x.nbytes) and (self.due or self.width is not None)

    def encode(self, x: Tensor, predicted: Tensor, spent: bool = False) -> Code | None:
        """Return the code of `x`, or None where keeping `x` takes less; `spent`: see `encode`."""
        if x.shape != predicted.shape or x.dtype != predicted.dtype:
            return None
        if _torch.is_fake(predicted):  # as long as such a code is wont to take
            escapes = int(USUAL * x.numel() * (1 + x.is_complex()))
            return encode(x, predicted, 8 if self.wide else foreseen.get(), (escapes, 0), spent)
        if self.due:
            self.due = False
            self.width, self.escapes, far = cheapest(x, predicted)
            self.direct = self.escapes <= FEW
            room = int(HEADROOM * self.escapes) + LEAST, int(HEADROOM * far) + LEAST
            self.room = None if is_counted(x) else room
            self.escapes += far
        if self.width is None:
            return None
        code = encode(x, predicted, self.width, self.room, spent, self.direct)
        self.due = self.room is None and code.escapes > 2 * self.escapes + x.numel() // MANY
        return code if code.nbytes < x.nbytes else None


def encode(
    x: Tensor, predicted: Tensor, width: int, room: Room | None = None, spent: bool = False, direct: bool = False
) -> Code:
    """Return the code of `x`, next to `predicted`, in `width` bits an element; with `room` for so many escapes and far
    ones, where the host must not wait to learn how many there are. `spent`: the prediction's memory may be written to.
    `direct`: escapes store the values at once, which takes less time.

    >>> code = encode(x, y - h, 2)
    >>> torch.equal(decode(y - h, code), x)
    True
    """
    bits, p = _both(x, predicted)
    distances = _distances(bits, p, spent)
    fours, direct = distances.view(torch.int32), direct and width < 8
    near, where, packed = (None if direct else fours), None, None
    escapes = far = lost = without = values = None
    if width < 8:
        half = 1 << width >> 1
        distances.add_(half)
        escapes, lost = _found(_beyond(fours, width), room and room[0])
        if not direct:
            where, near = escapes.to(torch.uint16), fours.index_select(0, escapes)
            distances = near.view(torch.int8).sub_(half)
        packed = _packed(fours, width)
    if not direct:
        beyond = distances == -FAR
        found = beyond.view(torch.int32) if width < 8 else _blocks_marked(beyond)
        far, without = _found(found, room and room[1])
        far = far if escapes is None or not len(far) else escapes.index_select(0, far)
    far = escapes if direct else far
    if far is not None and len(far):
        values = (bits.view(-1, FOUR) if width < 8 else bits).index_select(0, far)
        far = far if width < 8 else far.to(torch.uint16)
    lost = without if lost is None else lost if without is None else lost + without
    return Code(width, packed, where, near, None if values is None else far, values, lost)


def decode(predicted: Tensor, code: Code) -> Tensor:
    """Return the value of which `code` was made, with the strides of `predicted`."""
    p = _bits(predicted)
    fours = code.near if code.near is not None and code.where is None else _widened(code.packed, code.width, p)
    if code.near is not None and code.where is not None:
        fours.index_put_((_positions(code.where, len(fours)),), code.near)
    bits = fours.view(torch.int8).to(p.dtype)
    if p.element_size() == 2:
        # A prediction that is not quite what it was may be so near to 0 that k takes it beyond, to a NaN. Of wider
        # numbers one in 2^40 is: as near to 0 as the last bit of what was added, and next to a multiple of that.
        torch.maximum(bits, _to_zero(p), out=bits)
    bits += p
    if code.far is not None and code.values is not None:
        far = code.far if code.width < 8 else _positions(code.far, len(bits))
        (bits.view(-1, FOUR) if code.width < 8 else bits).index_put_((far,), code.values)
    return _unbits(bits, predicted)


def cheapest(x: Tensor, predicted: Tensor) -> tuple[int | None, int, int]:
    """Return the width of the cheapest code of `x`, None where `x` itself is smaller; how many escapes and far ones.

    The time that an escape takes counts as `SLOW` bytes. The host waits for the numbers.
    """
    bits, p = _both(x, predicted)
    distances = _distances(bits, p)
    beyond = [_beyond((distances + (1 << w >> 1)).view(torch.int32), w) for w in WIDTHS if w < 8]
    far = distances == -FAR
    counts = torch.stack([t.count_nonzero() for t in (*beyond, far.view(torch.int32), far)])
    *found, fours, ones = counts.tolist()
    n, each, escapes = bits.numel(), bits.element_size(), dict(zip(WIDTHS, (*found, 0), strict=True))
    size = {w: n * w / 8 + escapes[w] * (2 + 4) + fours * (8 + FOUR * each) for w in WIDTHS}
    size[8] = n + ones * (2 + each)
    best = min(WIDTHS, key=lambda w: size[w] + SLOW * escapes[w])
    return (best, escapes[best], fours if best < 8 else ones) if size[best] < x.nbytes else (None, 0, 0)


# --- bits
def _bits(t: Tensor) -> Tensor:
    """Return the bits of a tensor as integers, in the order of memory; filled up to a multiple of four."""
    t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    bits = flat(t).view(_INTEGER[t.element_size()])
    return pad(bits, (0, -bits.numel() % FOUR)) if bits.numel() % FOUR else bits


def _both(x: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    alike = x if x.stride() == predicted.stride() else torch.empty_like(predicted).copy_(x)
    return _bits(alike), _bits(predicted)


def _unbits(bits: Tensor, like: Tensor) -> Tensor:
    t = bits.view(like.dtype)
    return t.as_strided(like.shape, like.stride()) if is_dense(like) else t[: like.numel()].view(like.shape)


def _distances(bits: Tensor, p: Tensor, spent: bool = False) -> Tensor:
    """Return in 8 bits each how far numbers are from predictions, which may be written to where they are `spent`."""
    if p.element_size() == 2:
        k = bits - p
        k.masked_fill_(k < _to_zero(p), FAR)
    else:
        k = torch.sub(bits, p, out=p) if spent else bits - p
    return k.clamp_(-FAR, FAR).to(torch.int8)


def _to_zero(p: Tensor) -> Tensor:
    """Return the distance of a number of 16 bits to the zero of its sign."""
    return (p & torch.iinfo(p.dtype).max).neg_()


# Four numbers of two bits, each in a byte of one int32, come to lie beside each other in its highest byte by one
# multiplication; two of four bits, in an int16, likewise.
_FIELDS = {2: (torch.int32, 1 << 24 | 1 << 18 | 1 << 12 | 1 << 6, 24), 4: (torch.int16, 1 << 8 | 1 << 4, 8)}


def _beyond(fours: Tensor, width: int) -> Tensor:
    """Return a number for each four distances, taken from where those of `width` bits begin, that is other than zero
    where these need more, or where a block begins.
    """
    return _blocks_marked(fours & _repeated(256 - (1 << width)))


def _blocks_marked(found: Tensor) -> Tensor:
    if len(found) > BLOCK:
        found[::BLOCK] = 1
    return found


def _packed(fours: Tensor, width: int) -> Tensor | None:
    """Return the lowest `width` bits of distances in bytes; these are used up."""
    if width == 0:
        return None
    dtype, gather, shift = _FIELDS[width]
    fields = fours.bitwise_and_(_repeated((1 << width) - 1))
    fields = fields if dtype == fields.dtype else fields.view(dtype)
    return fields.mul_(gather).bitwise_right_shift_(shift).to(torch.uint8)


def _repeated(byte: int) -> int:
    return int.from_bytes(bytes([byte] * FOUR), "little", signed=True)


def _widened(packed: Tensor | None, width: int, like: Tensor) -> Tensor:
    """Return the distances that were packed, four in an int32, as many as `like` has."""
    if packed is None:
        return like.new_zeros(like.numel() // FOUR, dtype=torch.int32)
    table = like.new_empty(256, dtype=_FIELDS[width][0]) if _torch.is_fake(like) else _table(width, like.device)
    found = table.index_select(0, packed.to(torch.int32))
    return found if found.dtype == torch.int32 else found.view(torch.int32)


@functools.cache
def _table(width: int, device: torch.device) -> Tensor:
    """Return for each byte the distances that it holds, each in a byte of one number."""
    fields = torch.arange(256).unsqueeze(1) >> torch.arange(0, 8, width)
    return (fields % (1 << width) - (1 << width - 1)).to(torch.int8).view(_FIELDS[width][0]).view(-1).to(device)


def _found(words: Tensor, room: int | None) -> tuple[Tensor, Tensor | None]:
    """Return where numbers are not zero, in order (with `room` for more: the last place), and how many found none."""
    if room is None:
        return words.nonzero().view(-1), None
    found = torch.nonzero_static(words, size=room, fill_value=-1).view(-1).remainder_(len(words))
    return found, (words.count_nonzero() - room).clamp_(min=0)


def _positions(where: Tensor, n: int) -> Tensor:
    """Return where escapes or far ones are among `n`, by their lowest 16 bits; each block's first is at its start."""
    places = where.to(torch.int32)
    if n > BLOCK:
        places += (torch.cumsum(places == 0, 0, dtype=torch.int32) - 1) * BLOCK
        places.clamp_(max=n - 1)
    return places


def is_counted(t: Tensor) -> bool:
    """Return whether the host knows at once how many elements of `t` an operation found."""
    return t.device.type == "cpu"


def expected(x: Tensor, n: int) -> Code:
    """Return a code of a tensor of `n` elements without numbers, as large as such are wont to be."""
    n *= 2 if x.is_complex() else 1
    escapes = int(USUAL * n)
    sizes = (-(-n // FOUR), torch.uint8), (escapes, torch.uint16), (escapes, torch.int32)
    packed, where, near = (x.new_empty(size, dtype=dtype) for size, dtype in sizes)
    return Code(TYPICAL, packed, where, near, None, None)

"""Codes by operators of torch: the reference, which runs on every device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import pad

from revfx import _torch
from revfx.codes.format import (
    BLOCK,
    GROUP,
    ROW,
    SAMPLE,
    WIDTHS,
    Code,
    Prediction,
    bits_of,
    marks_of,
    packed_bytes,
    tensor_of,
    with_layout_of,
)
from revfx.layout import flatten_storage


_GATHER = 0x0102040810204080  # the sum of 2^(7k): a product moves the lowest bits of eight bytes into the highest byte


def encode(x: Tensor, prediction: Prediction, width: int, capacity: int | None = None) -> Code:
    """Return the code of `x`; see `revfx.codes.encode`."""
    x, distances = _distances(x, prediction)
    n = x.numel()
    distances = _pad_to_multiple(distances, BLOCK).add_(_half(width))
    is_escape = (distances & -(1 << width) != 0).view(-1)
    packed = _pack(distances, width)[: packed_bytes(n, width)]
    counts = _pad_to_multiple(is_escape, GROUP).view(-1, GROUP).sum(1)
    ends = counts.cumsum(0)
    spans = torch.stack((ends - counts, ends), 1).to(torch.int32)
    if capacity is None:
        index, count = is_escape.nonzero().view(-1), None
    else:
        index, count = torch.nonzero_static(is_escape, size=capacity, fill_value=n - 1).view(-1), ends[-1:]
        spans.clamp_(max=capacity)
    places = (index % GROUP).to(torch.int16)
    return Code(width, packed, spans, x.index_select(0, index), places, _fingerprint(x), count)


def decode(prediction: Prediction, code: Code, reusable: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the tensor with this code, and its fingerprint; see `revfx.codes.decode`."""
    predicted = prediction.compute().like
    p = bits_of(predicted)
    bits = ordered(ordered(p).add_(_unpack(code, p)))
    ends = code.spans[:, 1].contiguous()
    numbers = torch.arange(len(code.values), dtype=torch.int32, device=p.device)
    groups = torch.searchsorted(ends, numbers, right=True).clamp_(max=len(ends) - 1)
    bits.index_put_((groups * GROUP + code.places,), code.values)
    return tensor_of(bits, predicted), _fingerprint(bits)


def count_escapes(x: Tensor, prediction: Prediction) -> list[int]:
    """Return the number of escapes of the code of `x` in each width; the host waits for the numbers."""
    _, distances = _distances(x, prediction)
    return torch.stack([(distances + _half(w) & -(1 << w)).count_nonzero() for w in WIDTHS]).tolist()


def fingerprint(t: Tensor) -> Tensor:
    """Return the fingerprint of a tensor of any dtype."""
    return _fingerprint(bits_of(t))


def pack_marks(t: Tensor, positive: bool = False) -> Tensor:
    """Return one bit per element of a tensor; see `revfx.codes.pack_marks`."""
    bits = flatten_storage(marks_of(t, positive)).view(torch.uint8)
    if bits.numel() % 8:
        bits = torch.cat((bits, bits.new_zeros(-bits.numel() % 8)))
    return bits.view(torch.int64).mul_(_GATHER).bitwise_right_shift_(56).to(torch.uint8)


def unpack_marks(packed: Tensor, elements: int, dtype: torch.dtype) -> Tensor:
    """Return zeros and ones from their bits; see `revfx.codes.unpack_marks`."""
    return _bits_of_bytes(packed.device).index_select(0, packed.int()).view(torch.uint8)[:elements].to(dtype)


@functools.cache
def _bits_of_bytes(device: torch.device) -> Tensor:
    """Return, for each value of a byte, its bits as eight bytes in an int64."""
    bits = torch.arange(256, dtype=torch.uint8, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return bits.to(torch.uint8).view(torch.int64).flatten()


def ordered(bits: Tensor) -> Tensor:
    """Map bits to integers in the order of the numbers, and these to bits."""
    signs = bits >> 8 * bits.element_size() - 1
    return signs.bitwise_and_(torch.iinfo(bits.dtype).max).bitwise_xor_(bits)


def _half(width: int) -> int:
    return 1 << width >> 1


def _distances(x: Tensor, prediction: Prediction) -> tuple[Tensor, Tensor]:
    """Return the bits of `x`, and its distances from the prediction."""
    predicted = prediction.compute().like
    x = bits_of(with_layout_of(predicted, x))
    return x, ordered(x).sub_(ordered(bits_of(predicted)))


def _pad_to_multiple(t: Tensor, multiple: int) -> Tensor:
    missing = -t.numel() % multiple
    return pad(t, (0, missing)) if missing else t


def _pack(distances: Tensor, width: int) -> Tensor:
    """Return the lowest `width` bits of each distance, in bytes."""
    if width == 0:
        return distances.new_empty(0, dtype=torch.uint8)
    fields = distances.to(torch.uint8).view(-1, 8 // width, width * BLOCK // 8)  # keeps the lowest 8 bits
    packed = fields[:, 0].bitwise_and((1 << width) - 1)
    for number in range(1, 8 // width):
        packed |= fields[:, number].bitwise_and((1 << width) - 1) << number * width
    return packed.view(-1)


def _unpack(code: Code, p: Tensor) -> Tensor:
    """Return the distances in a code from the bits `p` of the prediction, as integers of their dtype."""
    width, n = code.width, p.numel()
    if width == 0:
        return p.new_zeros(())
    packed = _pad_to_multiple(code.packed, width * BLOCK // 8).view(-1, 1, width * BLOCK // 8)
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=p.device).view(1, -1, 1)
    fields = (packed >> shifts).bitwise_and_((1 << width) - 1).to(torch.int8 if width < 8 else torch.int16)
    return fields.sub_(_half(width)).view(-1)[:n].to(p.dtype)


def _fingerprint(bits: Tensor) -> Tensor:
    """Return the fingerprint of a tensor with these bits."""
    n = bits.numel()
    sample = bits[:: max(1, n // SAMPLE)][:SAMPLE]
    sample = pad(sample, (0, SAMPLE - sample.numel()))
    rows = _pad_to_multiple(_to_words(bits), ROW).view(-1, ROW)
    get_weights = _weights.__wrapped__ if _torch.is_fake(bits) else _weights  # fake tensors do not outlive their mode
    sums = (rows * get_weights(bits.device)).sum(1)
    keys = torch.arange(1, len(rows) + 1, device=bits.device) * _to_signed(0x9E3779B97F4A7C15)
    keys = (keys ^ (keys >> 32 & 0xFFFFFFFF)) | 1
    return torch.cat(((sums * keys).sum().view(1), sample.view(torch.int64)))


def _to_words(bits: Tensor) -> Tensor:
    """Return memory as unsigned words of 32 bits, in int64; zeros complete the last one."""
    size = bits.element_size()
    if size < 4:
        per_word = 4 // size
        fields = _pad_to_multiple(bits, per_word).view(-1, per_word).long() & (1 << 8 * size) - 1
        shifts = torch.arange(0, 32, 8 * size, device=bits.device)
        return (fields << shifts).sum(1)
    return bits.view(torch.int32).long() & 0xFFFFFFFF


def _to_signed(number: int) -> int:
    """Return the number with the same 64 bits in int64."""
    return number - (1 << 64) if number >> 63 else number


@functools.cache
def _weights(device: torch.device) -> Tensor:
    w = torch.arange(1, ROW + 1, device="cpu") * 0x9E3779B1 & 0xFFFFFFFF
    w = (w ^ w >> 15) * 0x85EBCA6B & 0xFFFFFFFF
    return (w ^ w >> 13).to(device)

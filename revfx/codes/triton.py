"""Codes on accelerators, by the kernels of `kernels.py`."""

from __future__ import annotations

import operator
import threading
from typing import Any

import torch
from torch import Tensor

from revfx import _torch
from revfx.codes import aten, kernels
from revfx.codes.format import (
    SAMPLE,
    Code,
    Prediction,
    bits_of,
    groups_of,
    laid_out_as,
    memory_for,
    packed_bytes,
    word_count,
)


POOL = 512  # zeros that are made at once, for some fifty codes
KINDS = {None: kernels.GIVEN.value, operator.sub: kernels.DIFFERENCE.value, operator.add: kernels.SUM.value}
FUSED = {  # dtypes of the differences and sums that kernels compute, with those of the numbers
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
    torch.complex64: "float32",
    torch.complex128: "float64",
}


def _compute_unless_fused(prediction: Prediction) -> Prediction:
    """Return the prediction as one that kernels can compute, or computed."""
    return prediction if prediction.like.dtype in FUSED else prediction.compute()


def _operands(prediction: Prediction) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return the bits of both tensors of a prediction, or twice those of one, and the constants of its kernels."""
    parts = [bits_of(t) for t in prediction.tensors]
    names = [None if prediction.by is None else FUSED[t.dtype] for t in prediction.tensors]
    constants = {"SIZE": parts[0].element_size(), "KIND": KINDS[prediction.by], "FLOAT": names[0], "OTHER": names[-1]}
    return parts[0], parts[-1], constants


def threads_of(element_size: int) -> int:
    """Return the threads of a program; with more of them, elements of 8 bytes fit in registers."""
    return 256 if element_size == 8 else 128


def _launch(kernel: Any, bits: Tensor, *args: Any, **constants: Any) -> None:
    """Run a kernel on the groups of `bits`, on the current stream of its device."""
    index = None if bits.is_cpu else bits.device.index
    num_warps = threads_of(bits.element_size()) // (64 if torch.version.hip else 32)
    with torch.accelerator.device_index(index):
        kernel[(groups_of(bits.numel()),)](*args, num_warps=num_warps, enable_fp_fusion=False, **constants)


_pools = threading.local()  # by device and stream, zeros that one fill made for many kernels, and how many are taken


def _zeros(like: Tensor, n: int) -> Tensor:
    """Return `n` zeros in int64, on the device of a tensor and for its current stream."""
    if _torch.is_capturing(like):
        return like.new_zeros(n, dtype=torch.int64)  # each run of a captured graph clears them
    key = like.device, None if like.is_cpu else torch.accelerator.current_stream(like.device)
    pools: dict[Any, tuple[Tensor, int]] = _pools.__dict__
    pool, taken = pools.get(key, (None, 0))
    if pool is None or taken + n > POOL:
        pool, taken = like.new_zeros(POOL, dtype=torch.int64), 0
    pools[key] = pool, taken + n + n % 2  # at multiples of 16 bytes, which kernels are compiled for
    return pool[taken : taken + n]


def _step(n: int) -> int:
    """Return the distance of elements of the sample."""
    return max(1, n // SAMPLE)


def encode(x: Tensor, prediction: Prediction, width: int, room: int | None = None) -> Code:
    """Return the code of `x` with room for `room` escapes, or for all elements. The host does not wait."""
    prediction = _compute_unless_fused(prediction)
    x = bits_of(laid_out_as(prediction.like, x))
    a, b, constants = _operands(prediction)
    n, size = x.numel(), x.element_size()
    room = n if room is None else room
    counters = _zeros(x, 1 + word_count(size))
    count, words = counters[:1], counters[1:]
    code = Code(
        width,
        packed=x.new_empty(packed_bytes(n, width), dtype=torch.uint8),
        spans=x.new_empty((groups_of(n), 2), dtype=torch.int32),
        values=x.new_empty(room),
        places=x.new_empty(room, dtype=torch.int16),
        words=words,
        count=count,
    )
    _launch(
        kernels.encode_groups, x,
        x, a, b, code.packed, code.spans, code.values, code.places, count, words, n, _step(n), room,
        WIDTH=width, **constants,
    )  # fmt: skip
    return code


def decode(prediction: Prediction, code: Code, spent: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the tensor of which `code` was made, with the strides of the prediction, and its fingerprint."""
    prediction = _compute_unless_fused(prediction)
    like = prediction.like
    a, b, constants = _operands(prediction)
    n = a.numel()
    out = memory_for(like, spent)
    words = _zeros(a, word_count(a.element_size()))
    _launch(
        kernels.decode_groups, a,
        a, b, code.packed, code.spans, code.values, code.places, bits_of(out), words, n, _step(n),
        WIDTH=code.width, **constants,
    )  # fmt: skip
    return out, words


def count_escapes(x: Tensor, prediction: Prediction) -> list[int]:
    """Return how many escapes the code of `x` has in each width; the host waits for the numbers."""
    return aten.count_escapes(x, prediction)


def fingerprint(t: Tensor) -> Tensor:
    """Return the fingerprint of a tensor of any dtype."""
    bits = bits_of(t)
    n, size = bits.numel(), bits.element_size()
    words = _zeros(bits, word_count(size))
    _launch(kernels.fingerprint_groups, bits, bits, words, n, _step(n), SIZE=size)
    return words


def pack_marks(marks: Tensor) -> Tensor:
    """Return booleans, in the order of memory, as bits in bytes; the bytes of `revfx.codes.bits.encode`."""
    marked = bits_of(marks)
    n = marked.numel()
    packed = marked.new_empty(-(-n // 8))
    _launch(kernels.pack_group_marks, marked, marked, packed, n)
    return packed


def unpack_marks(packed: Tensor, elements: int, dtype: torch.dtype) -> Tensor:
    """Return a flat tensor of so many zeros and ones."""
    is_written = dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    out = packed.new_empty(elements, dtype=dtype if is_written else torch.uint8)
    _launch(kernels.unpack_group_marks, out, packed, out, elements)
    return out.to(dtype)

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
    allocate_result,
    bits_of,
    groups_of,
    marks_of,
    packed_bytes,
    with_layout_of,
    word_count,
)


POOL_ZEROS = 512  # zeros of one fill, for some fifty codes
KINDS: dict[Any, int] = {
    None: kernels.GIVEN.value,
    operator.sub: kernels.DIFFERENCE.value,
    operator.add: kernels.SUM.value,
}
FUSED = {  # dtypes of the differences and sums that kernels compute, with those of the numbers
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
    torch.complex64: "float32",
    torch.complex128: "float64",
}


def _operands(prediction: Prediction) -> tuple[Prediction, Tensor, Tensor, dict[str, Any]]:
    """Return a prediction as arguments of kernels.

    Returns:
        the prediction, computed unless kernels can do that.
        the bits of its first tensor.
        the bits of its last tensor, which may be the first one.
        the constants of the kernels.
    """
    if prediction.like.dtype not in FUSED:
        prediction = prediction.compute()
    parts = [bits_of(t) for t in prediction.tensors]
    constants: dict[str, Any] = {"SIZE": parts[0].element_size(), "KIND": KINDS[prediction.by]}
    constants |= {"FLOAT": None, "OTHER": None}
    if prediction.by is not None:
        constants |= {"FLOAT": FUSED[prediction.tensors[0].dtype], "OTHER": FUSED[prediction.tensors[1].dtype]}
    return prediction, parts[0], parts[-1], constants


def threads_of(element_size: int) -> int:
    """Return the threads of a program; elements of 8 bytes need more, to fit in registers."""
    return 256 if element_size == 8 else 128


def _launch(kernel: Any, bits: Tensor, *args: Any, **constants: Any) -> None:
    """Run a kernel on the groups of `bits`, on the current stream of its device."""
    index = None if bits.is_cpu else bits.device.index
    warp_size = 64 if torch.version.hip else 32
    num_warps = threads_of(bits.element_size()) // warp_size
    with torch.accelerator.device_index(index):
        kernel[(groups_of(bits.numel()),)](*args, num_warps=num_warps, enable_fp_fusion=False, **constants)


_pools = threading.local()  # by device and stream: zeros of one fill for many kernels, and the number in use


def _zeros(like: Tensor, n: int) -> Tensor:
    """Return `n` zeros in int64, on the device of a tensor and for its current stream."""
    if _torch.is_capturing(like):
        return like.new_zeros(n, dtype=torch.int64)  # each run of a captured graph clears them
    stream = None if like.is_cpu else torch.accelerator.current_stream(like.device)
    pools: dict[Any, tuple[Tensor, int]] = _pools.__dict__
    pool, used = pools.get((like.device, stream), (None, 0))
    if pool is None or used + n > POOL_ZEROS:
        pool, used = like.new_zeros(POOL_ZEROS, dtype=torch.int64), 0
    pools[like.device, stream] = pool, used + n + n % 2  # at multiples of 16 bytes, which kernels are compiled for
    return pool[used : used + n]


def _step(n: int) -> int:
    """Return the distance of elements of the sample."""
    return max(1, n // SAMPLE)


def encode(x: Tensor, prediction: Prediction, width: int, capacity: int | None = None) -> Code:
    """Return the code of `x` with `capacity` escapes, or as many as elements. The host does not wait."""
    prediction, a, b, constants = _operands(prediction)
    x = bits_of(with_layout_of(prediction.like, x))
    n, size = x.numel(), x.element_size()
    if capacity is None:
        capacity = n
    counters = _zeros(x, 1 + word_count(size))
    count, words = counters[:1], counters[1:]
    code = Code(
        width,
        packed=x.new_empty(packed_bytes(n, width), dtype=torch.uint8),
        spans=x.new_empty((groups_of(n), 2), dtype=torch.int32),
        values=x.new_empty(capacity),
        places=x.new_empty(capacity, dtype=torch.int16),
        words=words,
        count=count,
    )
    _launch(
        kernels.encode_groups, x,
        x, a, b, code.packed, code.spans, code.values, code.places, count, words, n, _step(n), capacity,
        WIDTH=width, **constants,
    )  # fmt: skip
    return code


def decode(prediction: Prediction, code: Code, reusable: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the tensor with this code, and its fingerprint; see `revfx.codes.decode`."""
    prediction, a, b, constants = _operands(prediction)
    n = a.numel()
    out = allocate_result(prediction.like, reusable)
    words = _zeros(a, word_count(a.element_size()))
    _launch(
        kernels.decode_groups, a,
        a, b, code.packed, code.spans, code.values, code.places, bits_of(out), words, n, _step(n),
        WIDTH=code.width, **constants,
    )  # fmt: skip
    return out, words


def count_escapes(x: Tensor, prediction: Prediction) -> list[int]:
    """Return the number of escapes of the code of `x` in each width; the host waits for the numbers."""
    return aten.count_escapes(x, prediction)


def fingerprint(t: Tensor) -> Tensor:
    """Return the fingerprint of a tensor of any dtype."""
    bits = bits_of(t)
    n, size = bits.numel(), bits.element_size()
    words = _zeros(bits, word_count(size))
    _launch(kernels.fingerprint_groups, bits, bits, words, n, _step(n), SIZE=size)
    return words


def pack_marks(t: Tensor, positive: bool = False) -> Tensor:
    """Return one bit per element of a tensor; see `revfx.codes.pack_marks`."""
    marked = bits_of(marks_of(t, positive))
    n = marked.numel()
    packed = marked.new_empty(-(-n // 8))
    _launch(kernels.pack_group_marks, marked, marked, packed, n)
    return packed


def unpack_marks(packed: Tensor, elements: int, dtype: torch.dtype) -> Tensor:
    """Return a flat tensor of `elements` zeros and ones from their bits."""
    is_written = dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    out = packed.new_empty(elements, dtype=dtype if is_written else torch.uint8)
    _launch(kernels.unpack_group_marks, out, packed, out, elements)
    return out.to(dtype)

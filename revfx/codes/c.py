"""Codes on CPUs, by `codec.c`, which is compiled when revfx is installed."""

from __future__ import annotations

import ctypes
import functools
import operator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from revfx.codes.format import (
    INTEGER,
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


ELEMENTS_PER_THREAD = 1 << 17  # to start a thread takes as long as some thousand elements
BYTES_PER_ELEMENT = 32  # of a fingerprint, which takes so many in the time in which an element is coded
MARKS_PER_ELEMENT = 8  # the same for marks that are packed or unpacked
KINDS: dict[Any, int] = {None: 0, operator.sub: 1, operator.add: 2}
FUSED: dict[tuple[torch.dtype, ...], int] = {
    (t, t): 0 for t in (torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128)
}
FUSED[torch.float32, torch.bfloat16] = 4  # by dtypes: a flag of the library, besides the kind
POINTER, INT, INT64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
VERSION = 2  # of the library's functions; it goes up with every change of their arguments
SIGNATURES: dict[str, tuple[Any, ...]] = {  # results and arguments
    "revfx_version": (INT,),
    "revfx_encode": (POINTER, INT, INT, INT, INT64, *[POINTER] * 7, INT),
    "revfx_take": (None, POINTER, INT, POINTER, POINTER),
    "revfx_decode": (None, INT, INT, INT, INT64, *[POINTER] * 8, INT),
    "revfx_count": (None, INT, INT, INT64, *[POINTER] * 4, INT),
    "revfx_fingerprint": (None, POINTER, INT64, INT, POINTER, INT),
    "revfx_pack_marks": (None, INT, INT, INT64, POINTER, POINTER, POINTER, INT),
    "revfx_unpack_marks": (None, INT, INT64, POINTER, POINTER, POINTER, INT),
}


@functools.cache
def library() -> Any:
    """Return the compiled library, or None if there is none."""
    for path in sorted(Path(__file__).parent.glob("_codec*")):
        try:
            found: Any = ctypes.CDLL(str(path))
            for name, (result, *arguments) in SIGNATURES.items():
                function = getattr(found, name)
                function.restype, function.argtypes = result, arguments
        except (AttributeError, OSError):  # of another platform
            continue
        if found.revfx_version() == VERSION:
            return found
    return None


def _threads(n: int) -> int:
    if n < 2 * ELEMENTS_PER_THREAD:
        return 1
    return min(torch.get_num_threads(), 1 + n // ELEMENTS_PER_THREAD)


@functools.lru_cache(maxsize=1024)
def _sizes(n: int, element_size: int, width: int) -> tuple[int, int, int]:
    """Return the sizes of `packed`, `spans` and `words` of n elements."""
    return packed_bytes(n, width), groups_of(n), word_count(element_size)


def _in_memory(t: Tensor) -> Tensor:
    """Return a tensor with the elements of `t` in the order of memory."""
    if t.is_contiguous() and not t.is_complex() and not t.is_neg():
        return t
    return bits_of(t)


def _operands(prediction: Prediction) -> tuple[Prediction, int, Tensor, int | None]:
    """Return a prediction as arguments of the library.

    Returns:
        the prediction, computed unless the library can do that; it keeps the second operand alive.
        its kind.
        its first operand.
        the address of its second operand, if there is one.
    """
    dtypes = tuple([t.dtype for t in prediction.tensors])
    if prediction.by is None or dtypes not in FUSED:
        prediction = prediction.compute()
        return prediction, KINDS[None], _in_memory(prediction.like), None
    a, b = prediction.tensors
    return prediction, KINDS[prediction.by] | FUSED[dtypes], _in_memory(a), b.data_ptr()


def encode(x: Tensor, prediction: Prediction, width: int, capacity: int | None = None) -> Code:
    """Return the code of `x`; see `revfx.codes.encode`. `capacity` is for devices that can't count."""
    prediction, kind, a, b = _operands(prediction)
    x = _in_memory(with_layout_of(prediction.like, x))
    n, size, lib = a.numel(), a.element_size(), library()
    byte_count, groups, words_length = _sizes(n, size, width)
    packed = torch.empty(byte_count, dtype=torch.uint8)
    spans = torch.empty((groups, 2), dtype=torch.int32)
    words = torch.empty(words_length, dtype=torch.int64)
    count = ctypes.c_int64()
    escapes = lib.revfx_encode(
        width, size, kind, n, x.data_ptr(), a.data_ptr(), b,
        packed.data_ptr(), spans.data_ptr(), words.data_ptr(), ctypes.byref(count), _threads(n),
    )  # fmt: skip
    if not escapes:
        raise MemoryError("there is no memory for the escapes of a code")
    try:
        values = torch.empty(count.value, dtype=INTEGER[size])
        places = torch.empty(count.value, dtype=torch.int16)
    except BaseException:
        lib.revfx_take(escapes, size, None, None)
        raise
    lib.revfx_take(escapes, size, values.data_ptr(), places.data_ptr())
    return Code(width, packed, spans, values, places, words)


def decode(prediction: Prediction, code: Code, reusable: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the tensor with this code, and its fingerprint; see `revfx.codes.decode`."""
    prediction, kind, a, b = _operands(prediction)
    x = allocate_result(prediction.like, reusable)
    words = torch.empty(word_count(a.element_size()), dtype=torch.int64)
    library().revfx_decode(
        code.width, a.element_size(), kind, a.numel(), a.data_ptr(), b,
        code.packed.data_ptr(), code.spans.data_ptr(), code.values.data_ptr(), code.places.data_ptr(), x.data_ptr(),
        words.data_ptr(), _threads(a.numel()),
    )  # fmt: skip
    return x, words


def count_escapes(x: Tensor, prediction: Prediction) -> list[int]:
    """Return the number of escapes of the code of `x` in each width."""
    prediction, kind, a, b = _operands(prediction)
    x = _in_memory(with_layout_of(prediction.like, x))
    counts = (ctypes.c_int64 * 4)()
    library().revfx_count(
        a.element_size(), kind, a.numel(), x.data_ptr(), a.data_ptr(), b,
        ctypes.addressof(counts), _threads(a.numel()),
    )  # fmt: skip
    return list(counts)


def fingerprint(t: Tensor) -> Tensor:
    """Return the fingerprint of a tensor of any dtype."""
    bits = _in_memory(t)
    n, size = bits.numel(), bits.element_size()
    words = torch.empty(word_count(size), dtype=torch.int64)
    threads = _threads(n * size // BYTES_PER_ELEMENT)
    library().revfx_fingerprint(bits.data_ptr(), n, size, words.data_ptr(), threads)
    return words


def pack_marks(t: Tensor, positive: bool = False) -> Tensor:
    """Return one bit per element of a tensor; see `revfx.codes.pack_marks`."""
    if t.dtype.is_complex or t.element_size() == 1:
        t = marks_of(t, positive)
    x, limits = _in_memory(t), _limits(t.dtype)
    n = x.numel()
    packed = torch.empty(-(-n // 8), dtype=torch.uint8)
    library().revfx_pack_marks(
        x.element_size(), positive, n, x.data_ptr(), limits.data_ptr(), packed.data_ptr(),
        _threads(n // MARKS_PER_ELEMENT),
    )  # fmt: skip
    return packed


def unpack_marks(packed: Tensor, elements: int, dtype: torch.dtype) -> Tensor:
    """Return zeros and ones from their bits; see `revfx.codes.unpack_marks`."""
    out = torch.empty(elements, dtype=torch.uint8 if dtype.is_complex else dtype)
    one, threads = _one(out.dtype), _threads(elements // MARKS_PER_ELEMENT)
    library().revfx_unpack_marks(
        out.element_size(), elements, packed.data_ptr(), one.data_ptr(), out.data_ptr(), threads
    )
    return out.to(dtype)


@functools.cache
def _one(dtype: torch.dtype) -> Tensor:
    return torch.ones(1, dtype=dtype)


@functools.cache
def _limits(dtype: torch.dtype) -> Tensor:
    """Return the bits of a number but for the sign, and those of infinity; all bits of a whole number."""
    if not dtype.is_floating_point:
        return torch.full((2,), -1, dtype=torch.int64).view(dtype)
    infinity = torch.tensor([torch.inf], dtype=dtype).view(INTEGER[dtype.itemsize])
    return torch.stack((torch.full_like(infinity, torch.iinfo(infinity.dtype).max), infinity))

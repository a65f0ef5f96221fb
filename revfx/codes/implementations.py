"""The choice of the implementation of codes, by the device of the tensors and the installed packages."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from revfx import _torch
from revfx.codes import aten, c, fake
from revfx.codes.format import Code, Prediction


CHOICE = os.environ.get("REVFX_CODES", "")  # another implementation than the device's own


def implementation(device: torch.device) -> str:
    """Return the implementation of codes on a device: "aten", "c" or "triton".

    Raises:
        ValueError: the environment variable `REVFX_CODES` is none of these.
        ImportError: the chosen one is not installed.
    """
    return _chosen(device.type, CHOICE)[0]


@functools.cache
def _chosen(device: str, choice: str) -> tuple[str, Any]:
    """Return the name of an implementation, and its module."""
    has_triton = importlib.util.find_spec("triton") is not None
    if choice not in ("", "aten", "c", "triton"):
        raise ValueError(f"REVFX_CODES is {choice!r}; it may be aten, c or triton")
    if choice == "triton" and not has_triton:
        raise ImportError("REVFX_CODES=triton: Triton is not installed (`pip install 'revfx[gpu]'`)")
    if choice == "c" and device == "cpu" and c.library() is None:
        raise ImportError("REVFX_CODES=c: revfx was installed without a C compiler; install it again with one")
    if choice == "triton" or (has_triton and choice != "aten" and device in ("cuda", "xpu")):
        return "triton", importlib.import_module("revfx.codes.triton")
    if device == "cpu" and choice != "aten" and c.library() is not None:
        return "c", c
    return "aten", aten


def _implementation(t: Tensor) -> Any:
    chosen = _chosen(t.device.type, CHOICE)[1]
    return fake if _torch.is_fake(t) and chosen is not aten else chosen


def encode(x: Tensor, prediction: Prediction, width: int, capacity: int | None = None) -> Code:
    """Encode `x` relative to its prediction.

    >>> code = encode(x, predict(operator.sub, y, h), 2)
    >>> torch.equal(decode(predict(operator.sub, y, h), code)[0], x)
    True

    Args:
        x: any tensor.
        prediction: a tensor with the shape and dtype of `x`.
        width: bits per element: 0, 2, 4 or 8.
        capacity: the largest number of escapes, if the host must not wait for their number.
    """
    return _implementation(x).encode(x, prediction, width, capacity)


def decode(prediction: Prediction, code: Code, reusable: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Decode a tensor.

    Args:
        prediction: any prediction; the encoder's one gives back the encoded bits.
        code: the code.
        reusable: a tensor like the prediction, or one of its own; the result may overwrite it.

    Returns:
        the tensor, with the strides of the prediction.
        its fingerprint.
    """
    return _implementation(prediction.like).decode(prediction, code, reusable)


def count_escapes(x: Tensor, prediction: Prediction) -> list[int]:
    """Return the number of escapes of the code of `x` in each of `WIDTHS`; the host waits for the numbers."""
    return _implementation(x).count_escapes(x, prediction)


def fingerprint(t: Tensor) -> Tensor:
    """Return the fingerprint of a tensor of any dtype, `words` of `format.py`; the host does not wait."""
    return _implementation(t).fingerprint(t)


def pack_marks(t: Tensor, positive: bool = False) -> Tensor:
    """Return one bit per element of a tensor, in the order of memory: whether it is not zero.

    Args:
        t: any dense tensor.
        positive: instead, whether it is positive or NaN.
    """
    return _implementation(t).pack_marks(t, positive)


def unpack_marks(packed: Tensor, elements: int, dtype: torch.dtype) -> Tensor:
    """Return a flat tensor of `elements` ones and zeros from their bits."""
    return _implementation(packed).unpack_marks(packed, elements, dtype)

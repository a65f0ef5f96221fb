"""Choosing what makes codes, by the device of their tensors and by what is installed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from revfx import _torch
from revfx.codes import aten, c
from revfx.codes.format import Code, Prediction


def implementation(device: torch.device) -> str:
    """Return what makes the codes of tensors on a device: "aten", "c" or "triton".

    Raises:
        ValueError: the environment variable `REVFX_CODES` is none of these.
        ImportError: it is one that is not there.
    """
    return _chosen(device.type, os.environ.get("REVFX_CODES", ""))


@functools.cache
def _chosen(device: str, wanted: str) -> str:
    has_triton = importlib.util.find_spec("triton") is not None
    if wanted not in ("", "aten", "c", "triton"):
        raise ValueError(f"REVFX_CODES is {wanted!r}; it may be aten, c or triton")
    if wanted == "triton" and not has_triton:
        raise ImportError("REVFX_CODES=triton: Triton is not installed (`pip install 'revfx[gpu]'`)")
    if wanted == "c" and device == "cpu" and c.library() is None:
        raise ImportError("REVFX_CODES=c: revfx was installed without a C compiler; install it again with one")
    if device == "cpu":
        return wanted or ("aten" if c.library() is None else "c")
    if device in ("cuda", "xpu") and has_triton and wanted != "aten":
        return "triton"
    return "aten"


def _implementation(t: Tensor) -> Any:
    name = "aten" if _torch.is_fake(t) else implementation(t.device)
    return importlib.import_module(f"revfx.codes.{name}") if name == "triton" else c if name == "c" else aten


def encode(x: Tensor, prediction: Prediction, width: int, room: int | None = None) -> Code:
    """Return the code of `x` in `width` bits an element; with `room` for so many escapes if the host must not wait.

    >>> code = encode(x, predict(operator.sub, y, h), 2)
    >>> torch.equal(decode(predict(operator.sub, y, h), code)[0], x)
    True
    """
    return _implementation(x).encode(x, prediction, width, room)


def decode(prediction: Prediction, code: Code, spent: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the tensor of which `code` was made, with the strides of the prediction, and its fingerprint.

    Args:
        spent: a tensor like the prediction, which may be one of its own, whose memory the result may take.
    """
    return _implementation(prediction.like).decode(prediction, code, spent)


def count_escapes(x: Tensor, prediction: Prediction) -> list[int]:
    """Return how many escapes the code of `x` has in each of `WIDTHS`; the host waits for the numbers."""
    return _implementation(x).count_escapes(x, prediction)


def fingerprint(t: Tensor) -> Tensor:
    """Return the fingerprint of a tensor of any dtype, `words` of `format.py`; the host does not wait."""
    return _implementation(t).fingerprint(t)

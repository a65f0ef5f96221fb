"""What some CPU kernels allocate within themselves while they run, seen in torch 2.13's memory events.

oneDNN's convolutions copy their operands into blocks of as many channels as a register holds numbers, and BatchNorm's
backward makes one more tensor of its input's size. Elsewhere nothing is known, which counts as nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


aten = torch.ops.aten


def scratch(func: Any, args: Any, out: Any) -> int:
    """Bytes beyond operands and results that running an operator takes at most, as far as known."""
    count = KNOWN.get(func.overloadpacket)
    first = next((a for a in args if isinstance(a, Tensor)), None)
    return count(args, out) if count is not None and first is not None and first.device.type == "cpu" else 0


def _block() -> int:
    """How many channels lie side by side: 16, and half of it where registers have 256 bits."""
    return 8 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 16


def _blocked(t: Tensor) -> int:
    """Bytes of a tensor (N, C, ...) in blocks of channels; those of images, of few channels, are used as they are."""
    channels = t.shape[1]
    if channels < 4 or not torch.backends.mkldnn.is_available():
        return 0
    return t.numel() // channels * math.ceil(channels / _block()) * _block() * t.element_size()


def _convolution(args: Any, out: Any) -> int:
    return _blocked(out)


def _convolution_backward(args: Any, out: Any) -> int:
    return _blocked(args[0]) + _blocked(args[1])


def _batch_norm_backward(args: Any, out: Any) -> int:
    return args[1].numel() * args[1].element_size()


KNOWN: Mapping[Any, Callable[[Any, Any], int]] = {
    aten.convolution: _convolution,
    aten.convolution_backward: _convolution_backward,
    aten.native_batch_norm_backward: _batch_norm_backward,
}

"""Numbers of a tensor that are looked at: some of its elements, and how a factor makes rounding errors grow."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from revfx.passes import _torch
from revfx.passes.sizes import as_number


def some_of(t: Tensor, most: int) -> Tensor:
    """Return some elements of `t`, spread over all its dimensions; of a real tensor only these are copied."""
    n = as_number(t.numel())
    stride = max(1, n // most)
    while math.gcd(stride, n) > 1:  # else it might see one column only
        stride += 1
    return t.take(_places(n, stride, t.device)) if _torch.is_real(t) else t.reshape(-1)[::stride]


@functools.lru_cache(maxsize=64)
def _places(n: int, stride: int, device: torch.device) -> Tensor:
    return torch.arange(0, n, stride, device=device)


def mean_size(reciprocal: bool, c: Tensor) -> Tensor:
    """Return the root mean square of 1/|c|, or of |c| for a divisor: by what rounding grows, on average."""
    c = c.detach().to(torch.float64 if c.dtype == torch.float64 else torch.float32)
    return (c if reciprocal else c.reciprocal()).square().mean().sqrt()


def nearest(c: Tensor, reciprocal: bool) -> Tensor:
    """Return the smallest magnitude of c, or of 1/c."""
    return c.abs().amax().reciprocal() if reciprocal else c.abs().amin()

"""Whether undoing a sum gives an operand back, where what was added to it is much larger."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from revfx.passes.numbers import some_of


SAMPLE = 256  # elements of an operand, by which is seen how large its elements are
USUAL = 0.9  # of the elements other than zero that share is smaller than the size that counts
LUCK = 16  # the share of huge addends next to which a single element comes out well by chance
ROUNDING = 16  # times eps: what an inverse that loses nothing may be off by


def size_of(x: Tensor) -> Tensor:
    """Return a magnitude that most elements of `x` stay below, going by some of them; NaN or 0 where that can't be
    told.

    A few huge elements don't change it, as they do the root mean square, nor many tiny ones, as they do the median.
    """
    size = some_of(x, SAMPLE).abs()
    above = max(1, math.floor((1 - USUAL) * size.numel()))
    return size.topk(above, sorted=False).values.amin()  # `kthvalue` is not deterministic on GPUs


def is_lost(back: Tensor, x: Tensor, limit: float) -> Tensor:
    """Return whether `back` misses an element of `x` by more than `limit`, relative to it and to `x` as it usually is.

    One that is not finite has to come back as it was. A single element may come out better than its error's bound by
    luck, so of what an inverse gives `LUCK` times less is asked.
    """
    eps = torch.finfo(x.dtype).eps
    wrong = max(limit / LUCK, min(limit, ROUNDING * eps))
    some = some_of(x, SAMPLE).abs()
    known = torch.where((some > 0) & torch.isfinite(some), some, torch.inf).sort().values
    count = torch.count_nonzero(torch.isfinite(known))
    usual = known.gather(0, ((USUAL * count).ceil().long().clamp(min=1) - 1).reshape(1)).reshape(())
    usual = torch.where(count > 0, usual, 0)
    same = (back == x) | (torch.isnan(back) & torch.isnan(x))
    return (~((back - x).abs() < wrong * torch.maximum(x.abs(), usual)) & ~same).any()

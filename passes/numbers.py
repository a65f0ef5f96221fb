"""What the values of a tensor tell of the numbers that it holds: those that data are made of, repeated ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from revfx.passes import _torch
from revfx.passes.sizes import as_number


# Times eps: the share of such numbers that values without a pattern hold. It is largest in [4, 8], where there are 40
# multiples of 1/40 to a unit, and 1 / (4 eps) numbers.
BY_CHANCE = 256
REPEATED = 4  # times eps: the share of elements that equal another value by chance; and this many in any case
SAMPLE = 1024  # elements of a parameter that are looked at


def made_numbers(t: Tensor) -> tuple[Tensor, float]:
    """(how many elements of `t` are numbers that data are made of, other than zero; how many may be by chance).

    These are multiples of 1/8 or 0.1 up to 8, and whole numbers up to 256.
    """
    size, fine = t.abs(), t * 40
    made = ((fine == fine.round()) & (size <= 8)) | ((t == t.round()) & (size <= 256))
    chance = BY_CHANCE * torch.finfo(t.dtype).eps * as_number(t.numel()) + (t.dtype != torch.float64)
    return torch.count_nonzero(made & (t != 0)), chance


def unchanged_numbers(t: Tensor, before: Tensor) -> tuple[Tensor, float]:
    """(how many elements of `t` other than zero equal those of what was added to; how many may by chance)."""
    found = torch.count_nonzero((t == before) & (t != 0))
    return found, REPEATED * torch.finfo(t.dtype).eps * as_number(t.numel()) + REPEATED * (t.dtype != torch.float64)


def repeated_numbers(t: Tensor) -> tuple[Tensor, float]:
    """(how many elements of `t` other than zero equal the one before along some dimension; how many may by chance).

    Constant rows, channels and patches do; a normalisation makes zeros of them.
    """
    found = torch.zeros((), dtype=torch.long, device=t.device)
    for d in range(t.dim()):
        if t.shape[d] > 1:
            later = t.narrow(d, 1, t.shape[d] - 1)
            found = found + torch.count_nonzero((later == t.narrow(d, 0, t.shape[d] - 1)) & (later != 0))
    chance = REPEATED * torch.finfo(t.dtype).eps * t.numel() * t.dim()
    return found, chance + REPEATED * (t.dtype != torch.float64)


def is_generic(t: Tensor) -> bool:
    """Whether `t` is a parameter whose numbers follow no pattern, as random or trained ones do, but for zeros.

    Unlike in a kernel of ones, an identity or a blur, no sum of data with such factors is zero, or a number of the
    data, by more than chance. One whose values are not at hand (on fake tensors, sharded) counts as such.
    """
    if not isinstance(t, nn.Parameter) or not t.is_floating_point() or t.layout != torch.strided:
        return False
    if not _torch.is_real(t):
        return True
    with torch.no_grad(), _torch.outside_modes():
        flat = t.detach().reshape(-1)
        seen = flat[:: max(1, flat.numel() // SAMPLE)]
        seen = seen[seen != 0]
        made, chance = made_numbers(seen)
        return bool(made <= chance) and 4 * seen.unique().numel() >= seen.numel()

"""What the values of a tensor tell of the numbers that it holds: those that data are made of, repeated ones."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from revfx.passes import _torch
from revfx.passes.sizes import as_number


# Times eps: the share of numbers that data are made of among values without a pattern. It is largest in [4, 8], where
# there are 40 multiples of 1/40 to a unit, and 1 / (4 eps) numbers.
BY_CHANCE = 256
REPEATED = 4  # times eps: the share of elements that equal another value by chance; and this many in any case
SAMPLE = 1024  # elements of a parameter that are looked at
FAR = 256  # times what rounding does: a number that was moved less may be near to where it was by chance
BESIDE = 1.0618  # what numbers are multiplied by to see how many of their size are met by chance
MANY = 1 << 13  # elements of a stream among which equal ones are looked for
SUMMED = 256  # elements of an operand of a sum, by which is seen how large its elements are
USUAL = 0.9  # of the elements other than zero that share is smaller than the size that counts
LUCK = 16  # the share of huge addends next to which a single element comes out well by chance
ROUNDING = 16  # times eps: what an inverse that loses nothing may be off by


def are_made(t: Tensor) -> Tensor:
    """Return where `t` is a number that data are made of: multiples of 1/8 or 0.1 up to 8, whole ones up to 256."""
    size, fine = t.abs(), t * 40
    return (((fine == fine.round()) & (size <= 8)) | ((t == t.round()) & (size <= 256))) & (t != 0)


def made_numbers(t: Tensor) -> tuple[Tensor, float]:
    """Return (how many elements of `t` are numbers that data are made of, but zero; how many may be by chance)."""
    return torch.count_nonzero(are_made(t)), by_chance(t, BY_CHANCE, REPEATED)


def by_chance(t: Tensor, share: float, more: float) -> float:
    """Return how many elements of `t` may have a property that a share of `share * eps` has by chance."""
    size = as_number(t.numel())
    return share * torch.finfo(t.dtype).eps * size + min(more, size / 8) * (t.dtype != torch.float64)


def unchanged(t: Tensor, before: Tensor, factor: float = 1.0) -> Tensor:
    """Return where `t = +-factor * before + ...` is other than zero, and as if nothing was added."""
    size, was = t.abs(), before.abs() if factor == 1 else factor * before.abs()
    same = size == was if factor == 1 else (size - was).abs() <= 4 * torch.finfo(t.dtype).eps * was
    return same & (t != 0)


def is_more(found: Tensor, t: Tensor, share: float = REPEATED) -> Tensor:
    """Return whether more elements of `t` are `found` than a share of `share * eps` that has them by chance."""
    return torch.count_nonzero(found) > by_chance(t, share, REPEATED)


def repeated_numbers(t: Tensor) -> tuple[Tensor, float]:
    """Return (how many elements of `t` other than zero equal the one before along some dimension; how many may by
    chance).

    Constant rows, channels and patches do; a normalisation makes zeros of them.
    """
    found = torch.zeros((), dtype=torch.long, device=t.device)
    for d in range(t.dim()):
        if t.shape[d] > 1:
            later = t.narrow(d, 1, t.shape[d] - 1)
            found = found + torch.count_nonzero((later == t.narrow(d, 0, t.shape[d] - 1)) & (later != 0))
    return found, by_chance(t, REPEATED * t.dim(), REPEATED)


def shared_numbers(t: Tensor) -> tuple[Tensor, float]:
    """Return (how many of some elements of `t` other than zero equal another one; how many may by chance).

    In data of few levels, as k/255, most do.
    """
    some = some_of(t, MANY).sort().values
    found = torch.count_nonzero((some[1:] == some[:-1]) & (some[1:] != 0))
    # float64 may come from random numbers in float32
    return found, max(by_chance(x, as_number(some.numel()), REPEATED) for x in (some, some.float()))


def magnitudes(t: Tensor) -> Tensor:
    """Return the magnitudes of some elements of `t`, in order."""
    return _wide(some_of(t, MANY)).abs().sort().values


def sizes(now: Tensor, before: Tensor) -> Tensor:
    """Return the magnitudes of some elements of `now`, and of those of `before` that they were made of, as two rows."""
    size = some_of(now, SAMPLE).abs()
    made_of = some_of(before, SAMPLE).abs() if before.shape == now.shape else before.abs().amax().expand_as(size)
    return _wide(torch.stack((size, made_of)))


def come_back(once: Tensor, sizes: Tensor, eps: float, scale: float = 1.0) -> Tensor:
    """Return whether values are there again whose magnitudes were `once`, times `scale` and but for rounding, going by
    the `sizes` of some elements.

    Not where hardly anything was added to them. About as many as other numbers of their size meet do so by chance.
    """
    size, made_of = sizes.to(once.dtype) / scale
    room = 4 * eps * torch.maximum(size, made_of)
    tried = torch.stack((size, BESIDE * size))
    nearest = once[torch.searchsorted(once, tried - room).clamp(max=as_number(once.shape[0]) - 1)]
    found, chance = (((nearest - tried).abs() <= room) & ((size - made_of).abs() > FAR * room)).sum(1)
    n = as_number(size.shape[0])
    return found > 2 * chance + max(min(n // 16, REPEATED), n // 64)


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


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


def uniform(t: Tensor) -> Tensor:
    """Return whether a row along the last dimension, or a channel (the second or last), holds one number all over."""
    groups = (t.flatten(0, -2), t.transpose(0, 1).flatten(1), t.transpose(0, -1).flatten(1)) if t.dim() > 1 else ()
    found = [(g == g[:, :1]).all(1).any() for g in groups or (t.reshape(1, -1),) if g.shape[1] > 1]
    return torch.stack([torch.zeros((), dtype=torch.bool, device=t.device), *found]).any()


def mean_size(reciprocal: bool, c: Tensor) -> Tensor:
    """Return the root mean square of 1/|c|, or of |c| for a divisor: by what rounding grows, on average."""
    c = c.detach().to(torch.float64 if c.dtype == torch.float64 else torch.float32)
    return (c if reciprocal else c.reciprocal()).square().mean().sqrt()


def nearest(c: Tensor, reciprocal: bool) -> Tensor:
    """Return the smallest magnitude of c, or of 1/c."""
    return c.abs().amax().reciprocal() if reciprocal else c.abs().amin()


# --- whether undoing a sum gives an operand back, where what was added to it is much larger
def size_of(x: Tensor) -> Tensor:
    """Return a magnitude that most elements of `x` stay below, going by some of them; NaN or 0 where that can't be
    told.

    A few huge elements don't change it, as they do the root mean square, nor many tiny ones, as they do the median.
    """
    size = some_of(x, SUMMED).abs()
    above = max(1, math.floor((1 - USUAL) * size.numel()))
    return size.topk(above, sorted=False).values.amin()  # `kthvalue` is not deterministic on GPUs


def is_lost(back: Tensor, x: Tensor, limit: float) -> Tensor:
    """Return whether `back` misses an element of `x` by more than `limit`, relative to it and to `x` as it usually is.

    One that is not finite has to come back as it was. A single element may come out better than its error's bound by
    luck, so of what an inverse gives `LUCK` times less is asked.
    """
    eps = torch.finfo(x.dtype).eps
    wrong = max(limit / LUCK, min(limit, ROUNDING * eps))
    some = some_of(x, SUMMED).abs()
    known = torch.where((some > 0) & torch.isfinite(some), some, torch.inf).sort().values
    count = torch.count_nonzero(torch.isfinite(known))
    usual = known.gather(0, ((USUAL * count).ceil().long().clamp(min=1) - 1).reshape(1)).reshape(())
    usual = torch.where(count > 0, usual, 0)
    same = (back == x) | (torch.isnan(back) & torch.isnan(x))
    return (~((back - x).abs() < wrong * torch.maximum(x.abs(), usual)) & ~same).any()


# --- what single tensors are looked at for
def is_huge(t: Tensor) -> bool:
    """Return whether `t`, no parameter, holds a number next to which one of size 1 loses half of its digits."""
    if type(t) is not Tensor or t.is_meta or t.layout != torch.strided or not t.is_floating_point() or not t.numel():
        return False
    with torch.no_grad(), _torch.outside_modes():
        return not bool(t.abs().amax() < torch.finfo(t.dtype).eps ** -0.5)


def is_generic(t: Tensor) -> bool:
    """Return whether `t` is a parameter whose numbers follow no pattern, as random or trained ones do, but for zeros.

    Unlike in a kernel of ones, an identity or a blur, no sum of data with such factors is zero, or a number of the
    data, by more than chance. One whose values are not at hand (on fake tensors, sharded) counts as such.
    """
    if not isinstance(t, nn.Parameter) or not t.is_floating_point() or t.layout != torch.strided:
        return False
    if t.dtype.itemsize < 2:  # they can hold few numbers only
        return False
    if not _torch.is_real(t):
        return True
    with torch.no_grad(), _torch.outside_modes():
        return _patternless(_some(t.detach())) and not bool(_balanced(t.detach()))


def _some(t: Tensor) -> Tensor:
    """Return some numbers of a tensor, spread over it."""
    return t.reshape(-1)[:: max(1, -(-t.numel() // SAMPLE))]


def _patternless(t: Tensor) -> bool:
    """Return whether `t` holds few numbers that data are made of, and few more than once, but for zeros."""
    s = t[t != 0].sort().values
    found, chance = made_numbers(s)
    return bool(found <= chance) and 4 * s.unique_consecutive().numel() >= s.numel()


def _balanced(t: Tensor) -> Tensor:
    """Return whether many kernels of a convolution add up to zero, so that they make zeros of blank patches."""
    found = torch.zeros((), dtype=torch.bool, device=t.device)
    for dims in (range(2, t.dim()), range(1, t.dim())) if t.dim() > 2 else ():
        total, size = t.sum(tuple(dims)).abs(), t.abs().sum(tuple(dims))
        found = found | (((total <= 8 * torch.finfo(t.dtype).eps * size) & (size > 0)).float().mean() > 0.1)
    return found

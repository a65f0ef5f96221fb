"""Couplings on a grid: their updates are rounded, so that undoing them gives the very bits.

On the grid of multiples of 2^-k sums and differences of floating-point numbers below 2^(24-k) are exact. So
`y = x + q(t)` for an x on the grid, with q rounding to it, has the inverse `x = y - q(t)`, bit for bit. A factor c is
undone with the help of a few bits: `u = floor(c*x + 1/2)` (in units of the grid) has at most ceil(1/|c|) preimages, of
which the index of the right one is kept. Gradients go straight through the rounding, as if it were not there. After
MacKay et al., "Reversible Recurrent Neural Networks", NeurIPS 2018, https://arxiv.org/abs/1810.10999, who keep such
bits for fixed-point numbers.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor


FINEST = 22  # of float32, whose range is then +-4
SLACK = 2.0**-18  # by how much rounding may take a factor beyond its bound
MOST_BITS = 8  # kept per element: factors down to 1/256


def checked_grid(grid: Any) -> int | None:
    """Return `grid`, the k of a grid 2^-k, or None; a ValueError where it is no whole number from 1 to `FINEST`."""
    if grid is None or (isinstance(grid, int) and not isinstance(grid, bool) and 1 <= grid <= FINEST):
        return grid
    raise ValueError(f"`grid={grid!r}` must be None, or the k of a grid 2^-k, from 1 to {FINEST}.")


def checked_exact(exact: Any, grid: Any) -> bool:
    """Return `exact`; a ValueError where it is something else than True or False, or False beside a `grid`."""
    if not isinstance(exact, bool):
        instead = f"; `grid={exact!r}` is a grid of 2^-{exact}" if isinstance(exact, int) else ""
        raise ValueError(f"`exact={exact!r}` must be True or False{instead}.")
    if not exact and grid is not None:
        raise ValueError(f"`exact=False` and `grid={grid!r}`: what lies on a grid is exact.")
    return exact


def carrier(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a stream has between its couplings: half precision has no room for a grid."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def limit(dtype: torch.dtype, k: int) -> float:
    """Return what numbers on the grid 2^-k must stay below, in magnitude; float64 leaves room for products."""
    return math.ldexp(1.0, (40 if dtype == torch.float64 else 24) - k)


def units(t: Tensor, k: int) -> Tensor:
    """Return `t` in units of the grid, rounded to whole ones; no gradient."""
    return (t.detach().to(carrier(t.dtype)) * math.ldexp(1.0, k)).round()


def rounded(t: Tensor, k: int) -> Tensor:
    """Return `t` rounded to the grid 2^-k, in the dtype that carries it; no gradient."""
    return units(t, k) * math.ldexp(1.0, -k)


def straight(plain: Tensor, value: Tensor) -> Tensor:
    """Return `value`, a rounding of `plain`, with the gradient of `plain`; zeros are positive."""
    return plain + (value - plain).detach()


@dataclass(frozen=True, slots=True)
class ToGrid:
    """`to_grid` with its k."""

    k: int
    __name__: ClassVar[str] = "to_grid"

    def __call__(self, t: Tensor) -> Tensor:
        """Return `t` on the grid."""
        return to_grid(t, self.k)

    def value(self, t: Tensor) -> Tensor:
        """Return `t` on the grid, without a gradient; zeros are positive, as an inverse gives them."""
        return rounded(t, self.k) + 0.0


@dataclass(frozen=True, slots=True)
class Cast:
    """A cast of what is carried, for those who read it in its own dtype."""

    dtype: torch.dtype
    __name__: ClassVar[str] = "cast"

    def __call__(self, t: Tensor) -> Tensor:
        """Return `t` in the dtype."""
        return t.to(self.dtype)


def to_grid(t: Tensor, k: int) -> Tensor:
    """Return `t` rounded to the grid 2^-k, in the dtype that carries it; denormals become zero."""
    wide = t.to(carrier(t.dtype))
    return straight(wide, rounded(wide, k))


@dataclass(frozen=True, slots=True)
class Coupling:
    """`y = c*x + rest(*given)` on the grid 2^-k, where x is.

    c is `scale`, or with `by` the operand of that number among `given` (`reciprocal`: divided by it), whose magnitude
    is at least `least`. `rest` None: nothing is added. `name` is that of the operation which is made exact.
    """

    name: str
    k: int
    rest: Callable[..., Tensor] | None
    scale: float = 1.0
    by: int | None = None
    reciprocal: bool = False
    least: float = 1.0

    @property
    def __name__(self) -> str:
        return f"{self.name}_on_grid"

    @property
    def scales(self) -> bool:
        """Whether c is something else than 1 or -1."""
        return self.by is not None or abs(self.scale) != 1

    @property
    def bits(self) -> int:
        """Bits per element that tell the preimages of a result apart."""
        return 0 if self.least >= 1 else math.ceil(math.log2(math.ceil(1 / max(self.least, 2.0**-60))))

    def __call__(self, x: Tensor, *given: Tensor) -> Tensor:
        """Return y, differentiable."""
        y = self._scaled(x, *given)
        return y if self.rest is None else y + to_grid(_tensor(self.rest(*given), x), self.k)

    def parts(self, given: int) -> list[tuple[Coupling, tuple[int, ...]]]:
        """Return multiplication and addition, whose results must both stay in range, and which operands each reads."""
        every = tuple(range(given))
        if not self.scales or self.rest is None:
            return [(self, every)]
        factor = () if self.by is None else (self.by,)
        product = replace(self, rest=None, by=None if self.by is None else 0)
        return [(product, factor), (replace(self, scale=1.0, by=None, reciprocal=False, least=1.0), every)]

    def value(self, x: Tensor, *given: Tensor) -> Tensor:
        """Return y, without a gradient."""
        y = self._product(x, given)
        return y if self.rest is None else y + rounded(_tensor(self.rest(*given), x), self.k)

    def inverse(self, y: Tensor, *given: Tensor) -> Tensor:
        """Return x from y and, where `bits` is not 0, what `index` gave as the last operand."""
        given, index = (given[:-1], given[-1]) if self.bits else (given, None)
        y = self._less_rest(y, given)
        if not self.scales:
            return y if self.scale == 1 else 0.0 - y
        lowest = self._lowest(y, given)
        x = lowest if index is None else lowest + unpacked(index, self.bits, y).to(lowest.dtype)
        return (x * math.ldexp(1.0, -self.k) + 0.0).to(y.dtype)

    def index(self, x: Tensor, y: Tensor, *given: Tensor) -> Tensor:
        """Return which of the preimages of y x is, packed: uint8 of shape [bits, ceil(elements / 8)]."""
        lowest = self._lowest(self._less_rest(y.detach(), given), given)
        return packed(units(x, self.k).double() - lowest, self.bits)

    def _less_rest(self, y: Tensor, given: tuple[Tensor, ...]) -> Tensor:
        return y if self.rest is None else y - rounded(_tensor(self.rest(*given), y), self.k)

    # --- multiplication by c, in float64 and in units of the grid
    def _scaled(self, x: Tensor, *given: Tensor) -> Tensor:
        if not self.scales:
            return x if self.scale == 1 else 0.0 - x  # zeros stay positive
        c = self.scale if self.by is None else given[self.by]
        return straight(x / c if self.reciprocal else x * c, self._product(x, given))

    def _product(self, x: Tensor, given: tuple[Tensor, ...]) -> Tensor:
        """Return c*x on the grid, without a gradient."""
        if not self.scales:
            return x.detach() if self.scale == 1 else 0.0 - x.detach()
        factor, sign = self._factor(x, given)
        nearest = self._times(units(x, self.k).double(), factor) * sign
        return (nearest * math.ldexp(1.0, -self.k) + 0.0).to(x.dtype)

    def _factor(self, x: Tensor, given: tuple[Tensor, ...]) -> tuple[Any, Any]:
        """Return |c|, or its reciprocal where the operand is a divisor, and the sign of c."""
        if self.by is None:
            c = self.scale if x.dtype == torch.float64 else struct.unpack("f", struct.pack("f", self.scale))[0]
            return abs(c), math.copysign(1.0, c)
        c = given[self.by].detach().double()
        size, sign = c.abs(), torch.where(c < 0, -1.0, 1.0)
        bound = 1 / self.least if self.reciprocal else self.least
        beyond = size > bound * (1 + SLACK) if self.reciprocal else size < bound * (1 - SLACK)
        size = size.clamp(max=bound) if self.reciprocal else size.clamp(min=bound)
        return torch.where(beyond, math.nan, size), sign  # which the range check sees

    def _times(self, x: Tensor, factor: Any) -> Tensor:
        """Return the whole number nearest to |c|*x, the upper one of two."""
        return ((x / factor if self.reciprocal else x * factor) + 0.5).floor()

    def _lowest(self, u: Tensor, given: tuple[Tensor, ...]) -> Tensor:
        """Return the lowest x whose product is u, in units of the grid: division's guess, put right by one."""
        factor, sign = self._factor(u, given)
        u = units(u, self.k).double() * sign
        guess = ((u - 0.5) * factor if self.reciprocal else (u - 0.5) / factor).ceil()
        guess = torch.where(self._times(guess - 1, factor) >= u, guess - 1, guess)
        return torch.where(self._times(guess, factor) < u, guess + 1, guess)


def _tensor(x: Any, like: Tensor) -> Tensor:
    return x if isinstance(x, Tensor) else torch.full((), x, dtype=like.dtype, device=like.device)


def packed(index: Tensor, bits: int) -> Tensor:
    """Return the lowest `bits` bits of whole numbers, in planes: uint8 [bits, ceil(elements / 8)]."""
    flat = index.reshape(-1).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(1, -1, 8)
    planes = (flat >> _numbers(bits, flat).view(-1, 1, 1)) & 1
    return (planes << _numbers(8, flat)).sum(-1, dtype=torch.uint8)


def unpacked(planes: Tensor, bits: int, like: Tensor) -> Tensor:
    """Return the whole numbers that `packed` packed, uint8 in the shape of `like`."""
    flat = ((planes.unsqueeze(-1) >> _numbers(8, planes)) & 1).view(bits, -1)[:, : like.numel()]
    return (flat << _numbers(bits, planes).view(-1, 1)).sum(0, dtype=torch.uint8).view(like.shape)


def _numbers(n: int, like: Tensor) -> Tensor:
    return torch.arange(n, dtype=torch.uint8, device=like.device)


def checksum(t: Tensor) -> Tensor:
    """Return an int64 that differs, but for chance, where any bit or the order does; zeros of either sign agree."""
    t = t.detach() + 0.0
    t = torch.view_as_real(t) if t.is_complex() else t
    bits = t.reshape(-1).view({8: torch.int64, 4: torch.int32, 2: torch.int16}[t.element_size()]).to(torch.int64)
    return (bits * (2 * torch.arange(bits.numel(), device=bits.device) + 1)).sum()

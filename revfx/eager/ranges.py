"""The range of a grid: what lies on one must stay where its multiples are exact."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from revfx import _torch
from revfx.errors import RangeError
from revfx.passes.grid import limit
from revfx.passes.program import Program


class Ranges:
    """The largest magnitudes of the values of one run that lie on a grid, read all at once when it ends."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.extremes: dict[int, tuple[Tensor, Tensor]] = {}

    def note(self, v: int, t: Tensor) -> None:
        """Note that `t` is value `v`."""
        if self.program.values[v].grid is not None and t.numel() and not _torch.is_fake(t):
            self.extremes[v] = torch.aminmax(t.detach())  # NaN if any element is

    def close(self) -> None:
        """Raise a RangeError where a value has left its grid, or is not finite."""
        if not self.extremes or _torch.in_functorch_transform():  # there are no numbers to be read there
            return
        both = torch.stack([t.double() for pair in self.extremes.values() for t in pair])
        sizes = dict(zip(self.extremes, both.view(-1, 2).abs().amax(1).tolist(), strict=True))
        self.extremes = {}
        for v, size in sizes.items():
            value = self.program.values[v]
            k = value.grid or 0
            if not size < limit(value.dtype, k):
                raise RangeError(_beyond(self.program, v, size, k))


def _beyond(program: Program, v: int, size: float, k: int) -> str:
    value, made = program.values[v], program.made_at[v]
    where = (program.ops[made].where or "an unknown place") if made >= 0 else "an input"
    if not math.isfinite(size):
        return f"grid={k}: `{value.name}` ({where}) is not finite, so it can't be regenerated bit for bit."
    fits = next((coarser for coarser in range(k, 0, -1) if 2 * size < limit(value.dtype, coarser)), None)
    remedy = f"use grid={fits}" if fits else "scale the activations down, or do without `grid`"
    return (
        f"grid={k}: `{value.name}` ({where}) reaches {size:.4g}, and a grid of steps 2^-{k} has room below"
        f" {limit(value.dtype, k):.4g} in {value.dtype}: {remedy}."
    )

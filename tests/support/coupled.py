"""A chain of couplings of any form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from zoo import D, Pairs, mlp


def x_() -> Tensor:
    return torch.randn(6, 2 * D, requires_grad=True)


class Coupled(Pairs):
    """`couple(self, a, b, f, g, *more)` repeated; a class attribute and some attributes for it to read."""

    strength = 1.0

    def __init__(
        self, couple: Callable[..., tuple[Tensor, Tensor]], make: Callable[[], nn.Module] = mlp, depth: int = 4
    ) -> None:
        super().__init__(depth)
        self.couple = couple
        self.f, self.g = (nn.ModuleList(make() for _ in range(depth)) for _ in range(2))
        self.register_buffer("order", torch.randperm(D))
        self.tied_a = self.tied_b = nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a, b = self.couple(self, a, b, f, g, *more)
        return torch.cat([a, b], -1)


def additive(m: Any, a: Tensor, b: Tensor, f: Any, g: Any) -> tuple[Tensor, Tensor]:
    a = a + f(b)
    return a, b + g(a)

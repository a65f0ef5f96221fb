"""Streams of complex and of whole numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_steps, leaf, outcome, regions_of
from torch import Tensor, nn

import revfx
from revfx.testing import assert_same_grads


D = 8


class Linears(nn.Module):
    """A stem, and functions for couplings behind it."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = nn.Linear(D, D)
        self.f, self.g = (nn.ModuleList(nn.Linear(D, D) for _ in range(depth)) for _ in "fg")


class Moved(Linears):
    """Couplings with a mask or whole numbers that are turned in each of them."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        a, b, mask = self.stem(x), self.stem(x), mask * mask
        for f, g in zip(self.f, self.g, strict=True):
            mask = mask.roll(1, 1)
            a = a + torch.tanh(f(b)) * mask[..., None].to(x.dtype)
            b = b + torch.tanh(g(a)) * mask[..., None].to(x.dtype)
        return a + b


class Pieces(Linears):
    """Attention over a prefix: the mask is put together from two."""

    def forward(self, x: Tensor, prefix: Tensor) -> Tensor:
        a = b = self.stem(x)
        prefix = prefix[:, :2, None].expand(-1, -1, D).to(x.dtype)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        mask = torch.cat([torch.ones(x.shape[1], 2, dtype=torch.bool), mask.expand(x.shape[1], -1)], -1)
        for f, g in zip(self.f, self.g, strict=True):
            k = torch.cat([prefix, b], 1)
            a = a + nn.functional.scaled_dot_product_attention(f(b), k, k, attn_mask=mask)
            b = b + g(a)
        return a + b


@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
@pytest.mark.parametrize("kind", [Moved, Pieces])
def test_masks_and_whole_numbers_among_the_streams(kind: type[Linears], dtype: torch.dtype, fp64: None) -> None:
    model, x, mask = kind(4), leaf(3, 5, D), (torch.rand(3, 5) > 0.3).to(dtype)
    assert_steps(revfx.convert(model), outcome(model, [x, mask], model), [x, mask], model)


class Complex(Linears):
    """Couplings of complex streams, of which one is made smaller in each of them."""

    def __init__(self, factor: Callable[[Tensor], Any], depth: int = 8) -> None:
        super().__init__(depth)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.complex(self.stem(x), x), torch.complex(x, self.stem(x))
        for f, g in zip(self.f, self.g, strict=True):
            a = a * self.factor(f(b.real)) + torch.complex(g(b.imag), f(b.real))
            b = b + torch.complex(f(a.imag).tanh(), g(a.real).tanh())
        return a.abs() + b.real


@pytest.mark.parametrize("factor", [lambda _: 0.01, lambda s: torch.sigmoid(s - 4)], ids=["number", "data"])
def test_complex_streams(factor: Callable[[Tensor], Any]) -> None:
    """Without codes, their numbers would come back off by a few percent."""
    model, x = Complex(factor), torch.randn(3, 5, D)
    converted: Any = revfx.convert(model)
    for _ in range(3):
        assert_same_grads(converted, model, [x])
    assert regions_of(converted)

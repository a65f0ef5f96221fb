"""Regions that are found although a factor may vanish, or something else reads their values."""

from __future__ import annotations

import pytest
import torch
from helpers import regions_of
from torch import Tensor
from zoo import D, Pairs

import revfx
from revfx.testing import assert_same_grads, gradients


DEPTH = 4


# --- factors that reach zero
class Unclamped(Pairs):
    scale: float = 1.0

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a * torch.exp(-self.scale * f(b).square()) + g(b)
            a, b = b, a
        return torch.cat([a, b], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.1, 4000.0])
def test_unclamped_exp_is_finite_and_right_wherever_plain_is(scale: float, dtype: torch.dtype) -> None:
    model = Unclamped(DEPTH).to(dtype)
    model.scale = scale
    x = torch.randn(8, 2 * D, dtype=dtype, requires_grad=True)
    converted = revfx.convert(model)
    want = gradients(model, [x])
    assert all(w is not None and w.isfinite().all() for w in want.values())
    assert_same_grads(converted, model, [x], rtol=1e-9 if dtype == torch.float64 else 1e-3)
    assert regions_of(converted)


# --- what is reversible although something else reads it
class UsedElsewhere(Pairs):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        a, b = x.chunk(2, -1)
        penalty: Tensor = a.new_zeros(())
        inner: list[Tensor] = []
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            b = b + g(a)
            penalty = penalty + a.square().mean()
            inner.append(b.mean(-1))
        return torch.cat([a, b], -1), penalty, inner


def test_stream_that_is_read_elsewhere_or_returned_is_found(fp64: None) -> None:
    model = UsedElsewhere(DEPTH)
    x = torch.randn(6, 2 * D, requires_grad=True)
    converted = revfx.convert(model)
    assert_same_grads(converted, model, [x])
    (region,) = regions_of(converted)
    assert sum(s.is_inverted for s in region.steps) >= 2 * DEPTH - 2

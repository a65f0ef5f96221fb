"""Where steps keep their activations: what a re-run would not find again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import mlp
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize

import revfx


pytestmark = pytest.mark.usefixtures("fp64")


class Couplings(nn.Module):
    """Three couplings of functions whose weights are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.fs = nn.ModuleList(mlp(4) for _ in range(3))
        for f in self.fs:
            parametrizations.weight_norm(f.get_submodule("0"))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f in self.fs:
            a, b = b + f(a), a
        return torch.cat([a, b], -1)


def inside_cached(model: nn.Module, x: Tensor) -> Tensor:
    with parametrize.cached():
        loss = model(x).sin().sum()
        loss.backward()
    return loss.detach()


def after_cached(model: nn.Module, x: Tensor) -> Tensor:
    with parametrize.cached():
        loss = model(x).sin().sum() + model(2 * x).sin().sum()
    loss.backward()
    return loss.detach()


def forward_over_reverse(model: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        (grad,) = torch.autograd.grad(model(dual).sin().sum(), dual, create_graph=True)
        product = forward_ad.unpack_dual(grad).tangent
        assert product is not None
    product.sum().backward()
    return product.detach()


@pytest.mark.parametrize("step", [inside_cached, after_cached, forward_over_reverse])
def test_steps_that_a_rerun_could_not_repeat(step: Callable[[nn.Module, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    plain = Couplings()
    model: Any = revfx.convert(plain)
    x = torch.randn(5, 8, requires_grad=True)
    model(x).sum().backward()
    assert model.revfx.kept_cuts == 2
    found = list[list[Tensor]]()
    for either in (plain, model):
        plain.zero_grad()
        value = step(either, x)
        found.append([value, *(p.grad.clone() for p in plain.parameters() if p.grad is not None)])
    torch.testing.assert_close(found[1], found[0])

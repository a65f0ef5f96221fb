"""Modes around steps: cached weights, tangents, stored activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import kept_cuts, mlp
from steps import STEPS, assert_same_bits
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize

import revfx
from revfx.testing import gradients


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
def test_steps_with_cached_weights_or_tangents(step: Callable[[nn.Module, Tensor], Tensor]) -> None:
    plain = Couplings()
    model: Any = revfx.convert(plain)
    x = torch.randn(5, 8, requires_grad=True)
    for _ in range(STEPS):
        found = list[list[Tensor]]()
        for either in (plain, model):
            plain.zero_grad()
            value = step(either, x)
            found.append([value, *(p.grad.clone() for p in plain.parameters() if p.grad is not None)])
        assert_same_bits(found[1], found[0])
        model(x).sum().backward()
        model(x).sum().backward()
        assert kept_cuts(model) == 2


class Holding(nn.Module):
    """Couplings of a stream with what a converted part gives, from the stream or from a weight of its own."""

    def __init__(self, part: nn.Module, given: bool) -> None:
        super().__init__()
        self.part, self.given, self.fs = part, given, nn.ModuleList(mlp(8) for _ in range(3))
        self.weight = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f in self.fs:
            a, b = b + f(self.part(a) if self.given else self.part()), a
        return torch.cat([a, b], -1)


class FromWeight(Couplings):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor | None = None) -> Tensor:
        return super().forward(self.weight if x is None else x)


@pytest.mark.parametrize("given", [False, True])
def test_a_converted_part_of_a_model_whose_first_call_stores(given: bool) -> None:
    model = Holding(revfx.convert(FromWeight()), given)
    converted, x = revfx.convert(model), torch.randn(5, 16)
    with revfx.testing.store_activations():
        stored = gradients(converted, [x])
    for _ in range(STEPS):
        assert_same_bits([*gradients(converted, [x]).values()], [*stored.values()])
    assert_same_bits([*gradients(model, [x]).values()], [*stored.values()])

"""Transforms of `torch.distributions`: inverted by what they say, where no operation inside can be solved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import kept_growth
from torch import Tensor, nn
from torch.distributions import Transform, constraints
from zoo import D

import revfx
from revfx.errors import NotConvertedWarning, NotReversibleError


pytestmark = pytest.mark.usefixtures("fp64")


class Bent(Transform):
    """`y = x / (b + |x|)`, in which x stands twice; `b = exp(s)`, given by another half."""

    domain = constraints.real
    codomain = constraints.interval(-1.0, 1.0)
    bijective = True

    def __init__(self, s: Tensor) -> None:
        super().__init__()
        self.held = [1 + torch.exp(s)]

    def _call(self, x: Tensor) -> Tensor:
        return x / (self.held[0] + x.abs())

    def _inverse(self, y: Tensor) -> Tensor:
        return y * self.held[0] / (1 - y.abs())

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.log(self.held[0]) - 2 * torch.log(self.held[0] + x.abs())


class Wrong(Bent):
    """One whose inverse is none."""

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.zeros_like(y)


class WithNet(Bent):
    """One whose inverse runs a network."""

    def __init__(self, s: Tensor) -> None:
        super().__init__(s)
        self.net = nn.Identity()

    def _inverse(self, y: Tensor) -> Tensor:
        return super()._inverse(self.net(y))


class Flow(nn.Module):
    def __init__(self, make: Callable[[Tensor], Transform], layers: int) -> None:
        super().__init__()
        nets = (nn.Sequential(nn.Linear(D, 4 * D), nn.Tanh(), nn.Linear(4 * D, D)) for _ in range(layers))
        self.nets = nn.ModuleList(nets)
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(x.shape[0])
        for net in self.nets:
            a, b = x.chunk(2, -1)
            t: Any = self.make(0.1 * torch.tanh(net(a)))
            y = t(b)
            total = total + t.log_abs_det_jacobian(b, y).sum(-1)
            x = torch.cat([3 * y, a], -1)
        return total + x.sum(-1)


def growth(make: Callable[[Tensor], Transform]) -> float:
    return kept_growth(lambda layers: Flow(make, layers), torch.randn(256, 2 * D, requires_grad=True))


@pytest.mark.parametrize("make", [Bent, lambda s: Bent(s).inv.inv])
def test_a_transform_is_inverted_by_what_it_declares(make: Callable[[Tensor], Transform]) -> None:
    assert growth(make) < 0.1


def test_one_that_is_wrong_costs_no_more_than_keeping_and_is_warned_of() -> None:
    with pytest.warns(
        NotConvertedWarning, match=r"The inverse of `Wrong` \(.*test_transforms.py:\d+\) does not give back"
    ):
        assert 0.05 < growth(Wrong) < 1


def test_a_network_is_not_run_once_more_for_an_inverse() -> None:
    assert 0.3 < growth(WithNet) < 0.6, "half of the stream is kept"


def test_classes_have_their_methods_again() -> None:
    methods = dict(vars(Bent))
    revfx.convert(Flow(Bent, 3))(torch.randn(8, 2 * D))
    assert dict(vars(Bent)) == methods


def test_samples_of_such_a_flow_are_drawn_by_its_inverse() -> None:
    class Sampled(Flow):
        def forward(self, x: Tensor) -> Any:
            for net in self.nets:
                a, b = x.chunk(2, -1)
                t: Any = self.make(0.1 * torch.tanh(net(a)))
                x = torch.cat([3 * t(b), a], -1)
            return x

    model, x = Sampled(Bent, 6), torch.randn(16, 2 * D)
    assert (revfx.inverse(model, x)(model(x)) - x).abs().max() < 1e-10
    model.make = Wrong
    with pytest.raises(NotReversibleError, match="`Wrong`"):
        revfx.inverse(model, x)

"""Tensors that plain objects and containers hold, such as a distribution that is an attribute of a model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import kept_growth
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal, Normal
from training import assert_same_steps
from zoo import D

import revfx


pytestmark = pytest.mark.usefixtures("fp64")
LAYERS = 6


class Scales:
    """A plain object of the user's."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale


class RealNVP(nn.Module):
    """As it is taught: one parameter holds the masks of all layers, and a distribution is an attribute."""

    def __init__(self, prior: Any, layers: int = LAYERS) -> None:
        super().__init__()
        self.prior = prior
        masks = torch.stack([(torch.arange(2 * D) % 2 == k % 2).double() for k in range(layers)])
        self.mask = nn.Parameter(masks, requires_grad=False)
        self.t, self.s = (nn.ModuleList(self.net(last) for _ in masks) for last in (nn.Identity, nn.Tanh))
        self.held: dict[str, Any] = {"per layer": [Scales(torch.full((2 * D,), 1.0 + 0.1 * k)) for k in range(layers)]}

    def net(self, last: type[nn.Module]) -> nn.Module:
        return nn.Sequential(nn.Linear(2 * D, 8 * D), nn.LeakyReLU(), nn.Linear(8 * D, 2 * D), last())

    def forward(self, x: Tensor) -> Tensor:
        log_det = x.new_zeros(x.shape[0])
        for k in reversed(range(len(self.t))):
            z = self.mask[k] * x
            s = self.s[k](z) * (1 - self.mask[k])
            t = self.t[k](z) * (1 - self.mask[k])
            x = (1 - self.mask[k]) * (x - t) * torch.exp(-s) + z
            x = x * self.held["per layer"][k].scale
            log_det = log_det - s.sum(-1)
        return self.prior.log_prob(x) + log_det


PRIORS: dict[str, Any] = {
    "multivariate": lambda: MultivariateNormal(torch.zeros(2 * D), torch.eye(2 * D), validate_args=True),
    "independent": lambda: Independent(Normal(torch.zeros(2 * D), torch.ones(2 * D), validate_args=False), 1),
}


@pytest.mark.parametrize("prior", PRIORS)
def test_a_model_that_holds_a_distribution_keeps_little_per_layer(prior: str) -> None:
    x = torch.randn(256, 2 * D, requires_grad=True)
    assert kept_growth(lambda layers: RealNVP(PRIORS[prior](), layers), x, (LAYERS // 2, LAYERS)) < 0.05


def test_objects_are_read_in_each_call_and_may_hold_another_shape() -> None:
    model = RealNVP(PRIORS["multivariate"]())
    x = torch.randn(8, 2 * D, requires_grad=True)
    converted: Any = revfx.convert(model)
    assert_same_steps(converted, model, [x])
    model.held["per layer"][0].scale = torch.full((2 * D,), 3.0)
    assert_same_steps(converted, model, [x])
    model.held["per layer"][0].scale = torch.full((8, 2 * D), 2.0)
    assert_same_steps(converted, model, [x])
    assert converted.revfx.regions
    model.held["per layer"].pop()
    with pytest.raises(IndexError):
        converted(x)


def test_a_sample_that_a_distribution_refuses_is_refused() -> None:
    model, x = RealNVP(PRIORS["multivariate"]()), torch.randn(8, 2 * D)
    converted = revfx.convert(copy.deepcopy(model))
    assert_same_steps(converted, model, [x])
    for call in (model, converted):
        with pytest.raises(ValueError, match="to be within the support"):
            call(x * torch.nan)
    assert_same_steps(converted, model, [x])


def test_an_input_that_a_container_holds_too_is_an_input() -> None:
    model, x = RealNVP(PRIORS["multivariate"]()), torch.randn(8, 2 * D, requires_grad=True)
    model.held["last"] = [x]
    converted = revfx.convert(model)
    assert_same_steps(converted, model, [x])
    assert_same_steps(converted, model, [torch.randn(8, 2 * D, requires_grad=True)])


def test_parameters_that_a_list_of_the_model_holds_too_are_their_modules_own() -> None:
    model, x = RealNVP(PRIORS["independent"]()), torch.randn(8, 2 * D, requires_grad=True)
    model.held["all"] = list(model.parameters())
    assert_same_steps(revfx.convert(model), model, [x])

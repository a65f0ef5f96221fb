"""Modules that are inverted by a method of theirs, on request, with a network inside that has state and draws."""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import kept_growth
from torch import Tensor, nn
from zoo import D

import revfx
from revfx import rules
from revfx.errors import RevfxError


pytestmark = pytest.mark.usefixtures("fp64")
LAYERS = 6


class Layer(nn.Module):
    """A coupling whose code asks for numbers, so that only a call of it is recorded."""

    def __init__(self, drop: float = 0.1) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(D, 2 * D), nn.BatchNorm1d(2 * D), nn.Tanh(), nn.Dropout(drop), nn.Linear(2 * D, 2 * D)
        )

    def shaped(self, a: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        shift, scale = self.net(a).chunk(2, -1)
        scale = torch.tanh(scale)
        if bool((scale > 0.999).any()):
            scale = scale * 0.5
        return (shift if condition is None else shift + condition), scale

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, -1)
        shift, scale = self.shaped(a, condition)
        return torch.cat([b * scale.exp() + shift, a], -1), scale.sum(-1)

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        b, a = y.chunk(2, -1)
        shift, scale = self.shaped(a, condition)
        return torch.cat([a, (b - shift) * (-scale).exp()], -1), -scale.sum(-1)


class Lists(Layer):
    """One that takes and gives lists, and is told the direction, as FrEIA's are."""

    def forward(self, x: Any, condition: Tensor | None = None, rev: bool = False) -> Any:
        y, log_det = (self.inverse if rev else super().forward)(x[0], condition)
        return (y,), log_det


class Inherits(Layer):
    """One whose `forward` is called by name, as torchflows does."""


class Wrong(Layer):
    def inverse(self, y: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(y), y.sum(-1)


class Flow(nn.Module):
    def __init__(self, layer: type[Layer], layers: int = LAYERS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(layers))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        total = x.new_zeros(x.shape[0])
        for layer in self.layers:
            if isinstance(layer, Lists):
                (x,), log_det = layer([x], condition=condition)
            elif isinstance(layer, Inherits):
                x, log_det = layer.forward(x, condition=condition)
            else:
                x, log_det = layer(x, condition=condition)
            total = total + log_det
        return x.square().sum(-1) / 2 - total


def rev(layer: Any, y: Any, **kwargs: Any) -> Any:
    return layer(y, rev=True, **kwargs)


BY: dict[type[Layer], Any] = {Layer: "inverse", Lists: rev, Inherits: "inverse", Wrong: "inverse"}


@contextmanager
def inverted_by(layer: type[Layer]) -> Generator[None]:
    revfx.register_inverse(layer, by=BY[layer])
    try:
        yield
    finally:
        rules.unregister_inverse(layer)


def trained(model: nn.Module, inputs: Any, dtype: torch.dtype | None) -> list[Any]:
    """Gradients, buffers and torch's generator after two steps without an update."""
    torch.manual_seed(0)
    for x, condition in inputs:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            model(x, condition).mean().backward()
    found = [x.grad.clone() for x, _ in inputs] + [p.grad for p in model.parameters()]
    for x, _ in inputs:
        x.grad = None
    return [*found, *model.buffers(), torch.get_rng_state()]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["plain", "autocast"])
@pytest.mark.parametrize("layer", [Layer, Lists])
def test_layers_with_state_train_as_they_did(layer: type[Layer], dtype: torch.dtype | None) -> None:
    model = Flow(layer).to(torch.float32)
    x, condition = torch.randn(64, 2 * D).float(), torch.randn(64, D).float()
    inputs = [(x.clone().requires_grad_(), condition), (x.clone().requires_grad_(), None)]
    with inverted_by(layer):
        converted: Any = revfx.convert(copy.deepcopy(model))
        ours, theirs = trained(converted, inputs, dtype), trained(model, inputs, dtype)
        assert converted.revfx.plans and all(p.regions for p in converted.revfx.plans)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("layer", [Layer, Lists, Inherits])
def test_layers_keep_little_of_what_they_did(layer: type[Layer]) -> None:
    x = torch.randn(256, 2 * D, requires_grad=True)
    with inverted_by(layer):
        assert kept_growth(lambda layers: Flow(layer, layers), x, (LAYERS // 2, LAYERS)) < 0.05
    assert ("forward" in vars(layer)) is (layer is not Inherits), "it is as it was"


def test_a_wrong_one_is_not_used_where_the_operators_inside_can_be_inverted() -> None:
    x = torch.randn(256, 2 * D, requires_grad=True)
    with inverted_by(Wrong):
        assert kept_growth(lambda layers: Flow(Wrong, layers), x, (LAYERS // 2, LAYERS)) < 0.05


def test_weights_that_change_before_the_backward_raise() -> None:
    with inverted_by(Layer):
        model = revfx.convert(Flow(Layer))
        loss = model(torch.randn(256, 2 * D, requires_grad=True)).mean()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_the_inverse_of_the_whole_is_theirs_in_turn() -> None:
    model, x, condition = Flow(Layer).eval(), torch.randn(64, 2 * D), torch.randn(64, D)

    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = model

        def forward(self, x: Tensor, condition: Tensor) -> Tensor:
            for layer in self.flow.layers:
                x, _ = layer(x, condition)
            return x

    whole = Maps().eval()
    with inverted_by(Layer):
        back = revfx.inverse(whole, x, {"condition": condition})
        assert torch.allclose(back(whole(x, condition), condition=condition), x, rtol=1e-10)


@pytest.mark.parametrize("op", [nn.Linear, torch.add, Layer(0.0)])
def test_what_is_no_class_with_such_a_method_is_refused(op: Any) -> None:
    with pytest.raises(RevfxError, match="is no class of modules that have a `inverse`"):
        revfx.register_inverse(op, by="inverse")

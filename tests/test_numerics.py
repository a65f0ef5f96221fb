"""Where rounding errors grow, in ways that no arc declares, the backward notices."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from helpers import loss_of
from torch import Tensor, nn
from zoo import Additive, AffineExp, D

import revfx
from revfx.errors import RevfxWarning
from revfx.testing import assert_same_grads, measure_memory


@pytest.mark.parametrize("way", ["convert", "rev_block"])
def test_streams_that_grow_raise_before_their_gradients_are_garbage(way: str) -> None:
    def make() -> nn.Module:
        layers: list[nn.Module] = [nn.Linear(D, 2 * D), nn.SiLU(), nn.Linear(2 * D, D)]
        return nn.Sequential(*layers)

    model = Additive(8)
    for fs in (model.f, model.g):
        for i in range(len(fs)):
            fs[i] = make()
    with torch.no_grad():
        for p in model.parameters():
            p *= 3
    x = torch.randn(6, 2 * D, requires_grad=True)
    if way == "convert":
        out = revfx.convert(model)(x)
    else:
        a, b = x.chunk(2, -1)
        out = torch.cat(revfx.rev_block(a, b, model.f, model.g, 8), -1)
    with pytest.raises(revfx.RevfxError, match=r"is off by .* amplify rounding errors"):
        out.sin().sum().backward()


def test_small_drift_is_warned_of_once(fp64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("revfx.numerics.DRIFT", 1e-9)
    converted = revfx.convert(Additive(8))
    x = torch.randn(6, 2 * D, requires_grad=True)
    with pytest.warns(RevfxWarning, match=r"is off by .* \(relative\)"):
        converted(x).sin().sum().backward()
    converted(x).sin().sum().backward()


def last_layers(*functions: Iterable[nn.Module]) -> list[Tensor]:
    return [p for fs in functions for f in fs for p in [*f.parameters()][-2:]]


class Started(AffineExp):
    """A flow whose functions end in layers that start as zeros."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        for p in last_layers(self.f, self.g):
            nn.init.zeros_(p)


def test_functions_that_start_as_zeros_keep_nothing(fp64: None) -> None:
    """Sums of exact zeros, such as the log-determinant, are what they were."""
    x = torch.randn(64, 2 * D)
    x[::3] = 0  # of the data too
    peaks: list[int] = []
    for depth in (4, 12):
        model = Started(depth)
        converted: Any = revfx.convert(copy.deepcopy(model))
        assert_same_grads(converted, model, [x.clone().requires_grad_()])
        assert converted.revfx.kept_cuts == 2
        weights = sum(p.nbytes for p in model.parameters())
        peaks.append(measure_memory(lambda call=converted: loss_of(call(x))).peak - weights)
    assert peaks[1] < peaks[0] + x.nbytes


def test_layers_of_which_some_start_as_zeros_are_right(fp64: None) -> None:
    model = Started(6)
    for p in last_layers(list(model.f)[::2], list(model.g)[1::3]):
        nn.init.normal_(p)
    x = torch.randn(64, 2 * D)
    x[::3] = 0
    assert_same_grads(revfx.convert(copy.deepcopy(model)), model, [x.requires_grad_()])

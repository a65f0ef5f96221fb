"""Where rounding errors grow, in ways that no arc declares, the backward notices."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import Additive, D

import revfx
from revfx.errors import RevfxWarning


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

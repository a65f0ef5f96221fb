"""Wrapper subclasses: operators on them are seen as those on the tensors inside, and saved ones are taken apart."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import revfx
from revfx.converted import conversion_of
from revfx.engine import native


D, DEPTH, ROWS = 8, 4, 16


class Couplings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.ModuleList()
        for _ in range(DEPTH):
            self.f.append(nn.Sequential(nn.Linear(D, 4 * D), nn.Tanh(), nn.Linear(4 * D, D)))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f in self.f:
            a, b = b, a + f(b)
        return torch.cat([a, b], -1)


def _steps(model: nn.Module) -> list[Tensor]:
    found: list[Tensor] = []
    for step in range(4):
        x: Any = torch.randn(ROWS, 2 * D, generator=torch.Generator().manual_seed(step))
        y: Any = model(TwoTensor(x, -x))
        loss = y.square().mean()
        loss.backward()
        for p in model.parameters():
            grad: Any = p.grad
            found += [grad.a.clone(), grad.b.clone()]
            p.grad = None
    return found


@pytest.mark.parametrize("watcher", ["native", "python"])
def test_streams_of_wrappers_are_dropped_and_come_back(watcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.CHOICE, watcher)
    torch.manual_seed(0)
    model = Couplings()
    converted: Any = revfx.convert(copy.deepcopy(model))
    assert all(map(torch.equal, _steps(converted), _steps(model)))
    planned = conversion_of(converted).planned
    assert planned is not None
    (kind,) = planned.kinds.values()
    assert kind.matched == kind.units >= DEPTH and kind.kept_cuts[0] <= 3

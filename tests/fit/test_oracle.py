"""Plans beside the optimum, and what marks and nested runs bring."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fit_models import Attention, Residual, UNet, branch
from fit_oracle import bound, made_up
from torch import Tensor, nn

from revfx.fit.choose import Planner
from revfx.fit.needs import Needs
from revfx.fit.record import record


def conv() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))


class Dense(nn.Module):
    """Each layer sees what all before it made."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(16 * i), nn.ReLU(), nn.Conv2d(16 * i, 16, 1)) for i in (1, 2, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for f in self.f:
            x = torch.cat((x, f(x).sigmoid()), 1)
        return x


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.ModuleList(nn.Linear(256, 256) for _ in range(3)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for a, b, c in zip(self.a, self.b, self.c, strict=True):
            x = torch.nn.functional.rms_norm(x + c(nn.functional.silu(a(x)) * b(x).tanh()), (256,))
        return x


def images(c: int = 16) -> Tensor:
    return torch.empty(32, c, 64, 64)


GRAPHS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": lambda: (Residual(*(branch(256) for _ in range(4))), torch.empty(4096, 256)),
    "relu": lambda: (Residual(*(branch(256, nn.ReLU) for _ in range(3))), torch.empty(4096, 256)),
    "tanh": lambda: (nn.Sequential(*(m for _ in range(8) for m in (nn.Linear(256, 256), nn.Tanh()))), torch.empty(4096, 256)),
    "convolutions": lambda: (Residual(*(conv() for _ in range(5))), images()),
    "plain convolutions": lambda: (nn.Sequential(*(conv() for _ in range(6))), images()),
    "unet": lambda: (UNet(16), images(3)),
    "attention": lambda: (Residual(*(Attention(64, 4, dropout=0.1, batch_first=True) for _ in range(2))), torch.empty(16, 256, 64)),
    "dense": lambda: (Dense(), images()),
    "gated": lambda: (Gated(), torch.empty(4096, 256)),
    "encoder": lambda: (nn.TransformerEncoderLayer(128, 4, 512, 0.1, batch_first=True, norm_first=True), torch.empty(16, 256, 128)),
}  # fmt: skip


def needs_of(name: str) -> Needs:
    model, x = GRAPHS[name]()
    return Needs(record(model.train(), model, (x,), {}))


@pytest.mark.parametrize("name", GRAPHS if os.environ.get("REVFX_DEEP") else ["mlp", "plain convolutions", "gated"])
def test_plans_are_near_the_optimum(name: str) -> None:
    needs = needs_of(name)
    assert needs.tape.turn <= 60
    costs: Any = made_up(needs)
    planner = Planner(needs, costs)
    most, least = planner.plain[1].peak, planner.least()[1].peak
    for part in (0.75, 0.5, 0.25):
        budget = int(least + part * (most - least))
        found = planner.best(budget)
        assert found is not None
        want = bound(needs, costs, budget)
        print(f"{name:20}{part:6}{found[1].seconds:10.6f}{want:10.6f}{planner.seconds:10.6f}")
        assert found[1].seconds <= 1.05 * want + 0.005 * planner.seconds

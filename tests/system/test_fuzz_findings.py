"""Programs that random search found to be wrong, or to end in an error that is not the user's; made small."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import kept_cuts
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from training import assert_same_steps, twins

from revfx.errors import RevfxWarning


pytestmark = pytest.mark.usefixtures("fp64")


def net(d: int = 3, out: int | None = None) -> nn.Module:
    return nn.Sequential(nn.Linear(d, 4), nn.Tanh(), nn.Linear(4, out or d))


class Net(nn.Module):
    """Streams a and b, and six functions from one to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.ModuleList(net() for _ in range(6))


def check(model: nn.Module, *inputs: Tensor) -> None:
    """Raise unless the converted model has a region and trains as the plain one."""
    converted, plain = twins(model)
    assert_same_steps(converted, plain, inputs or (torch.randn(5, 6, requires_grad=True),), steps=4)
    assert converted.revfx.plans[0].regions and kept_cuts(converted)


def test_truth_values_are_added_to_a_stream() -> None:
    """`y - b` is an error for a b of truth values, where `a + b` is none."""

    class Adds(Net):
        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            for f in self.f:
                a, b = b, a + f(b)
                a = torch.add(a, b.mean() > 0) + True
            return torch.cat([a, b], -1)

    check(Adds())


def test_write_without_gradients_leaves_the_gradient_of_what_it_writes_to() -> None:
    """Made functional, `b + 1` under `no_grad` would have none."""

    class Writes(Net):
        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            for f in self.f:
                a, b = b, a + f(b)
            with torch.no_grad():
                b.add_(1)
            return torch.cat([a, b], -1)

    check(Writes())


def test_checkpoints_within_draw_the_same_dropout_again() -> None:

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Tanh())

        def forward(self, x: Tensor) -> Any:
            return x + checkpoint(self.f, checkpoint(self.f, x, use_reentrant=False), use_reentrant=False)

    model, x = Noisy(), torch.randn(5, 6, requires_grad=True)
    converted, plain = twins(model)
    with pytest.warns(RevfxWarning):
        assert_same_steps(converted, plain, [x], steps=4)


def test_zeros_moved_to_another_number_are_looked_for_there() -> None:
    """`0.5 + relu(h)` is exactly 0.5 in many places, where `hardshrink` has its threshold."""

    class Shifts(Net):
        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            for f, g in zip(self.f[::2], self.f[1::2], strict=True):
                a = 0.5 + torch.relu(f(b) - 0.5)
                b = b + g(functional.hardshrink(a))
                a = a + f(b)
                b = b + g(a)
            return torch.cat([a, b], -1)

    check(Shifts(), torch.randn(16, 6, requires_grad=True))

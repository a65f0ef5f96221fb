"""Programs that random search found to be wrong, or to end in an error that is not the user's; made small."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revfx
from revfx.testing import assert_same_grads


pytestmark = pytest.mark.usefixtures("fp64")


def net(d: int = 3, out: int | None = None) -> nn.Module:
    return nn.Sequential(nn.Linear(d, 4), nn.Tanh(), nn.Linear(4, out or d))


class Net(nn.Module):
    """Streams a and b, and six functions from one to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.ModuleList(net() for _ in range(6))


def check(model: nn.Module, *inputs: Tensor) -> Any:
    """The converted model, which has a region and trains as the plain one."""
    x = inputs or (torch.randn(5, 6, requires_grad=True),)
    converted: Any = revfx.convert(model)
    assert torch.equal(converted(*x), model(*x))
    assert_same_grads(converted, model, x)
    assert converted.revfx.plans[0].regions
    return converted


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

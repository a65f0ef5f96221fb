"""What inductor fuses in graphs that regenerate keeps its order."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revfx.testing import assert_same_grads


class Unfolds(nn.Module):
    """The gradient of `b.unfold` is added to zeros in place, and read after that."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 4, 1)
        self.f = nn.ModuleList([
            nn.Sequential(nn.Conv2d(2, 2, 1), nn.MaxPool2d(3, 1, 1)),
            nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh()),
            nn.Conv2d(2, 2, 1),
            nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1)),
            nn.Conv2d(2, 2, 3, padding=1),
        ])  # fmt: skip
        self.register_buffer("mask", (torch.arange(2) % 2 == 0).view(2, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = (F.relu(self.stem(x)) * 0.5).chunk(2, 1)
        mask = ~self.get_buffer("mask")
        still = torch.where(mask, a, 0.0)
        a = torch.where(mask, a, a * torch.exp(0.5 * torch.tanh(self.f[0](still))) + self.f[1](still))
        windows = b.unfold(-1, 1, 1)
        still = torch.where(mask, a, 0.0)
        a = torch.where(mask, still, (a - self.f[2](still)) / torch.exp(0.5 * torch.tanh(self.f[4](still))))
        part = mask.double()
        still = part * b
        return a, still + (1 - part) * (b + self.f[3](still)), windows


@pytest.mark.usefixtures("fp64")
def test_nothing_is_read_before_it_is_written() -> None:
    """pytorch/pytorch#185509: gradients of the stem were off by half, without a word."""
    model, x = Unfolds(), torch.randn(3, 4, 2, 2, requires_grad=True)
    compiled = copy.deepcopy(model)
    compiled.compile(backend="revfx", options={"cpp.simdlen": 1, "unbounded": "store"})
    assert_same_grads(compiled, model, [x])

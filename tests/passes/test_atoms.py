"""Exact zeros under relu, which rounding inverses do not give back: who makes them, and where they are kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_kinks import traced
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import D, Pairs

import revfx
from revfx.passes.atoms import atoms
from revfx.passes.kinks import barred
from revfx.passes.moved import directions_of, moved
from revfx.testing import assert_same_grads


pytestmark = [pytest.mark.usefixtures("fp64"), pytest.mark.filterwarnings("ignore::revfx.errors.RevfxWarning")]


class Rounds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 3.3).round() / 3.3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 2


looked_up_early = Rounds.apply
GRIDS: dict[str, Callable[[Tensor], Tensor]] = {
    "straight through": lambda h: h + ((h * 3.3).round() / 3.3 - h).detach(),
    "cancels": lambda h: h - (h - (h * 3.3).round() / 3.3),
    "floor": lambda h: h * torch.div(h, 1.0, rounding_mode="floor"),
    "threshold": lambda h: nn.functional.threshold(h, 0.1, 0.0),
    "autograd function": lambda h: looked_up_early(h),
    "whole numbers": lambda h: (h * 3.3).int() / 3.3 + (h - h.detach()),
}


class OnGrid(Pairs):
    def __init__(self, grid: Callable[[Tensor], Tensor]) -> None:
        super().__init__(4)
        self.f, self.g = (nn.ModuleList(nn.Linear(D, D) for _ in range(4)) for _ in range(2))
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + self.grid(f(b))
            b = b + g(torch.relu(a))
        return torch.cat([a, b], -1)


@pytest.mark.parametrize("way", ["convert", "backend"])
@pytest.mark.parametrize("grid", GRIDS)
def test_what_a_sum_leaves_on_a_grid_keeps_its_exact_zeros(grid: str, way: str) -> None:
    x = torch.randn(64, 2 * D)
    x[:, :D] = torch.where(torch.rand(64, D) > 0.5, x[:, :D].round(), 0.0)
    model = OnGrid(GRIDS[grid])
    if way == "convert":
        assert_same_grads(revfx.convert(model), model, [x.requires_grad_()])
        return
    compiled = copy.deepcopy(model)
    torch.compiler.reset()
    compiled.compile(backend="revfx", options={"inner": "aot_eager"})
    assert_same_grads(compiled, model, [x.requires_grad_()])


def test_blank_parts_of_an_image_that_convolutions_reach_one_after_the_other() -> None:
    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            convs = [nn.Sequential(nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1, bias=False)) for _ in range(10)]
            self.f, self.g = nn.ModuleList(convs[:5]), nn.ModuleList(convs[5:])

        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, 1)
            for f, g in zip(self.f, self.g, strict=True):
                a = a + f(b)
                b = b + g(a)
            return torch.cat([a, b], 1)

    x = torch.zeros(2, 4, 16, 16)
    x[:, :, 6:9, 6:9] = torch.randn(2, 4, 3, 3)
    model = Images()
    assert_same_grads(revfx.convert(model), model, [x.requires_grad_()])


# --- compiled graphs, in which nobody looks
Sum = Callable[[Tensor, Tensor, Tensor], Tensor]  # of a stream, of what a linear layer gives, and a parameter
Use = Callable[[Tensor], Tensor]
KEPT: dict[str, tuple[Sum, Use, bool]] = {  # a stream; what reads it; whether it is kept where nobody looks at it
    "zeros by chance": (lambda x, h, w: x + h, torch.relu, False),
    "zeros by chance, and numbers": (lambda x, h, w: x + h, F.hardtanh, False),
    "zeros": (lambda x, h, w: h.relu(), torch.exp, True),
    "zeros of two": (lambda x, h, w: h.relu() + (h @ w).relu(), torch.relu, True),
    "zeros of two that nothing sees": (lambda x, h, w: h.relu() + (h @ w).relu(), torch.exp, False),
    "zeros of two that are mixed": (lambda x, h, w: h.relu() + (h @ w).relu(), lambda a: (a @ a).relu(), False),
    "zeros of two, scaled": (lambda x, h, w: h.relu() + (h @ w).relu(), lambda a: (2 * a).abs(), True),
    "zeros of two in a product": (lambda x, h, w: h.relu() + (h @ w).relu(), lambda a: (a * a.exp()).sign(), True),
    "zeros of two, taken apart": (lambda x, h, w: h.relu() + (h @ w).relu(), lambda a: a.chunk(2)[0].relu(), True),
    "numbers that dropout leaves": (lambda x, h, w: x + F.dropout(h, 0.5), F.hardtanh, True),
    "zeros that dropout leaves": (lambda x, h, w: x + F.dropout(h, 0.5), torch.relu, True),
    "dropout in a language model": (lambda x, h, w: x + F.dropout(h, 0.5), lambda a: F.layer_norm(a, (4,)), False),
    "a sum with zeros": (lambda x, h, w: x + h.relu(), lambda a: a @ a, False),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_compiled_graphs_keep(name: str) -> None:
    make, use, expected = KEPT[name]

    def function(x: Tensor, h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        a = make(x, h, w)
        return a, use(a)

    graph, stream = traced(function)
    assert (stream in barred(graph, atoms(graph), moved(graph, directions_of))) is expected

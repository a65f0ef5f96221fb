"""Sums in compiled graphs in which an operand disappears next to what is added to it: masks of -1e9, of -inf."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import deep_but, fp64, relative_error
from torch import Tensor, nn
from zoo import ZOO

from revfx.compiled.partitioner import reports
from revfx.testing import gradients


__all__ = ["fp64"]  # every test of this file runs in fp64

ROWS, WIDTH = 64, 20
LOWEST = torch.finfo(torch.float64).min


class Scaled(nn.Module):
    """An elementwise function: what it makes of one element shows nowhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.w).tanh()


class Masked(nn.Module):
    """Couplings, and a mask that is added to one element of a stream behind them."""

    mask: Tensor

    def __init__(self, value: float, make: Callable[[], nn.Module], depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(2 * WIDTH, 2 * WIDTH)
        self.f, self.g = (nn.ModuleList(make() for _ in range(depth)) for _ in "fg")
        mask = torch.zeros(ROWS, WIDTH)
        mask[7, 2] = value
        self.value = value
        self.register_buffer("mask", mask)

    def masked(self, a: Tensor) -> Tensor:
        return a + self.mask

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.stem(x).chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            b = b + g(a)
        return self.masked(a), b


class Filled(Masked):
    """The mask is made in the forward."""

    def masked(self, a: Tensor) -> Tensor:
        return a + torch.zeros_like(a).masked_fill(self.mask != 0, self.value)


class Early(Masked):
    """Masked before the last couplings: the number stays in the stream, and is lost once."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.stem(x).chunk(2, -1)
        for i, (f, g) in enumerate(zip(self.f, self.g, strict=True)):
            a = a + f(b)
            b = b + g(a)
            if i == 0:
                a = a + self.mask
        return a, b


def loss(out: tuple[Tensor, Tensor]) -> Tensor:
    """What sees the row of the mask much more than the others."""
    a, b = out
    return 0.01 * b.square().mean() + (b[7] - 1).square().sum() + a[7].softmax(-1).square().sum()


def error(got: nn.Module, model: nn.Module, x: Tensor) -> float:
    ours, plain = (gradients(m, [x], loss) for m in (got, model))
    return relative_error([*ours.values()], [*plain.values()])


def compiled(model: nn.Module) -> Any:
    torch.compiler.reset()
    return torch.compile(copy.deepcopy(model), backend="revfx", options={"inner": "aot_eager"})


@pytest.mark.parametrize(("kind", "value"), [(Masked, -1e9), (Masked, LOWEST), (Filled, -torch.inf), (Early, 1e12)])
def test_compiled_graphs_keep_what_masks_hide(kind: type[Masked], value: float) -> None:
    model, x = kind(value, Scaled), torch.randn(ROWS, 2 * WIDTH, requires_grad=True)
    with reports() as found:
        assert error(compiled(model), model, x) < 1e-9
    assert found[0].regions


class Asked(Masked):
    """The mask comes in with the data."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a, b = self.stem(x).chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            a = a if mask is None or f is not self.f[1] else a + mask
            b = b + g(a)
        return a, b


def test_compiled_graphs_are_right_for_masks_that_are_inputs() -> None:
    model, x = Asked(0.0, Scaled, depth=6), torch.randn(ROWS, 2 * WIDTH, requires_grad=True)
    mask = Masked(-1e9, Scaled).mask
    plain = gradients(model, [x, mask], loss)
    with reports() as found:
        ours = gradients(compiled(model), [x, mask], loss)
    assert relative_error([*ours.values()], [*plain.values()]) < 1e-9
    assert found[0].regions


COMPILED = ("additive", "leapfrog", "momentum", "masked by where", "side inputs", "transformer")


@pytest.mark.parametrize("name", deep_but(("masked by where", "transformer"), COMPILED))
def test_compiled_zoo_stores_nothing_for_it(name: str) -> None:
    make, inputs = ZOO[name]
    with reports() as found:
        compiled(make(3))(*(t.requires_grad_() if t.is_floating_point() else t for t in inputs(8)))
    assert [region.kept_cuts for r in found for region in r.regions] == [2]

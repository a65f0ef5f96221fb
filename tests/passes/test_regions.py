"""What follows from parameters and constants alone, and is read along the depth, is kept: regions do not end at it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled import QUIET, compiled, fresh as fresh
from helpers import assert_same, deep_but, fp64 as fp64, leaf, outcome
from torch import Tensor, nn
from zoo import mlp

import revfx
from revfx.errors import RevfxWarning
from revfx.testing import measure_memory


pytestmark = QUIET
BATCH, LENGTH, D = 64, 6, 8
Table = Callable[["Behind"], Tensor]


class Behind(nn.Module):
    """Couplings behind a stem that can't be inverted, which read a table that is made behind it, too."""

    def __init__(self, table: Table, depth: int, again: bool = False) -> None:
        super().__init__()
        self.table, self.again, self.stem = table, again, nn.Linear(D, D)
        self.positions = nn.Parameter(torch.randn(LENGTH + 1, D))
        self.embedding = nn.Embedding(LENGTH, D)
        self.register_buffer("ids", torch.arange(LENGTH), persistent=False)
        self.f, self.g = (nn.ModuleList(mlp(D) for _ in range(depth)) for _ in "fg")

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x), self.stem(x.flip(0))
        p = self.table(self)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b + p)
            b = b + g(a * x if self.again else a) * p
        return torch.cat([a, b], -1)


class Conditioned(Behind):
    """The same with a condition that is made of the input behind the stem, where the input is added to the result."""

    def forward(self, x: Tensor) -> Tensor:
        a = b = self.stem(x)
        c = torch.tanh(self.stem(x.flip(1)))
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b + c)
            b = b + g(a * c)
        return torch.cat([a + x, b + x], -1)


class Window(Behind):
    """The same with a mask that is made anew for each coupling, from the one before."""

    def forward(self, x: Tensor) -> Tensor:
        a = b = self.stem(x)
        mask = torch.eye(LENGTH, dtype=torch.bool)
        for f, g in zip(self.f, self.g, strict=True):
            mask = mask | mask.roll(1, 0)
            a = a + f((b @ b.mT).masked_fill(~mask, -1e9).softmax(-1) @ b)
            b = b + g(a)
        return torch.cat([a, b], -1)


TABLES: dict[str, Table] = {
    "slice": lambda m: m.positions[:LENGTH],
    "computed": lambda m: m.positions[:LENGTH].relu(),
    "embedding": lambda m: m.embedding(m.ids),
    "no parameter": lambda _: torch.arange(LENGTH * D).view(LENGTH, D) * 0.01,
    "expanded": lambda m: m.positions[:LENGTH].expand(BATCH, -1, -1),
}
MODELS: dict[str, Callable[[int], nn.Module]] = {
    **{name: lambda depth, table=table: Behind(table, depth) for name, table in TABLES.items()},
    "input read again": lambda depth: Behind(TABLES["slice"], depth, again=True),
    "condition": lambda depth: Conditioned(TABLES["slice"], depth),
    "mask of each layer": lambda depth: Window(TABLES["slice"], depth),
}


def peak(call: Any, x: Tensor) -> int:
    call(x)  # plans are made, and code is compiled
    return measure_memory(lambda: call(x).square().mean()).peak


@pytest.mark.parametrize("name", MODELS)
def test_a_table_made_behind_the_stem_costs_no_region(name: str) -> None:
    grown = {"plain": 0, "revfx": 0}
    x = torch.randn(BATCH, LENGTH, D)
    for depth, sign in ((3, -1), (9, 1)):
        model = MODELS[name](depth)
        grown["plain"] += sign * peak(model, x)
        grown["revfx"] += sign * peak(revfx.convert(model), x)
    assert grown["revfx"] < 0.05 * grown["plain"]


COMPILED = [(name, "aot_eager") for name in ("slice", "condition", "mask of each layer")]
CONVERTED = [(name, "convert") for name in MODELS]


@pytest.mark.parametrize(
    ("name", "way"), deep_but([*CONVERTED, *COMPILED], itertools.product(MODELS, ("convert", "aot_eager")))
)
def test_gradients_are_those_of_plain_autograd(name: str, way: str) -> None:
    model, x = MODELS[name](3), leaf(BATCH, LENGTH, D)
    call = revfx.convert(model) if way == "convert" else compiled(model, way)
    assert_same(outcome(call, [x], model), outcome(model, [x], model))


class Gated(nn.Module):
    """A language model as usually written, whose activation is spelled out: that alone can be computed back."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.up = nn.ModuleList(nn.Linear(16, 64) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(64, 16) for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        at = torch.arange(ids.shape[1]) + 0
        x = self.embedding(ids) + self.embedding(at)
        for up, down in zip(self.up, self.down, strict=True):
            h = up(x)
            h = 0.5 * h * (1 + torch.tanh(0.8 * (h + 0.04 * h**3)))
            x = x + down(h)
        return nn.functional.cross_entropy((x @ self.embedding.weight.T).flatten(0, 1), ids.flatten())


def test_an_activation_that_can_be_computed_back_does_not_make_all_above_it_run_again() -> None:
    converted: Any = revfx.convert(Gated(4))
    with pytest.warns(RevfxWarning, match="nothing reversible"):
        converted(torch.randint(20, (8, 32))).backward()
    assert not converted.revfx.plans

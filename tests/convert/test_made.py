"""Masks and indices that a forward makes itself, of numbers alone; and couplings whose factor is one under a mask."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import kept_cuts, kept_growth
from torch import Tensor, nn
from training import assert_same_steps
from zoo import D

import revfx
from revfx.errors import RevfxWarning


pytestmark = pytest.mark.usefixtures("fp64")
LAYERS = 6
EVEN = [(i + 1) % 2 for i in range(2 * D)]


def put(k: int) -> Tensor:
    mask = torch.zeros(2 * D)
    mask[k::2] = 1
    return mask


MASKS: dict[str, Callable[[int], Tensor]] = {
    "compared": lambda k: (torch.arange(2 * D) % 2 == k).to(torch.float64),
    "remainder": lambda k: (torch.arange(2 * D) + k) % 2,
    "list": lambda k: torch.tensor(EVEN, dtype=torch.float64).roll(k).view(1, -1),
    "written": put,
    "put together": lambda k: torch.cat([torch.ones(D), torch.zeros(D)]).roll(k * D),
}
FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "x e^s + t": lambda x, s, t: x * torch.exp(s) + t,
    "(x + t) e^s": lambda x, s, t: (x + t) * s.exp(),
    "(x - t) / e^s": lambda x, s, t: (x - t) / torch.exp(s),
    "(x - t) e^-s": lambda x, s, t: (x - t) * torch.exp(-s),
}


class Masked(nn.Module):
    def __init__(self, mask: str, form: str, layers: int = LAYERS) -> None:
        super().__init__()
        self.mask, self.form = mask, form
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * D, D), nn.Tanh(), nn.Linear(D, 4 * D)) for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(x.shape[0])
        for k, net in enumerate(self.nets):
            mask = MASKS[self.mask](k % 2)
            s, t = net(x * mask).chunk(2, -1)
            s, t = torch.tanh(s) * (1 - mask), t * (1 - mask)
            x, total = FORMS[self.form](x, s, t), total + s.sum(-1)
        return x.square().sum(-1) / 2 - total


@pytest.mark.parametrize(("mask", "form"), [*((m, "x e^s + t") for m in MASKS), *(("compared", f) for f in FORMS)])
def test_masked_couplings_keep_little_per_layer(mask: str, form: str) -> None:
    x = torch.randn(256, 2 * D, requires_grad=True)
    assert kept_growth(lambda layers: Masked(mask, form, layers), x, (LAYERS // 2, LAYERS)) < 0.05


class Indexed(nn.Module):
    def __init__(self, kind: str, layers: int = LAYERS) -> None:
        super().__init__()
        self.kind = kind
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 2 * D)) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        i = torch.arange(0, 2 * D, 2)
        later = i.view(-1)  # another name of what is written to
        i += 1
        for k, net in enumerate(self.nets):
            if self.kind == "turned round":
                x = x.index_select(1, torch.arange(2 * D).flip(0))
            i, j = torch.arange(k % 2, 2 * D, 2), torch.arange(1 - k % 2, 2 * D, 2)
            if self.kind == "where a mask is":
                even = torch.arange(2 * D) % 2 == k % 2
                i, j = even.nonzero().squeeze(-1), (~even).nonzero().squeeze(-1)
            if self.kind == "moved on":
                i, j = (later, later - 1) if k % 2 else (later - 1, later)
            t, s = net(x[:, i]).chunk(2, -1)
            y = torch.empty_like(x)
            y[:, i], y[:, j] = x[:, i], x[:, j] * torch.tanh(s).exp() + t
            x = y
        return x


@pytest.mark.parametrize("kind", ["counted", "where a mask is", "turned round"])
def test_indices_keep_little_per_layer(kind: str) -> None:
    x = torch.randn(256, 2 * D, requires_grad=True)
    assert kept_growth(lambda layers: Indexed(kind, layers), x, (LAYERS // 2, LAYERS)) < 0.05


def test_an_index_that_is_written_to_by_another_name_is_what_it_became() -> None:
    model, x = Indexed("moved on"), torch.randn(8, 2 * D, requires_grad=True)
    converted: Any = revfx.convert(copy.deepcopy(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RevfxWarning)  # it need not be found
        assert_same_steps(converted, model, [x])


def test_an_attribute_that_is_set_to_the_number_that_it_holds_is_not_written() -> None:
    class Notes(Indexed):
        def forward(self, x: Tensor) -> Tensor:
            self.width = 1000 * x.shape[-1]  # another object each time
            return super().forward(x)

    model, x = Notes("counted"), torch.randn(64, 2 * D, requires_grad=True)
    converted: Any = revfx.convert(copy.deepcopy(model))
    assert_same_steps(converted, model, [x])
    assert len(converted.revfx.plans) == 1 and kept_cuts(converted) == 2

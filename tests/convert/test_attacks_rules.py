"""Programs that were once wrong: rules in other spellings, and met outside of their domain."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from coupled import Coupled, x_
from torch import Tensor, nn
from training import assert_same_steps
from zoo import D, mlp

import revfx
from revfx.errors import RevfxWarning


pytestmark = pytest.mark.usefixtures("fp64")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A refusal is as good as a plan here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RevfxWarning)
        yield


# --- rules
def _by_name(m: Any, a: Tensor, b: Tensor, f: Any, g: Any) -> tuple[Tensor, Tensor]:
    a = torch.add(input=a, other=f(b))
    b = torch.add(b, other=g(a), alpha=2)
    a = torch.permute(input=torch.transpose(input=a, dim0=0, dim1=1), dims=(-1, -2))
    a, b = torch.split(tensor=torch.cat(tensors=[a, b], dim=1), split_size_or_sections=D, dim=1)
    return torch.roll(input=torch.flip(input=a, dims=(0,)), shifts=1, dims=-1), torch.reshape(input=b, shape=a.shape)


def _arrays(m: Any, a: Tensor, b: Tensor, f: Any, g: Any) -> tuple[Tensor, Tensor]:
    a = a + f(b)
    b = b + g(a) + a[:, np.int64(1)].unsqueeze(1) + a[:, np.arange(D)] + a[:, tuple(range(D))]
    return a, b


def _empties(m: Any, a: Tensor, b: Tensor, f: Any, g: Any) -> tuple[Tensor, Tensor]:
    a = torch.cat([torch.empty(0), a + f(b)], 1)
    return a, b + g(a)


def _mixed(m: Any, a: Tensor, b: Tensor, f: Any, g: Any) -> tuple[Tensor, Tensor]:
    b = b + g(a.double())
    a, b = torch.cat([a.float(), b], -1).chunk(2, -1)
    return a + f(b), b


@pytest.mark.parametrize("couple", [_by_name, _arrays, _empties, _mixed])
def test_rules_met_in_other_spellings_and_outside_their_domain(couple: Callable[..., Any]) -> None:
    model = Coupled(couple)
    assert_same_steps(revfx.convert(model), model, [x_()])


def test_value_that_only_an_untrusted_inverse_gave_first_is_recomputed() -> None:
    """Relu's zeros bar `h <- y - r` and `r <- y - h`; h, which f ends in, is wanted in the backward."""

    def couple(m: Any, a: Tensor, b: Tensor, f: Any, g: Any) -> tuple[Tensor, Tensor]:
        a = torch.cat([a, b], -1)[:, :D] + f(b)
        r = torch.relu(a).flip(-1) * 0.5 + torch.relu(g(b))
        return r, b * 1.5

    model = Coupled(couple, lambda: nn.Sequential(mlp(), nn.ReLU()), 6)
    assert_same_steps(revfx.convert(model), model, [x_()])


@pytest.mark.parametrize("masked", [False, True])
def test_part_without_zeros_says_nothing_of_the_whole(masked: bool) -> None:
    """One half of what is put together has exact zeros, the other none; where they meet moves from step to step."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start = nn.Sequential(nn.Linear(D, D), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            b = self.start(b)
            for _ in range(4):
                a, b = a + b, b * 1.5
                a = torch.where(b > 0, a, a * 0.5) if masked else a + torch.relu(b) + 2 * (b > 0)
                u, v, w = torch.cat([a, b], -1).split([2, D, D - 2], -1)
                a, b = v, torch.cat([w, u], -1)
            return torch.cat([a, b], -1)

    model = Halves()
    assert_same_steps(revfx.convert(model), model, [x_()])


def test_converted_models_inside_a_converted_model_work_at_the_first_step() -> None:
    class Feed(nn.Module):
        def __init__(self, d: int) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

        def forward(self, t: Tensor) -> Tensor:
            return self.down(nn.functional.gelu(self.up(t)))

    class Couplings(nn.Module):
        def __init__(self, d: int, depth: int, inner: bool = False) -> None:
            super().__init__()
            make = (lambda: Couplings(d // 2, 4)) if inner else (lambda: Feed(d))
            self.f = nn.ModuleList(make() for _ in range(depth))
            self.g = nn.ModuleList(Feed(d) for _ in range(depth))

        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            for f, g in zip(self.f, self.g, strict=True):
                a = a + f(b)
                b = b + g(a)
            return torch.cat([a, b], -1)

    plain = Couplings(6, 2, inner=True)
    nested = copy.deepcopy(plain)
    nested.f = nn.ModuleList(revfx.convert(m) for m in nested.f)
    assert_same_steps(revfx.convert(nested), plain, [torch.randn(8, 12, requires_grad=True)])

"""Functions with a parameter `inverse`, whose code asks for numbers: called whole, and inverted by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import kept_growth
from torch import Tensor, nn
from zoo import D

import revfx
from revfx.errors import NotConvertedWarning


pytestmark = pytest.mark.usefixtures("fp64")
Warp = Callable[..., tuple[Tensor, Tensor]]


def warped(x: Tensor, s: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """`y = asinh(x * exp(s))`, or the other way round; refuses what it can't take, as splines do outside their box."""
    if bool((x.abs() > 1e3).any()):
        raise ValueError("out of range")
    if inverse:
        return torch.sinh(x) * torch.exp(-s), -s
    return torch.asinh(x * torch.exp(s)), s


def backwards(x: Tensor, s: Tensor, inverse: bool = True) -> tuple[Tensor, Tensor]:
    """The same, for a library that trains by what it calls the inverse."""
    return warped(x, s, not inverse)


def wrong(x: Tensor, s: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """One whose inverse is none."""
    y, log_det = warped(x, s)
    return (torch.zeros_like(x), log_det) if inverse else (y, log_det)


def failing(x: Tensor, s: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """One whose inverse takes nothing."""
    if inverse:
        raise ValueError("out of range")
    return warped(x, s)


class Warps(nn.Module):
    def __init__(self, warp: Warp, layers: int) -> None:
        super().__init__()
        nets = (nn.Sequential(nn.Linear(D, 4 * D), nn.Tanh(), nn.Linear(4 * D, D)) for _ in range(layers))
        self.nets = nn.ModuleList(nets)
        self.warp = warp

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for net in self.nets:
            a, b = x.chunk(2, -1)
            b, log_det = self.warp(b, 0.1 * torch.tanh(net(a)))
            total = total + log_det.sum()
            x = torch.cat([b, a], -1)
        return torch.cat([x.flatten(), total[None]])


def growth(warp: Warp) -> float:
    return kept_growth(lambda layers: Warps(warp, layers), torch.randn(128, 2 * D, requires_grad=True))


@pytest.mark.parametrize("warp", [warped, backwards])
def test_a_function_that_inverts_itself_is_inverted_by_itself(warp: Warp) -> None:
    assert growth(warp) < 0.1


@pytest.mark.parametrize("warp", [wrong, failing])
def test_one_that_is_wrong_costs_no_more_than_keeping_and_is_warned_of_once(warp: Any) -> None:
    text = rf"The inverse of `{warp.__name__}` \(.*test_whole.py:\d+\) does not"
    with pytest.warns(NotConvertedWarning, match=text) as said:
        assert 0.05 < growth(warp) < 0.6
    assert len(said) == 2, "once for each model"


def test_functions_have_their_code_again() -> None:
    code: Any = warped.__code__
    revfx.convert(Warps(warped, 3))(torch.randn(8, 2 * D))
    assert warped.__code__ is code


def test_its_error_is_the_users_own() -> None:
    converted: Any = revfx.convert(Warps(lambda *args: warped(*args), 3))
    with pytest.raises(ValueError, match="out of range"):
        converted(torch.full((8, 2 * D), 1e4))

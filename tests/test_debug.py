"""`check_regeneration` finds what a backward would read in the place of what the forward made."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import unseen
from torch import Tensor, nn
from torch.fx import Node
from zoo import ZOO, Additive

import revfx
from revfx import rules
from revfx.debug import check_regeneration
from revfx.errors import RegenerationError
from revfx.rules import Direction, Inverse


WIDTH = 8


def step(model: Callable[..., Any], *inputs: Tensor) -> None:
    loss_of(model(*inputs)).backward()


def loss_of(out: Any) -> Tensor:
    return torch.stack([t.square().mean() for t in (out if isinstance(out, tuple) else (out,))]).sum()


@pytest.mark.parametrize("name", ZOO)
def test_nothing_is_said_of_what_is_right(name: str, fp64: None) -> None:
    build, inputs = ZOO[name]
    model = revfx.convert(build(6))
    with check_regeneration():
        for _ in range(2):
            step(model, *(t.requires_grad_() if t.is_floating_point() else t for t in inputs(8)))


class Counts(nn.Module):
    """A function of how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(WIDTH, WIDTH), unseen()

    def forward(self, x: Tensor) -> Tensor:
        self.calls.values.append(1)
        return self.linear(x).tanh() * len(self.calls.values)


def test_a_function_that_counts_its_calls_is_named() -> None:
    x1, x2 = torch.randn(2, 4, WIDTH, requires_grad=True)
    with check_regeneration():
        loss = loss_of(revfx.rev_block(x1, x2, Counts(), nn.Tanh(), 3))
    with pytest.raises(
        RegenerationError, match=r"regenerated in step \d of 6 at layer 2.*running `f of layer 2` again"
    ):
        loss.backward()  # the context is over: what counts is where the forward ran


class Streams(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.f = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        for f in self.f:
            a = a + f(b)
            b = torch.roll(b + f(a), 1, -1)
        return a, b


@pytest.fixture
def wrong_roll() -> Iterator[None]:
    """Rolls are rolled on, not back."""
    own = rules.registered()[torch.roll]

    def wrong(node: Node) -> Iterator[Direction]:
        for direction in own(node):
            assert isinstance(direction, Inverse)
            yield Inverse(direction.solves, lambda y: torch.roll(y, 1, -1), exact=True)

    rules.unregister_inverse(torch.roll)
    rules.register_inverse(torch.roll)(wrong)
    yield
    rules.unregister_inverse(torch.roll)
    rules.register_inverse(torch.roll)(own)


def test_a_rule_that_is_no_inverse_is_named(wrong_roll: None, fp64: None) -> None:
    model = revfx.convert(Streams(4))
    with check_regeneration():
        out = model(*torch.randn(2, 4, WIDTH, requires_grad=True))
    lines, first = inspect.getsourcelines(Streams)
    line = first + next(i for i, text in enumerate(lines) if "torch.roll" in text)
    with pytest.raises(RegenerationError, match=rf"step \d+ of \d+ at {__file__}:{line}.*its rule is no inverse"):
        loss_of(out).backward()


def test_the_tolerance_is_the_callers() -> None:
    x = torch.randn(16, 32, requires_grad=True)
    with check_regeneration(rtol=0.0), pytest.raises(RegenerationError, match=r"is off by \d\.\de-0[678]"):
        step(revfx.convert(Additive(8), exact=False), x)


def test_an_infinity_that_stays_one_is_right() -> None:
    x = torch.randn(4, 32)
    x[0, 0] = torch.inf
    with check_regeneration():
        step(revfx.convert(Additive(3)), x.requires_grad_())


def test_numbers_that_come_back_as_nan_are_named() -> None:
    x = torch.randn(4, 32)
    x[0, 0] = torch.nan  # which a coupling spreads to numbers that are right before it
    with check_regeneration():
        step(revfx.convert(Additive(3)), x.requires_grad_())  # whose codes store them
    with check_regeneration(), pytest.raises(RegenerationError, match=r"is off by nan .*after solving"):
        step(revfx.convert(Additive(3), exact=False), x)

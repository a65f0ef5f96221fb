"""`check_regeneration` finds what a backward would read in the place of what the forward made."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import lines, unseen
from torch import Tensor, nn
from torch.fx import Node
from training import assert_same_steps
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
        for _ in range(4):
            step(model, *(t.requires_grad_() if t.is_floating_point() else t for t in inputs(8)))


class Counts(nn.Module):
    """A function of how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(WIDTH, WIDTH), unseen()

    def forward(self, x: Tensor) -> Tensor:
        self.calls.values.append(1)
        return self.linear(x).tanh() * len(self.calls.values)


def test_a_function_that_counts_its_calls_is_right() -> None:
    """It runs once in each forward."""
    f, plain = Counts(), Counts()
    plain.load_state_dict(f.state_dict())
    x1, x2 = torch.randn(2, 4, WIDTH, requires_grad=True)
    with check_regeneration():
        for calls in (3, 6, 9, 12):
            got = torch.autograd.grad(loss_of(revfx.rev_block(x1, x2, f, nn.Tanh(), 3)), [x1, x2, *f.parameters()])
            written_out = lines([plain] * 3, [nn.Tanh()] * 3)(x1, x2)
            assert all(map(torch.equal, got, torch.autograd.grad(loss_of(written_out), [x1, x2, *plain.parameters()])))
            assert len(f.calls.values) == calls


class Streams(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.f = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        for f in self.f:
            a = a + f(b)
            b = torch.roll(b + f(a), 1, -1)
        return a, b


ROLLS = (torch.ops.aten.roll.default,)


@pytest.fixture
def wrong_roll() -> Iterator[None]:
    """Rolls are rolled on, not back."""
    own = {roll: rules.registered()[roll] for roll in ROLLS}

    def wrong(node: Node) -> Iterator[Direction]:
        for direction in own[ROLLS[0]](node):
            assert isinstance(direction, Inverse)
            yield Inverse(direction.solves, lambda y: torch.roll(y, 1, -1), exact=True)

    rules.unregister_inverse(*ROLLS)
    rules.register_inverse(*ROLLS)(wrong)
    yield
    rules.unregister_inverse(*ROLLS)
    for roll, rule in own.items():
        rules.register_inverse(roll)(rule)


def test_a_rule_that_is_no_inverse_is_refused_and_nothing_is_dropped_by_it(wrong_roll: None, fp64: None) -> None:
    plain = Streams(4)
    model: Any = revfx.convert(plain)
    inputs = torch.randn(2, 4, WIDTH, requires_grad=True)
    with check_regeneration():
        assert_same_steps(model, plain, [*inputs], steps=4)
    source, first = inspect.getsourcelines(Streams.forward)
    places = [r.where for r in model.revfx.refusals if "other bits" in r.detail]
    assert places
    for line in re.findall(rf"{re.escape(__file__)}:(\d+)", " ".join(places)):
        assert first <= int(line) < first + len(source)


def test_the_tolerance_is_the_callers() -> None:
    x = torch.randn(16, 32, requires_grad=True)
    model = _steady(exact=False)
    with check_regeneration(rtol=0.0), pytest.raises(RegenerationError, match=r"is off by \d\.\de-0[678]"):
        step(model, x)


def _steady(**options: Any) -> nn.Module:
    """Return a converted model after the steps in which it learns and proves."""
    model = revfx.convert(Additive(8), **options)
    for _ in range(3):
        step(model, torch.randn(16, 32, requires_grad=True))
    return model


def test_an_infinity_that_stays_one_is_right() -> None:
    x = torch.randn(16, 32)
    x[0, 0] = torch.inf
    model = _steady()
    with check_regeneration():
        step(model, x.requires_grad_())


def test_numbers_that_come_back_as_nan_are_named() -> None:
    x = torch.randn(16, 32)
    x[0, 0] = torch.nan  # which a coupling spreads to numbers that are right before it
    exact, rounded = _steady(), _steady(exact=False)
    with check_regeneration():
        step(exact, x.requires_grad_())  # its codes store them
    with check_regeneration(), pytest.raises(RegenerationError, match=r"is off by nan .*going backwards"):
        step(rounded, x)

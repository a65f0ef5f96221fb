"""Plans that fail, forwards that raise, and steps that can't be recorded."""

from __future__ import annotations

import math
import traceback
from typing import Any

import pytest
import torch
from fit_models import Residual, branch, equal, fit_of, square
from torch import Tensor, nn

import revfx


STEPS = 6


def step(model: nn.Module, run: Any, x: Tensor) -> list[Tensor]:
    """One step of SGD: the loss and the gradients."""
    model.zero_grad()
    torch.manual_seed(1)
    loss = square(run(x))
    loss.backward()
    found = [loss.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    torch.optim.SGD(model.parameters(), 0.1).step()
    return found


class Hidden:
    """Something that a forward reads, and that no plan can see."""

    factor = 1.0
    sine = False


def scaled(x: Tensor, h: Tensor) -> Tensor:
    return x + (h * Hidden.factor).exp().tanh().square().sin()


def branching(x: Tensor, h: Tensor) -> Tensor:
    return x + (h.sin() if Hidden.sine else h.tanh()).exp().tanh().square().sin()


ANOTHER_WAY = pytest.mark.filterwarnings("ignore:.*ran other operators")  # if units have the ones that change


@pytest.mark.parametrize("join", [scaled, pytest.param(branching, marks=ANOTHER_WAY)])
def test_what_no_plan_can_see_may_change(join: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Residual(*(nn.Linear(64, 64) for _ in range(12)), join=join)

    model, plain, x = make(), make(), torch.randn(1024, 64)
    fitted: Any = revfx.convert(model, memory=0.6 if join is scaled else 0.8)
    for n in range(2 * STEPS):
        monkeypatch.setattr(Hidden, "factor", 1.0 + n // 2)
        monkeypatch.setattr(Hidden, "sine", n // 2 % 2 == 1)
        assert equal(step(model, fitted, x), step(plain, plain, x))
    assert any(plan.plan.sequence for plan in fit_of(fitted).plans)


class Odd(Exception):
    """An exception with a signature of its own."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(code, text)


class Raising(Residual):
    """It raises for arguments that are too large."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if x.abs().max() > 100:
            raise Odd(7, "too large")
        return out


def test_the_models_own_exception_comes_out_as_itself() -> None:
    model = Raising(*(branch() for _ in range(6)))
    x = torch.randn(256, 64)
    fitted: Any = revfx.convert(model, memory=0.6)
    for _ in range(2):
        with pytest.raises(Odd) as raised:
            fitted(x * 1000)
        assert type(raised.value) is Odd and raised.value.args == (7, "too large")
        assert raised.value.__cause__ is None and raised.value.__context__ is None
        assert "revfx" not in "".join(traceback.format_exception_only(raised.value))
    square(fitted(x)).backward()
    assert fit_of(fitted).plans[0].chosen.plan.dropped


def test_wrong_arguments_raise_as_they_do_plainly() -> None:
    model = Residual(*(branch() for _ in range(2)))
    fitted = revfx.convert(model, memory=0.6)
    for args in ((torch.randn(4, 63),), (), (torch.randn(4, 64), 1)):
        texts: list[tuple[type, str]] = []
        for m in (model, fitted):
            with pytest.raises(Exception) as raised:
                m(*args)
            texts.append((raised.type, str(raised.value)))
        assert texts[0] == texts[1]


class Averaging(Residual):
    """Writes to its parameters, and asks for numbers."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            next(self.parameters()).mul_(0.99)
        return super().forward(x * float(x.detach().numpy().std() > 0))


def test_parameters_may_be_written_to() -> None:
    found: list[list[Tensor]] = []
    x = torch.randn(256, 64)
    for budget in (None, 0.6):
        torch.manual_seed(0)
        model: Any = Averaging(*(branch() for _ in range(6)))
        run: Any = model if budget is None else revfx.convert(model, memory=budget)
        mine: list[Tensor] = []
        for _ in range(STEPS):
            mine += step(model, run, x)
        found.append(mine)
    assert equal(*found)


def test_explain_raises_what_the_model_raises() -> None:
    model = Raising(*(branch() for _ in range(2)))
    with pytest.raises(Odd):
        revfx.explain(model, torch.full((8, 64), math.inf), memory=0.5)

"""Plans that fail, forwards that raise, and steps that can't be recorded."""

from __future__ import annotations

import copy
import math
import traceback
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from fit_models import Residual, branch, equal, fit_of, square
from torch import Tensor, nn

import revfx
from revfx.errors import BudgetWarning, RegenerationError, RevfxWarning
from revfx.fit.costs import Cost, Costs
from revfx.fit.tape import Tape


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


@pytest.mark.parametrize("join", [scaled, branching])
def test_after_a_failure_the_next_step_has_a_new_plan(join: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What varied is kept from then on, however often it varies again."""

    def change(n: int) -> None:
        monkeypatch.setattr(Hidden, "factor", 1.0 + n)
        monkeypatch.setattr(Hidden, "sine", n % 2 == 1)

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Residual(*(nn.Linear(64, 64) for _ in range(12)), join=join)

    model, plain, x = make(), make(), torch.randn(1024, 64)
    fitted: Any = revfx.convert(model, memory=0.6 if join is scaled else 0.8)
    change(0)
    assert equal(step(model, fitted, x), step(plain, plain, x))
    change(1)
    with pytest.raises(RegenerationError, match="the next step has a new plan"):
        square(fitted(x)).backward()
    failed = fit_of(fitted).failed[0]
    for n in range(2 * STEPS):
        change(n // 2)
        assert equal(step(model, fitted, x), step(plain, plain, x))
        (plan,) = fit_of(fitted).plans
        assert plan.chosen.plan.dropped
        chosen = plan.chosen.plan
        assert join is branching or (chosen.needs.barred and not {*chosen.again} & chosen.needs.barred)
    assert failed.suspects


@pytest.mark.parametrize("seed", [0, 1])
def test_an_operator_that_varied_costs_no_more_than_itself(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All suspects were barred, and no budget was feasible any more: every later step raised."""
    measured, random = Costs.of, Random(seed)

    def of(self: Costs, tape: Tape) -> list[Cost]:
        return [replace(c, seconds=c.seconds * random.choice([0.01, 1, 100])) for c in measured(self, tape)]

    monkeypatch.setattr(Costs, "of", of)
    torch.manual_seed(0)
    model = Residual(*(branch() for _ in range(6)), join=lambda x, h: x + h * Hidden.factor)
    plain, x, raised = copy.deepcopy(model), torch.randn(128, 64), 0
    fitted: Any = revfx.convert(model, memory=0.5)
    for n in range(STEPS):
        monkeypatch.setattr(Hidden, "factor", 1.0 + n / 2)
        try:
            got = step(model, fitted, x)
        except RegenerationError:  # in the backward: nothing was stepped
            raised += 1
            continue
        assert equal(got, step(plain, plain, x))
    assert raised <= 1


def test_training_goes_on_where_no_plan_without_the_varied_operators_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Residual(*(nn.Linear(64, 64) for _ in range(12)), join=scaled), torch.randn(1024, 64)
    plain = copy.deepcopy(model)
    monkeypatch.setattr(Hidden, "factor", 1.0)
    fitted: Any = revfx.convert(model, memory=0.35)
    fit = fit_of(fitted)
    assert equal(step(model, fitted, x), step(plain, plain, x))
    (first,) = fit.plans
    forward = frozenset(range(first.chosen.plan.needs.tape.turn))
    fit._failed(first, forward)  # pyright: ignore[reportPrivateUsage]
    with pytest.warns(BudgetWarning, match="results that differ from step to step are kept now"):
        assert equal(step(model, fitted, x), step(plain, plain, x))
    assert equal(step(model, fitted, x), step(plain, plain, x))


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
    """Writes to its parameters, and asks for numbers: no step of it can be recorded."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            next(self.parameters()).mul_(0.99)
        return super().forward(x * float(x.detach().numpy().std() > 0))


def test_what_only_recording_can_not_do_runs_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[list[Tensor]] = []
    x = torch.randn(256, 64)
    for budget in (None, 0.6):
        torch.manual_seed(0)
        model: Any = Averaging(*(branch() for _ in range(6)))
        run: Any = model if budget is None else revfx.convert(model, memory=budget)
        mine: list[Tensor] = []
        for n in range(STEPS):
            if budget is not None and n == 0:
                with pytest.warns(RevfxWarning, match=r"writes to a parameter\. It runs plainly, and the budget is"):
                    mine += step(model, run, x)
                monkeypatch.setattr("revfx.fit.fit.record", lambda *args: pytest.fail("it is recorded once"))
            else:
                mine += step(model, run, x)
        found.append(mine)
    assert equal(*found)


def test_explain_raises_what_the_model_raises() -> None:
    model = Raising(*(branch() for _ in range(2)))
    with pytest.raises(Odd):
        revfx.explain(model, torch.full((8, 64), math.inf), memory=0.5)

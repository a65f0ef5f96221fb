"""What the tests of budgets of compiled parts share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from fit_models import equal, fit_of, peak, square, state
from torch import Tensor, nn

from revfx.converted import conversion_of
from revfx.engine.whole import Whole


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing is compiled before or after."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


FIRST = 1.25  # of plain's peak, by a first step: parts are tried as they end


def parts_again(fitted: Any) -> int:
    """How many calls of compiled parts run again under the only plan."""
    return sum(isinstance(op.func, Whole) for op in again(fitted))


def compiled_as(fitted: Any) -> Any:
    """A context in which the plain model runs with the compiled blocks of the converted one."""
    calls = conversion_of(fitted).block_calls
    return contextlib.nullcontext() if calls is None else calls.active()


def check(model: nn.Module, fitted: Any, x: Tensor, memory: float, half: bool = False) -> None:
    """Steps are those of `model`, whose parts are compiled, in less memory, and parts run again."""
    check_steps(model, fitted, x, memory, half)
    assert parts_again(fitted)


def check_steps(model: nn.Module, fitted: Any, x: Tensor, memory: float, half: bool = False) -> None:
    """Steps are those of `model`, whose parts are compiled, in less memory."""

    def step(m: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half), compiled_as(fitted):
            out = m(x)
        return square(out).float()

    plain = peak(model, partial(step, model))
    assert peak(fitted, partial(step, fitted)) <= FIRST * plain
    assert peak(fitted, partial(step, fitted)) <= memory * plain
    for seed in range(3):
        assert equal(state(fitted, partial(step, fitted), seed), state(model, partial(step, model), seed))


def again(fitted: Any) -> list[Any]:
    """The operators that run again."""
    plan = fit_of(fitted).plans[0].chosen.plan
    return [plan.needs.tape.ops[o] for o in plan.recomputed]

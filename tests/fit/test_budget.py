"""What a budget may be written as, and what becomes of one that is missed."""

from __future__ import annotations

from typing import Any

import pytest
from fit_models import equal, fit_of, make, planned, square, state
from torch import nn

import revfx
from revfx import _torch
from revfx.errors import RevfxWarning
from revfx.fit.budget import checked_memory


@pytest.mark.parametrize(
    ("given", "expected"),
    [(1000, 1000), (0.5, 400), (1.0, 800), ("2KiB", 2048), ("2 kb", 2000), ("1.5GiB", 3 * 2**29), ("50%", 400),
     ("800", 800), ("3m", 3_000_000)],
)  # fmt: skip
def test_budgets(given: object, expected: int) -> None:
    budget = checked_memory(given)
    assert budget is not None and budget.of(800) == expected


@pytest.mark.parametrize(
    "given", [0, -1, 0.0, 1.5, -0.5, True, "", "2 XiB", "GiB", "0%", "130%", "nan", [1], float("nan")]
)
def test_what_is_no_budget(given: object) -> None:
    with pytest.raises(ValueError, match="is not a budget"):
        revfx.convert(nn.Linear(2, 2), memory=given)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("other", [{"exact": False}, {"strict": True}], ids=str)
def test_a_budget_decides_alone(other: dict[str, Any]) -> None:
    ((name, value),) = other.items()
    with pytest.raises(ValueError, match=f"Leave `{name}={value}` out"):
        revfx.convert(nn.Linear(2, 2), memory=0.5, **other)


def test_a_budget_that_was_missed_is_planned_for_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an accelerator's allocator counts: here one that says what it is told to."""
    model, (x,), _ = make("mlp")
    fitted: Any = planned(model, x, memory=0.6)
    first = fit_of(fitted).plans[0]
    most, base = int(0.6 * first.summary.plain), 10_000
    over = most - first.chosen.load.peak + 50 * 1024  # too much for this plan
    readings = iter([(base, 0), (base, base + most + over)])
    monkeypatch.setattr(_torch, "allocated", lambda device: next(readings))
    model.zero_grad(set_to_none=False)
    want = state(model, lambda: square(model(x)))
    with pytest.warns(RevfxWarning, match=rf"took {over / 1024:.1f} KiB more than its budget"):
        got = state(model, lambda: square(fitted(x)))
    assert equal(got, want)
    monkeypatch.setattr(_torch, "allocated", lambda device: None)
    assert equal(state(model, lambda: square(fitted(x))), want)
    assert fit_of(fitted).plans[0].chosen.load.peak <= most - over

"""What a budget may be written as, and what becomes of one that is missed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fit_models import equal, fit_of, make, peak, planned, square, state
from torch import Tensor, nn

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


class Centred(nn.Module):
    """It takes the most memory for a moment of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(512, 64)

    def forward(self, h: Tensor) -> Tensor:
        return self.layer(h - torch.cat((h.detach(),) * 8, 1).mean(1, keepdim=True))


class Rebinding(nn.Module):
    """`h` is another tensor with each line, and nothing else holds the first two."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.centred = nn.Linear(64, 256), Centred()

    def forward(self, x: Tensor) -> Tensor:
        h = self.narrow(x)
        h = h + 1
        h = torch.cat((h, h), 1)
        return self.centred(h)


def test_tensors_are_gone_when_the_program_lets_go_of_them() -> None:
    """Python before 3.13 holds the variables of a frame that was looked at."""
    model, x = Rebinding(), torch.randn(256, 64)
    plain = peak(model, lambda: square(model(x)))
    fitted: Any = planned(model, x, memory=1.0)
    assert fit_of(fitted).budget_plans[0].plain == pytest.approx(plain, rel=0.01)

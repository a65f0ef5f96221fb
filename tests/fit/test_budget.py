"""What a budget may be written as."""

from __future__ import annotations

import pytest
from torch import nn

import revfx
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
    with pytest.raises(ValueError, match="is no budget"):
        revfx.convert(nn.Linear(2, 2), memory=given)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "other",
    [{"exact": False}, {"grid": 12}, {"anchor_every": 2}, {"capture": "fx"}, {"strict": True}, {"compile": True}],
)
def test_a_budget_decides_alone(other: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="leave other options out"):
        revfx.convert(nn.Linear(2, 2), memory=0.5, **other)  # pyright: ignore[reportArgumentType]

"""What a user sees while a plan is made, and when the device has no memory left."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from fit_models import make
from torch import Tensor, nn

import revfx
from revfx.fit import progress


class Bar:
    """Counts what a progress bar was told."""

    made: list[Bar]

    def __init__(self, **options: Any) -> None:
        self.options, self.count, self.is_open = options, 0, False
        type(self).made.append(self)

    def __enter__(self) -> Bar:
        self.is_open = True
        return self

    def __exit__(self, *_: object) -> None:
        self.is_open = False

    def update(self) -> None:
        assert self.is_open
        self.count += 1


def test_a_bar_counts_the_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    Bar.made = []
    monkeypatch.setattr("tqdm.tqdm", Bar)
    model, args, loss = make("mlp")
    fitted = revfx.convert(model, memory=0.5)
    for _ in range(2):
        loss(fitted(*args)).backward()
    (bar,) = Bar.made  # the second step needs no plan
    assert bar.count > 10 and not bar.is_open and bar.options["delay"] == progress.DELAY
    assert "Residual" in bar.options["desc"]


class Large(nn.Module):
    """A model for which there is no memory in its third step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(12)))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.layers(x).sum()


def test_an_error_of_the_device_has_the_plan() -> None:
    fitted = revfx.convert(Large(), memory=0.9)
    x = torch.randn(256, 64)
    for _ in range(2):
        fitted(x).backward()
    with pytest.raises(torch.OutOfMemoryError) as raised:
        fitted(x)
    notes = getattr(raised.value, "__notes__", [])
    assert len(notes) == (sys.version_info >= (3, 11))
    assert all("optimizer state" in note and "Large, inputs (256, 64): budget" in note for note in notes)

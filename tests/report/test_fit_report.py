"""What `explain` says of a budget, and the largest batch that `revfx fit` finds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fit_models import Made, Residual, branch, make, square
from hypothesis import given, strategies as st
from torch import nn

import revfx
from revfx._torch import is_fake
from revfx.cli import main
from revfx.errors import RevfxError
from revfx.fit.foresee import foreseen_step
from revfx.report.explanation import FORMS
from revfx.report.fit import MAX_BATCH, RESOLUTION, Largest, largest, search
from revfx.units import size


MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        layer = lambda: nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        self.layers = nn.ModuleList([layer() for _ in range(4)])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x
"""


def small() -> Made:
    """As "mlp", with half the layers."""
    torch.manual_seed(0)
    return Residual(*(branch() for _ in range(3))), (torch.randn(256, 64),), square


def test_a_budget_is_explained() -> None:
    model, args, _ = make("encoder")
    found = revfx.explain(model, args, memory=0.5)
    fit, text = found.fit, str(found)
    assert fit is not None and fit.is_feasible
    assert fit.peak <= fit.budget == fit.plain // 2
    assert {m.module for m in fit.modules} >= {
        f"layers.{name}" for name, _ in model.get_submodule("layers").named_children()
    }
    assert sum(m.kept for m in fit.modules) > 0 and sum(m.recomputed for m in fit.modules) > 0
    times = [p.time for p in fit.curve]
    assert times[0] == 1.0 and times == sorted(times)
    assert "budget" in text and "recomputed" in text and f"least feasible budget: {fit.least} bytes" in text
    assert any("attention" in a for a in found.advice) == ("softmax" in " ".join(fit.held))
    assert json.loads(json.dumps(found.to_dict()))["fit"]["budget"] == fit.budget
    assert "budgets and the time they cost" in found._repr_html_()  # pyright: ignore[reportPrivateUsage]


def test_a_budget_that_is_too_small_is_explained() -> None:
    model, args, _ = make("unet")
    found = revfx.explain(model, args, memory=1000)
    assert found.fit is not None and not found.fit.is_feasible and found.fit.least > 1000
    assert "no plan stays within it" in str(found)


def test_a_budget_is_measured_beside() -> None:
    model, args, _ = make("mlp")
    found = revfx.explain(model, args, memory=0.6, measure=True)
    plain, fitted = found.way("plain"), found.way("fitted")
    assert plain is not None and fitted is not None
    assert plain.measured_peak is not None and fitted.measured_peak is not None
    assert fitted.measured_peak <= 0.6 * plain.measured_peak


def test_the_largest_batch() -> None:
    model, (x,), _ = small()
    found = largest(model, [x], "4MiB")
    assert isinstance(found, Largest) and found.batch > 1.5 * found.plain > 0
    assert found.peak <= found.budget == 4 * 2**20
    assert largest(model, [x], 1000).batch == 0


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "budgeted.py"
    file.write_text(MODEL)
    assert main(["fit", f"{file}:Net", "--input", "8,64", "--memory", "2MiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["batch"] > 8
    assert main(["fit", f"{file}:Net", "--input", "8,64", "--memory", "50%"]) == 2
    assert "give bytes" in capsys.readouterr().err
    assert main(["explain", f"{file}:Net", "--input", "256,64", "--memory", "60%"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].startswith("budget ") and "of its time" in said[1]  # the verdict first
    time, bound = map(float, re.findall(r"at (\d\.\d+) of .* takes less than (\d\.\d+)", said[1])[0])
    assert 1 <= bound <= time
    assert any("least feasible budget" in line for line in said)
    assert main(["explain", f"{file}:Net", "--input", "256,64", "--memory", "1KiB"]) == 1
    assert "no plan stays within it" in capsys.readouterr().out


def test_the_memory_of_a_device_is_shared_with_the_optimizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "budgeted.py"
    file.write_text(MODEL)
    given = ["--device-memory", "3MiB", "--optimizer", "momentum", "--json"]
    assert main(["fit", f"{file}:Net", "--input", "8,64", *given]) == 0
    found = json.loads(capsys.readouterr().out)
    weights = 4 * (2 * 64 * 256 + 64 + 256) * 4
    assert found["resident"] == 3 * weights and found["budget"] == 3 * 2**20 - 3 * weights
    assert main(["fit", f"{file}:Net", "--input", "8,64", "--device-memory", "100KiB"]) == 2
    assert main(["fit", f"{file}:Net", "--input", "8,64"]) == 2


def test_the_picture_has_the_plan_and_the_budget() -> None:
    torch.manual_seed(0)
    model, (x,), _ = make("mlp")
    found = revfx.explain(model, x, memory=0.5)
    assert found.fit is not None
    ways = {u.way: u for u in found.ways}
    assert ways["plain"].peak == found.fit.plain == max(ways["plain"].live)
    assert ways["fitted"].peak == found.fit.peak == max(ways["fitted"].live) <= found.fit.budget
    drawn = FORMS[".svg"](found)
    assert "fitted" in drawn and f"budget {size(found.fit.budget)}" in drawn


# --- the search for the largest size that fits
def up_to(limit: int, tried: list[int] | None = None) -> Callable[[int], bool]:
    """A predicate that holds up to a limit, and notes the sizes that it is asked for."""

    def fits(size: int) -> bool:
        if tried is not None:
            tried.append(size)
        return size <= limit

    return fits


@given(st.integers(0, MAX_BATCH))
def test_the_largest_is_found_to_its_resolution(limit: int) -> None:
    tried: list[int] = []
    low, over = search(up_to(limit, tried))
    assert low <= limit and len(tried) <= 30 and len(set(tried)) == len(tried)
    if limit < MAX_BATCH:
        assert over is not None and limit < over and over - low <= max(1, low // RESOLUTION)
    else:
        assert (low, over) == (MAX_BATCH, None)


def test_small_sizes_are_found_exactly() -> None:
    assert [search(up_to(n)) for n in (0, 1, 2, 3, 23)] == [(0, 1), (1, 2), (2, 3), (3, 4), (23, 24)]


def test_a_search_continues_between_known_sizes() -> None:
    tried: list[int] = []
    assert search(up_to(23, tried), 16, 32) == (23, 24)
    assert all(16 < n < 32 for n in tried)


def test_a_model_without_gradients_does_not_run_on_real_tensors() -> None:
    calls: list[bool] = []

    class Frozen(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            calls.append(is_fake(input))
            return super().forward(input)

    model = Frozen(4, 4).requires_grad_(False)
    with pytest.raises(RevfxError, match="no tensor that needs a gradient"):
        foreseen_step(model, (torch.randn(2, 4),), {})
    assert calls == [True]


def test_a_model_without_memory_is_planned_by_estimated_times() -> None:
    model, (x,), _ = small()
    real, meta = (revfx.explain(model.to(d), x.to(d), memory=0.6).fit for d in ("cpu", "meta"))
    assert real is not None and meta is not None
    assert meta.is_feasible and meta.plain == real.plain and meta.time > 1

"""What a plan comes to, as text and in the log."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from fit_models import fit_of, make

import revfx
from revfx.fit import simulate


@pytest.mark.parametrize("name", ["mlp", "relu"])
def test_a_plan_says_what_it_is(name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate, "bit_seconds", lambda device: 4e-10)  # on a busy machine bits may seem too dear
    model, (x,), loss = make(name)
    fitted: Any = revfx.convert(model, memory=0.5)
    with caplog.at_level(logging.INFO, logger="revfx"):
        for _ in range(2):
            loss(fitted(x)).backward()
        loss(fitted(x[:64])).backward()
        loss(fitted(torch.cat((x, x)))).backward()
    first, second = fit_of(fitted).budget_plans
    lines = [r.getMessage() for r in caplog.records if r.name == "revfx"]
    assert lines == [first.line, second.line] and all(r.levelno == logging.INFO for r in caplog.records)
    assert lines[0].startswith("Residual, inputs (256, 64): budget 2.8 MiB, predicted peak 2.")
    assert "extra time" in lines[0] and "planned in" in lines[0]
    assert first.peak <= first.budget < first.plain and first.time > 1 and first.planning > 0
    plan = fit_of(fitted).plans[0].chosen.plan
    saved = [v for v, saved in plan.needs.keepable.items() if saved]
    ways = first.kept, first.recomputed, first.compressed
    assert sum(a.tensors for a in ways) == len(saved)
    assert sum(a.bytes for a in ways) == sum(map(plan.needs.tape.size, saved))
    assert first.recomputed.tensors and (first.compressed.tensors > 0) == (name == "relu" or bool(plan.dropout_masks))
    assert f"recomputed: {first.recomputed.tensors} saved tensors" in str(first)
    assert "(512, 64)" in str(second)


def test_a_converted_model_shows_its_plans() -> None:
    model, (x,), loss = make("mlp")
    fitted: Any = revfx.convert(model, memory=0.5)
    assert not fitted.revfx.plans and "no plan now" in str(fitted.revfx)
    for batch in (x, x[:64], torch.cat((x, x))):
        loss(fitted(batch)).backward()
    fit: Any = fit_of(fitted)
    plans = fitted.revfx.plans
    assert plans == fit.budget_plans and len(plans) == 2
    assert str(fitted.revfx) == f"{plans[0]}\n\n{plans[1]}"
    assert str(fitted.revfx).startswith("Residual, inputs (256, 64): budget 2.8 MiB\n  predicted peak 2.")


def test_no_budget_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model, args, loss = make("mlp")
    with caplog.at_level(logging.INFO, logger="revfx"):
        loss(model(*args)).backward()
    assert not [r for r in caplog.records if r.name == "revfx"]

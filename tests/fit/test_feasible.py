"""Which budgets are feasible, and the least one that is told, do not hang on measured times."""

from __future__ import annotations

import pickle
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fit_models import MODELS, Made, equal, fit_of, make, peak, planned, state
from helpers import deep_but
from torch import nn

import revfx
from revfx.errors import BudgetError, RevfxWarning
from revfx.fit import costs, simulate
from revfx.fit.budget import as_memory, checked_memory


@pytest.fixture
def perturbed(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Measured times become other ones: each an independent draw over four orders of magnitude."""

    def perturb(seed: int) -> None:
        draw = random.Random(seed)
        monkeypatch.setattr(costs, "_seconds", lambda *args: 10 ** draw.uniform(-6, -2))
        bit = 10 ** draw.uniform(-11, -8)
        monkeypatch.setattr(simulate, "bit_seconds", lambda device: bit)

    return perturb


def refused(made: Made, memory: Any) -> BudgetError | None:
    model, args, _ = made
    try:
        planned(model, args, memory=memory)
    except BudgetError as e:
        return e
    return None


@pytest.mark.parametrize("name", deep_but(["mlp"], MODELS))
def test_feasible_budgets_are_the_same_for_any_times(name: str, perturbed: Callable[[int], None]) -> None:
    warnings.simplefilter("ignore", RevfxWarning)
    made = make(name)
    verdicts = set[Any]()
    for seed in range(2):
        perturbed(seed)
        error = refused(made, 1)
        assert error is not None
        least = error.least
        asked = (int(least * share) for share in (0.9, 0.96))  # below, a loss that takes little may do
        verdicts.add((least, *(refused(made, budget) is None for budget in (*asked, least, least + 1))))
    assert len(verdicts) == 1
    assert next(iter(verdicts))[-2:] == (True, True)


@pytest.mark.parametrize("name", deep_but(["mlp"], ["mlp", "convolutions", "unet"]))
def test_a_budget_has_one_verdict_however_it_is_written(name: str, perturbed: Callable[[int], None]) -> None:
    perturbed(0)
    warnings.simplefilter("ignore", RevfxWarning)  # see below
    made = make(name)
    model, args, _ = made
    fitted: Any = planned(model, args, memory=1.0)
    plain = fit_of(fitted).budget_plans[0].plain
    for share in (0.5, 0.25):
        as_bytes = int(share * plain)
        found = [refused(made, memory) for memory in (share, as_bytes, f"{as_bytes / 1024:.6f}KiB", f"{100 * share}%")]
        assert len({None if e is None else (e.least, e.asked) for e in found}) <= 2  # a text may be a byte less
        assert len({e is None for e in found}) == 1
        error = found[0]
        assert error is None or (error.asked == as_bytes < error.least)


def test_bytes_that_hang_on_the_loss_are_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    """The outputs are large; the share that is accepted is accepted in bytes, too."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = make("mlp")[0], nn.Linear(64, 1024)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x))

    torch.manual_seed(0)
    model, x = Head(), torch.randn(256, 64)
    fitted: Any = planned(model, x, memory=0.75)
    asked = fit_of(fitted).budget_plans[0].budget
    assert not recwarn.list
    with pytest.warns(RevfxWarning, match=r"only for a loss that takes little memory\. With one .* takes up to"):
        fitted = planned(model, x, memory=asked)
    assert fit_of(fitted).budget_plans[0].peak <= asked
    for loss in (torch.Tensor.sum, lambda y: y.square().mean()):
        plain = peak(model, lambda loss=loss: loss(model(x)))
        assert peak(model, lambda loss=loss: loss(fitted(x))) <= 0.75 * plain


def test_what_is_told_can_be_written() -> None:
    model, args, loss = make("encoder")
    with pytest.raises(BudgetError) as raised:
        loss(revfx.convert(model, memory=0.05)(*args)).backward()
    error = raised.value
    text = str(error)
    assert isinstance(error.least, int) and isinstance(error.asked, int) and error.asked < error.least
    assert f"The least feasible budget is {error.least} bytes" in text and "(4, 64, 64)" in text
    line = f'revfx.convert(model, memory="{as_memory(error.least)}")'
    assert f"Write `{line}`" in text
    layer = text.partition("or make `")[2].partition("`")[0]
    assert isinstance(model.get_submodule(layer), nn.Module) and layer
    fitted = eval(line, {"revfx": revfx, "model": model})
    want = state(model, lambda: loss(model(*args)))
    assert equal(state(model, lambda: loss(fitted(*args))), want)
    assert peak(model, lambda: loss(fitted(*args))) <= 1.1 * error.least
    assert equal(state(model, lambda: loss(fitted(*args))), want)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.least, again.asked) == (text, error.least, error.asked)


def test_the_least_budget_is_feasible_where_a_failed_step_left_gradients() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 128, 0.1, batch_first=True, norm_first=True)
    model, x = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), torch.randn(2, 32, 32)
    head = nn.Linear(32, 64)
    with pytest.raises(BudgetError) as raised:
        revfx.convert(nn.Sequential(model, head), memory=1)(x).logsumexp(-1).mean().backward()
    assert head.weight.grad is not None
    revfx.convert(nn.Sequential(model, head), memory=raised.value.least)(x).logsumexp(-1).mean().backward()


@pytest.mark.parametrize("nbytes", [1, 1023, 1024, 1025, 7_444_889, 7_444_890, 2**20, 2**30 - 1, 2**30 + 1, 2**41 + 3])
def test_a_text_is_never_less(nbytes: int) -> None:
    budget = checked_memory(as_memory(nbytes))
    assert budget is not None and budget.bytes is not None
    assert nbytes <= budget.bytes <= 1.1 * nbytes + 1


def test_what_the_caller_does_is_within_the_budget() -> None:
    """Holding what was returned, and a loss in many steps, in bytes as in shares."""

    def held(y: torch.Tensor) -> torch.Tensor:
        kept.append(y)
        return (y - 1).square().mean()

    kept: list[torch.Tensor] = []
    for name in ("mlp", "convolutions"):
        model, args, _ = make(name)
        error = refused((model, args, held), 1)
        assert error is not None
        fitted = planned(model, args, memory=error.least)
        assert peak(model, lambda f=fitted, a=args: held(f(*a))) <= error.least

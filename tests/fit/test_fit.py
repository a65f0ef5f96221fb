"""`convert(memory=...)`: any model within its budget from the first step on, without changing a bit."""

from __future__ import annotations

import contextlib
import itertools
from functools import partial

import pytest
import torch
from fit_models import MODELS, Residual, branch, equal, fit_of, make, peak, planned, state
from helpers import DEEP, deep_but
from torch import Tensor, nn

import revfx
from revfx.errors import BudgetError
from revfx.fit.tape import Tape
from revfx.testing import measure_memory


def tape_of(model: nn.Module) -> Tape:
    return fit_of(model).plans[-1].chosen.plan.needs.tape


SHARES = (0.9, 0.75, 0.55) if DEEP else (0.75, 0.55)
HALF = ("encoder", "convolutions", "unet", "checkpoint", "asks", "attention")  # what others resemble
QUICK = [name for name in MODELS if name != "translator"]  # a loop, as "gru"; see `test_units`


@pytest.mark.parametrize(
    ("name", "autocast"),
    deep_but(
        [*((name, False) for name in QUICK), *((name, True) for name in HALF)],
        itertools.product(MODELS, (False, True)),
    ),
)
def test_a_budget_is_kept_and_no_bit_changes(name: str, autocast: bool) -> None:
    model, args, loss = make(name)
    cast = (lambda: torch.autocast("cpu", torch.bfloat16)) if autocast else contextlib.nullcontext

    def step(of: nn.Module) -> Tensor:
        with cast():
            return loss(of(*args))

    plain = peak(model, partial(step, model))
    want = state(model, partial(step, model))
    kept = 0
    for share in SHARES:
        try:
            with cast():
                fitted = planned(model, args, memory=share)
        except BudgetError as e:
            assert "least feasible budget is" in str(e)
            continue
        assert peak(model, partial(step, fitted)) <= share * plain
        assert len(fit_of(fitted).plans) == 1
        kept += len(fit_of(fitted).plans[0].plan.sequence) > 0
        assert equal(state(model, partial(step, fitted)), want)
        assert equal(state(model, partial(step, fitted)), want)
    assert kept or autocast  # there a stream is saved in half precision alone, and nothing leads back to it


def test_the_first_step_may_be_profiled() -> None:
    """There is one profiler at a time and thread: operators are measured in another thread."""
    model, args, loss = make("convolutions")
    plain = peak(model, lambda: loss(model(*args)))
    fitted = revfx.convert(model, memory=0.75)
    assert peak(model, lambda: loss(fitted(*args))) <= 0.75 * plain


@pytest.mark.parametrize("name", ["mlp", "encoder", "convolutions", "unet", "gru"])
def test_the_plain_step_is_foreseen_to_the_byte(name: str) -> None:
    """But for what the caller's loss takes, and the gradient that it begins with."""
    model, args, loss = make(name)
    model.zero_grad(set_to_none=False)
    measured = measure_memory(lambda: loss(model(*args)))
    fitted = planned(model, args, memory=1.0)
    out = model(*args)
    size = 4 * (out[0] if isinstance(out, tuple) else out).numel()
    load = fit_of(fitted).plans[0].chosen.load
    assert abs(load.live[2 * tape_of(fitted).backward_start + 1] - measured.kept) <= 5 * size
    assert abs(load.peak - measured.peak) <= 4 * size


def test_a_mask_takes_the_place_of_what_only_its_signs_are_read_of() -> None:
    model, args, loss = make("relu")
    fitted = planned(model, args, memory=0.6)
    want = state(model, lambda: loss(model(*args)))
    assert equal(state(model, lambda: loss(fitted(*args))), want)
    plan = fit_of(fitted).plans[0].chosen.plan
    assert len(plan.compressed) + len(plan.dropout_masks) > 0


def test_a_share_of_one_leaves_autograd_alone() -> None:
    model, args, loss = make("mlp")
    fitted = planned(model, args, memory=1.0)
    assert not fit_of(fitted).plans[0].plan.sequence
    assert equal(state(model, lambda: loss(fitted(*args))), state(model, lambda: loss(model(*args))))


def test_what_is_reversible_is_one_way() -> None:
    """Below what can be kept, couplings are inverted; above it they are kept, as that is faster."""

    class Couplings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            make = lambda: nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.ReLU())  # noqa: E731
            self.f = nn.ModuleList([make() for _ in range(16)])

        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, 1)
            for f in self.f:
                a, b = b, a + f(b)
            return (a * b).mean()

    torch.manual_seed(0)
    model, x = Couplings(), torch.randn(1024, 64)

    plain, want = peak(model, lambda: model(x)), state(model, lambda: model(x))
    inverted: list[int] = []
    for share in (0.7, 0.24):
        fitted = planned(model, x, memory=share)
        assert peak(model, lambda f=fitted: f(x)) <= share * plain
        assert equal(state(model, lambda f=fitted: f(x)), want)
        chosen = fit_of(fitted).plans[0].chosen
        inverted.append(len(chosen.inverted.units))
        assert peak(model, lambda f=fitted: f(x)) <= 1.01 * chosen.load.peak  # bytes of codes differ with the data
    assert inverted[0] == 0 < inverted[1]


class Flow(nn.Module):
    """Affine couplings, whose codes are larger than most."""

    def __init__(self) -> None:
        super().__init__()
        make = lambda: nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 64))  # noqa: E731
        self.layers = nn.ModuleList(make() for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        for f in self.layers:
            s, t = f(b).chunk(2, 1)
            a, b = b, a * s.tanh().exp() + t
        return (a.square() + b.square()).mean()


@pytest.mark.parametrize("name", ["encoder", "flow"])
def test_no_budget_is_too_small_to_be_told_how_much_it_takes(name: str) -> None:
    torch.manual_seed(0)
    model, args, loss = (Flow(), (torch.randn(1024, 64),), lambda y: y) if name == "flow" else make(name)
    with pytest.raises(BudgetError, match=r"The least feasible budget is (\d+) bytes") as raised:
        planned(model, args, memory=1)
    least = int(str(raised.value).partition("budget is ")[2].partition(" ")[0])
    fitted = planned(model, args, memory=least)
    want = state(model, lambda: loss(model(*args)))
    assert peak(model, lambda: loss(fitted(*args))) <= least
    assert equal(state(model, lambda: loss(fitted(*args))), want)
    assert "layers" in str(raised.value) or "Backward" in str(raised.value)
    assert name != "flow" or fit_of(fitted).plans[0].chosen.inverted.units


def test_what_is_only_added_up_keeps_no_blocks_together() -> None:
    """A term of each layer, of which the backward needs no sum."""

    class Adding(Residual):
        def forward(self, x: Tensor) -> Tensor:
            total = torch.zeros(())
            for layer in self.layers:
                x = x + layer(x)
                total = total + x.mean()
            return x.square().mean() + total

    torch.manual_seed(0)
    model, x = Adding(*(branch() for _ in range(16))), torch.randn(1024, 64)
    fitted = planned(model, x, memory=0.145)
    assert peak(fitted, lambda: fitted(x)) <= 0.145 * peak(model, lambda: model(x))
    assert equal(state(fitted, lambda: fitted(x)), state(model, lambda: model(x)))

"""Plans beside the optimum, and what marks and nested runs bring."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fit_models import Attention, Residual, UNet, branch
from fit_oracle import bound, made_up
from helpers import deep_but
from torch import Tensor, nn

from revfx.fit import simulate
from revfx.fit.bound import least_seconds
from revfx.fit.costs import Cost
from revfx.fit.foresee import foreseen_step
from revfx.fit.needs import Needs
from revfx.fit.plan import Plan
from revfx.fit.planner import Planner
from revfx.fit.simulate import RECORD_BYTES, STATE_BYTES, Model, Units


def conv() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))


class Dense(nn.Module):
    """Each layer sees what all before it made."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(16 * i), nn.ReLU(), nn.Conv2d(16 * i, 16, 1)) for i in (1, 2, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for f in self.f:
            x = torch.cat((x, f(x).sigmoid()), 1)
        return x


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.ModuleList(nn.Linear(256, 256) for _ in range(3)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for a, b, c in zip(self.a, self.b, self.c, strict=True):
            x = torch.nn.functional.rms_norm(x + c(nn.functional.silu(a(x)) * b(x).tanh()), (256,))
        return x


def attention() -> nn.Module:
    return Residual(*(Attention(64, 4, dropout=0.1, batch_first=True) for _ in range(2)))


def layer() -> nn.Module:
    return nn.TransformerEncoderLayer(128, 4, 512, 0.1, batch_first=True, norm_first=True)


def tanhs() -> nn.Module:
    return nn.Sequential(*(m for _ in range(8) for m in (nn.Linear(256, 256), nn.Tanh())))


ROWS, IMAGES, TOKENS = (4096, 256), (32, 16, 64, 64), (16, 256)
GRAPHS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: Residual(*(branch(256) for _ in range(4))), ROWS),
    "relu": (lambda: Residual(*(branch(256, nn.ReLU) for _ in range(3))), ROWS),
    "tanh": (tanhs, ROWS),
    "convolutions": (lambda: Residual(*(conv() for _ in range(5))), IMAGES),
    "plain convolutions": (lambda: nn.Sequential(*(conv() for _ in range(6))), IMAGES),
    "unet": (lambda: UNet(16), (32, 3, 64, 64)),
    "attention": (attention, (*TOKENS, 64)),
    "dense": (Dense, IMAGES),
    "gated": (Gated, ROWS),
    "encoder": (layer, (*TOKENS, 128)),
}


def needs_of(name: str) -> Needs:
    make, shape = GRAPHS[name]
    model = make().train()
    return Needs(foreseen_step(model, (torch.empty(shape),), {}).step)


@pytest.fixture(autouse=True)
def bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the cost of a bit in the place of an element; units cost nothing, as the optimum has none."""
    monkeypatch.setattr(simulate, "bit_seconds", lambda device: 4e-10)
    monkeypatch.setattr(simulate, "UNIT_OVERHEAD", 0.0)


def budget_between(planner: Planner, part: float) -> int:
    """Return a budget between the least one and the plain peak."""
    most, least = planner.plain[1].peak, planner.least()[1].peak
    return int(least + part * (most - least))


# of a step: what is kept for one read only, or runs twice
ABOVE = {("mlp", 0.5): 0.004, ("attention", 0.25): 0.022, ("encoder", 0.25): 0.065}


CELLS = [*itertools.product(GRAPHS, (0.75, 0.5, 0.25))]
LONG = [  # up to 45 s
    *((name, 0.25) for name in ("mlp", "relu", "tanh", "convolutions", "plain convolutions", "unet", "gated")),
    *((name, 0.5) for name in ("mlp", "plain convolutions", "gated", "encoder", "tanh")),
]


@pytest.mark.parametrize(("name", "part"), deep_but([cell for cell in CELLS if cell not in LONG], CELLS))
def test_plans_are_near_the_optimum(name: str, part: float) -> None:
    needs = needs_of(name)
    assert needs.tape.backward_start <= 60
    costs: Any = made_up(needs)
    planner = Planner(needs, costs)
    budget = budget_between(planner, part)
    found = planner.best(budget)
    assert found is not None
    want = bound(needs, costs, budget - STATE_BYTES - RECORD_BYTES * len(found[0].dropped))
    print(f"{name:20}{part:6}{found[1].seconds:10.6f}{want:10.6f}{planner.seconds:10.6f}")
    assert found[1].peak <= budget
    assert found[1].seconds <= 1.05 * want + ABOVE.get((name, part), 0.0) * planner.seconds


@pytest.mark.parametrize("name", ("mlp", "gated"))
def test_units_have_a_price(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan has fewer ranges of operators that run again if each costs much."""
    needs, counts = needs_of(name), list[int]()
    for price in (0.0, 1.0):
        monkeypatch.setattr(simulate, "UNIT_OVERHEAD", price)
        planner = Planner(needs, made_up(needs))
        found = planner.best(budget_between(planner, 0.75))
        assert found is not None
        counts.append(len(Units(found[0], found[0].segments(found[0].dropped))))
    assert 0 < counts[1] < counts[0]


def test_what_masks_bring() -> None:
    """The same budgets without a bit for signs and drawn masks take longer, or no plan stays within them."""
    for name, part in (("relu", 0.75), ("convolutions", 0.5), ("mlp", 0.25)):
        needs, bare = needs_of(name), needs_of(name)
        costs: Any = made_up(needs)
        bare.compressed.clear()
        bare.dropout_masks = {}
        with_masks, without = Planner(needs, costs), Planner(bare, costs)
        budget = budget_between(with_masks, part)
        found, other = with_masks.best(budget), without.best(budget)
        assert found is not None and (other is None or found[1].seconds < 0.9 * other[1].seconds)


def test_no_plan_is_below_the_bound() -> None:
    """The linear program takes no more than the integer one, and is not far below."""
    for name, part in (("relu", 0.5), ("convolutions", 0.75), ("unet", 0.5), ("gated", 0.25)):
        needs = needs_of(name)
        costs: Any = made_up(needs)
        planner = Planner(needs, costs)
        budget = budget_between(planner, part)
        found = planner.best(budget)
        assert found is not None
        below, want = least_seconds(planner.model, budget), bound(needs, costs, budget)
        assert 0.7 * want <= below <= 1.01 * want and below <= found[1].seconds
        assert least_seconds(planner.model, planner.plain[1].peak) == 0.0
        assert math.isinf(least_seconds(planner.model, max(planner.model.natural) * 9 // 10))


class TwoPeaks(nn.Module):
    """At its first peak there is room for `v` itself, at the second one for its signs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.empty(256)), nn.Parameter(torch.empty(256, 256))

    def forward(self, x: Tensor) -> Tensor:
        u, v = (x * self.w).sigmoid(), (x @ self.v).relu()
        a = torch.cat([v] * 8).sum(0)
        del v
        r = u.tanh()
        b = r.sum(0)
        del u, r
        c = torch.cat([x] * 9 + [x[:14000]]).sum(0)
        return (a + b + c).sum()


def test_bits_are_charged_when_no_plan_has_the_tensor_instead() -> None:
    tape = foreseen_step(TwoPeaks(), (torch.empty(16384, 256),), {}).step
    needs = Needs(tape)
    costs: Any = [Cost(1e-2 if "mm" in str(op.func) else 1e-3) for op in tape.ops]
    step = Model(needs, costs)
    kept = frozenset(v for v in needs.keepable if tape.made_by[v] is None)
    load = step.load(Plan(needs, kept, frozenset(needs.compressed), frozenset(), [0] * tape.backward_start))
    assert needs.compressed and 0 < least_seconds(step, load.peak) <= load.seconds


def test_a_step_without_choices_has_a_bound() -> None:
    needs = Needs(foreseen_step(nn.Linear(8, 8), (torch.empty(4, 8),), {}).step)
    planner = Planner(needs, made_up(needs))
    assert least_seconds(planner.model, planner.plain[1].peak) == 0.0
    assert math.isinf(least_seconds(planner.model, 1))


def test_attention_without_dropout_runs_again() -> None:
    """Its operator is tagged as one that may draw numbers."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            x = self.w(x)
            return nn.functional.scaled_dot_product_attention(x, x, x).sin()

    needs = Needs(foreseen_step(Attending(), (torch.empty(2, 4, 16, 32),), {}).step)
    found = [
        needs.replayed[o]
        for o, op in enumerate(needs.tape.ops[: needs.tape.backward_start])
        if "attention" in str(op.func)
    ]
    assert found and None not in found

"""Minimum cuts beside all choices, and parts of the network beside the whole."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
import torch
from fit_models import Made, convolutions, encoder, mlp
from fit_oracle import made_up
from torch import Tensor, nn

from revfx.fit import min_cut
from revfx.fit.costs import Cost
from revfx.fit.foresee import foreseen_step
from revfx.fit.min_cut import Menu
from revfx.fit.needs import Needs
from revfx.fit.plan import Plan
from revfx.fit.simulate import OVERHEAD, Model


PRICES = [0.0, *(10 ** (8 + n / 10) for n in range(21)), 1e12]


class Elementwise(nn.Module):
    """Values that can't be kept between some that can."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            s = 2 * x + 1  # not saved, and read twice
            x = (3 * s - x).tanh() * s.sigmoid()
        return x.exp()


@pytest.mark.parametrize("seed", range(4))
def test_no_choice_is_cheaper(seed: int) -> None:
    x = torch.randn(64, 64, requires_grad=True)
    tape = foreseen_step(Elementwise(), (x,), {}).step
    needs, random = Needs(tape), Random(seed)
    costs = [Cost(random.uniform(0, 3e-5)) for _ in tape.ops]
    menu = Menu(Model(needs, costs), range(tape.backward_start), frozenset())
    able = sorted(needs.keepable.keys() & menu.values.keys())
    outside = needs.keepable.keys() - menu.values.keys()
    weights: dict[frozenset[int], tuple[int, float]] = {}  # by choice, the bytes kept and the seconds to recompute
    for number in range(2 ** len(able)):
        kept = frozenset(v for n, v in enumerate(able) if number >> n & 1)
        plan = Plan(needs, kept | outside, frozenset(), frozenset(), [0] * tape.backward_start)
        weights[kept] = sum(map(tape.size, kept)), sum(costs[o].seconds + OVERHEAD for o in plan.recomputed)
    found: set[frozenset[int]] = set()
    for price in PRICES:
        kept = menu.choice(price, menu.measured_edges).kept
        found.add(kept)
        cheapest = min(size + price * seconds for size, seconds in weights.values())
        size, seconds = weights[kept]
        assert size + price * seconds <= cheapest + len(tape.ops)  # capacities are whole numbers
    assert len(found) > 2


@pytest.mark.parametrize("make", [mlp, encoder, convolutions])
def test_cuts_of_small_parts_are_those_of_flows(make: Callable[[], Made], monkeypatch: pytest.MonkeyPatch) -> None:
    model, args, _ = make()
    tape = foreseen_step(model, args, {}).step
    needs = Needs(tape)
    costs = made_up(needs)

    def choices() -> list[min_cut.Choice]:
        return list(Menu(Model(needs, costs), range(tape.backward_start), frozenset()).choices())

    found = choices()
    monkeypatch.setattr(min_cut, "FEW", 0)
    assert choices() == found

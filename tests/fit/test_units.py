"""Random plans on the engine: the bits of the plain step, and no more memory than is foreseen."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from fit_models import MODELS, equal, fit_of, make, peak, planned, state
from helpers import deep_but
from torch import nn

from revfx.engine import native
from revfx.engine.call import UnitCall
from revfx.engine.plan import Plan
from revfx.engine.tape import Tape
from revfx.errors import RegenerationError
from revfx.fit import budgeted
from revfx.fit.blocks import blocks_of
from revfx.fit.kinds import BudgetKind
from revfx.fit.make_units import units_of
from revfx.fit.units import Learnt


PLANS = 4  # of each model
SLACK = 2**14  # bytes of random states and fingerprints, which are foreseen roughly
PART = 32  # of what is foreseen, by which a loop whose steps run again in one go may be over


def learnt_step(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, BudgetKind, Learnt]:
    """A model, what it becomes with a budget, the kind of its calls, and the step that was learnt."""
    found: list[Learnt] = []

    def units(chosen: Any, learnt: Learnt, reasons: Any, budget: int) -> Any:
        found.append(learnt)
        return units_of(chosen, learnt, reasons, budget)

    monkeypatch.setattr(budgeted, "units_of", units)
    monkeypatch.setattr(Tape, "forget_tensors", lambda tape: None)
    made = make(name)
    fitted = planned(made[0], made[1], memory=0.8)
    return made, fitted, fit_of(fitted).plans[-1], found[-1]


def drawn_plan(kind: BudgetKind, draw: random.Random) -> Any:
    """A plan that keeps some values, and whose blocks end somewhere."""
    assert kind.chosen is not None
    plan = kind.chosen.plan
    needs, turn = plan.needs, plan.needs.tape.turn
    share = draw.choice([0.1, 0.4, 0.7])
    made = [v for v in needs.wanted if needs.tape.made_by[v] is not None]
    kept = frozenset(v for v in needs.wanted if v not in made or draw.random() < share)
    possible = blocks_of(needs, kind.chosen.model.costs).borders[1:-1]
    borders = draw.sample(possible, min(len(possible), draw.choice([0, 1, 4, 10])))
    block_of = [sum(b <= o for b in borders) for o in range(turn)]
    marks: set[int] = set()
    for v, packs in needs.wanted.items():
        if v not in kept and packs and needs.marks >= {*packs} and draw.random() < 0.5:
            marks.update(packs)
    coins = frozenset(v for v in needs.coins if draw.random() < 0.5)
    return replace(plan, kept=kept, marks=frozenset(marks), coins=coins, block_of=block_of)


def install(kind: BudgetKind, learnt: Learnt, drawn: Any, proven: bool) -> None:
    assert kind.chosen is not None
    kind.plan = Plan()
    chosen = kind.chosen._replace(plan=drawn)
    placed = units_of(chosen, learnt, kind.plan.reasons)
    kind.plan.learn([p.unit for p in placed], range(len(placed)))
    kind.known = [(chosen, kind.plan.path)]
    kind.plan.path.firsts = [p.first for p in placed]
    kind.plan.path.dropped_at = frozenset(learnt.tape.saved[k][0] for k in (*drawn.dropped, *drawn.marks))
    if proven:
        kind.plan.proven.update((-1, unit, ()) for unit in kind.plan.sequence)


@pytest.mark.parametrize("watcher", ["native", "python"])
@pytest.mark.parametrize("name", deep_but(["relu", "encoder", "in place", "lstm", "translator", "unet"], MODELS))
def test_any_plan_is_carried_out(name: str, watcher: str, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> None:
    monkeypatch.setenv(native.CHOICE, watcher)
    (model, args, loss), fitted, kind, learnt = learnt_step(name, monkeypatch)
    want = state(model, lambda: loss(model(*args)))
    assert kind.chosen is not None
    draw, tried = random.Random(seed), 0
    while tried < PLANS:
        drawn = drawn_plan(kind, draw)
        try:
            foreseen = kind.chosen.model.load(drawn).peak
        except LookupError:  # something of it does not come back
            continue
        tried += 1
        install(kind, learnt, drawn, proven=False)
        assert equal(state(model, lambda: loss(fitted(*args))), want)
        assert not kind.is_due
        assert not kind.plan.reasons, kind.plan.reasons
        if watcher == "native":
            assert peak(model, partial(_step, fitted, args, loss)) <= foreseen + max(SLACK, foreseen // PART)


def test_the_first_backward_compares_all_that_it_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    (model, args, loss), fitted, kind, learnt = learnt_step("encoder", monkeypatch)
    assert kind.chosen is not None
    kept = frozenset(v for v in kind.chosen.plan.needs.wanted if learnt.tape.values[v].op is None)
    install(kind, learnt, replace(kind.chosen.plan, kept=kept, marks=frozenset(), coins=frozenset()), proven=True)
    staged = [unit for unit in kind.plan.sequence if len(unit.unit.stages) > 2]
    assert staged
    spoilt: list[int] = []
    inputs = UnitCall.inputs

    def spoiling(call: UnitCall, replay: Any, noted: Any = None) -> list[Any]:
        found = inputs(call, replay, noted)
        if call.stage == len(call.unit.stages) - 1 > 1:
            spoilt.append(call.site)
            found = [t + 1 if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in found]
        return found

    monkeypatch.setattr(UnitCall, "inputs", spoiling)
    with pytest.raises(RegenerationError):
        state(model, lambda: loss(fitted(*args)))
    assert spoilt
    assert not any(unit.is_tried for unit in staged)


def _step(fitted: nn.Module, args: Any, loss: Any) -> torch.Tensor:
    return loss(fitted(*args))

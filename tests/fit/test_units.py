"""Random plans on the engine: the bits of the plain step, and no more memory than is foreseen."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from fit_models import MODELS, encoder, equal, fit_of, make, peak, planned, square, state
from helpers import deep_but
from torch import nn

from revfx.engine import native
from revfx.engine.call import UnitCall
from revfx.engine.plan import Plan
from revfx.engine.tape import Tape
from revfx.errors import RegenerationError
from revfx.fit import budgeted
from revfx.fit.blocks import blocks_of
from revfx.fit.costs import Costs
from revfx.fit.grouping import RecordedStep
from revfx.fit.inverted import Inverted, InvertedSteps
from revfx.fit.kinds import BudgetKind
from revfx.fit.make_units import units_of
from revfx.fit.needs import Needs
from revfx.fit.planner import Planner
from revfx.fit.simulate import Model
from revfx.fit.survey import NOTHING
from revfx.testing import measure_memory


PLANS = 4  # of each model
SLACK = 2**14  # bytes of random states and fingerprints, which are foreseen roughly
PART = 32  # of what is foreseen, by which a loop whose steps run again in one go may be over


class Chain(nn.Module):
    """Couplings of two halves between a linear layer and a norm."""

    def __init__(self, is_affine: bool, depth: int = 8, d: int = 32) -> None:
        super().__init__()
        self.is_affine = is_affine
        self.first, self.last = nn.Linear(2 * d, 2 * d), nn.LayerNorm(2 * d)
        out = 2 * d if is_affine else d
        self.f = nn.ModuleList()
        for _ in range(depth):
            self.f.append(nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, out)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.first(x).chunk(2, 1)
        for f in self.f:
            if self.is_affine:
                s, t = f(b).chunk(2, 1)
                a, b = b, a * s.tanh().exp() + t
            else:
                a, b = b, a + f(b)
        return self.last(torch.cat((a, b), 1))


class Bridged(Chain):
    """What is made before the couplings is read again after them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = self.first(x).sin().exp()
        return super().forward(x) * before.tanh()


class Transposing(nn.Module):
    """Layers whose saved tensor is a view of one that was written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(6):
            h = x * self.scale
            h.add_(0.5)
            x = h.t().sin().t()
        return x


class Filling(nn.Module):
    """A tensor that is filled part by part, as DeepSeek-V3 joins the two parts of its keys."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            before = self.layer(torch.cat((x, x), 1)).sigmoid()
            whole = x.new_empty(len(x), 128)
            whole[:, :64].copy_(x.sin())
            whole[:, 64:].copy_(before)
            x = self.layer((whole * whole).exp().sin()) * before.tanh()
        return x


class Splitting(nn.Module):
    """Parts of activations that are written in place, as in CSP networks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 128) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            b, a = nn.functional.leaky_relu_(layer(x)).split(64, 1)
            x = a.sin() * b.tanh()
        return x


class Normalizing(nn.Module):
    """Divides by magnitudes that NumPy computes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).sin().exp()
            scale = torch.empty(x.shape)
            np.abs(x.detach().numpy(), out=scale.numpy())
            x = x / (1 + scale)
        return x


CHAINS = {
    "additive": partial(Chain, False),
    "affine": partial(Chain, True),
    "bridged": partial(Bridged, False),
    "filling": Filling,
    "splitting": Splitting,
}


def chain(name: str) -> Any:
    torch.manual_seed(0)
    return CHAINS[name](), (torch.randn(512, 64),), square


def recorded_step(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, BudgetKind, RecordedStep]:
    """A model, what it becomes with a budget, the kind of its calls, and the step that was recorded."""
    found: list[RecordedStep] = []

    def units(chosen: Any, recorded: RecordedStep, reasons: Any, budget: int) -> Any:
        found.append(recorded)
        return units_of(chosen, recorded, reasons, budget)

    monkeypatch.setattr(budgeted, "units_of", units)
    monkeypatch.setattr(Tape, "forget_tensors", lambda tape: None)
    made = chain(name) if name in CHAINS else make(name)
    fitted = planned(made[0], made[1], memory=0.8)
    return made, fitted, fit_of(fitted).plans[-1], found[-1]


def drawn_plan(kind: BudgetKind, draw: random.Random) -> Any:
    """A plan that keeps some values, and whose blocks end somewhere."""
    assert kind.chosen is not None
    plan = kind.chosen.plan
    needs, backward_start = plan.needs, plan.needs.tape.backward_start
    share = draw.choice([0.1, 0.4, 0.7])
    made = [v for v in needs.keepable if needs.tape.made_by[v] is not None]
    kept = frozenset(v for v in needs.keepable if v not in made or draw.random() < share)
    possible = blocks_of(needs, kind.chosen.model.estimates).borders[1:-1]
    borders = draw.sample(possible, min(len(possible), draw.choice([0, 1, 4, 10])))
    block_of = [sum(b <= o for b in borders) for o in range(backward_start)]
    compressed: set[int] = set()
    for v, saved in needs.keepable.items():
        if v not in kept and saved and needs.compressed >= {*saved} and draw.random() < 0.5:
            compressed.update(saved)
    dropout_masks = frozenset(v for v in needs.dropout_masks if draw.random() < 0.5)
    return replace(plan, kept=kept, compressed=frozenset(compressed), dropout_masks=dropout_masks, block_of=block_of)


def keeping(plan: Any, kept: frozenset[int], block_of: Sequence[int]) -> Any:
    """A plan that keeps some values, and no bits."""
    return replace(plan, kept=kept, compressed=frozenset(), dropout_masks=frozenset(), block_of=block_of)


def install(
    kind: BudgetKind, recorded: RecordedStep, drawn: Any, proven: bool = False, inverted: Inverted = NOTHING
) -> None:
    assert kind.chosen is not None
    kind.plan = Plan()
    chosen = kind.chosen._replace(plan=drawn, inverted=inverted)
    placed = units_of(chosen, recorded, kind.plan.reasons)
    kind.plan.learn([p.unit for p in placed], [p.chain for p in placed])
    kind.known = [(chosen, kind.plan.path)]
    kind.plan.path.firsts = [p.first for p in placed]
    dropped = (*drawn.dropped, *drawn.compressed, *inverted.saved)
    kind.plan.path.dropped_at = frozenset(recorded.tape.saved[k][0] for k in dropped)
    if proven:
        kind.plan.proven.update((-1, unit, ()) for unit in kind.plan.sequence)


@pytest.mark.parametrize("watcher", ["native", "python"])
@pytest.mark.parametrize("name", [*deep_but(["relu", "encoder", "in place", "lstm", "gru", "unet"], MODELS), "filling"])
def test_any_plan_is_carried_out(name: str, watcher: str, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> None:
    monkeypatch.setenv(native.CHOICE, watcher)
    (model, args, loss), fitted, kind, recorded = recorded_step(name, monkeypatch)
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
        install(kind, recorded, drawn)
        assert equal(state(model, lambda: loss(fitted(*args))), want)
        assert not kind.is_due
        assert not kind.plan.reasons, kind.plan.reasons
        if watcher == "native":
            assert peak(model, partial(_step, fitted, args, loss)) <= foreseen + max(SLACK, foreseen // PART)


def test_the_first_backward_compares_all_that_it_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "encoder", partial(encoder, layers=4))  # units of several stages
    (model, args, loss), fitted, kind, recorded = recorded_step("encoder", monkeypatch)
    assert kind.chosen is not None
    kept = frozenset(v for v in kind.chosen.plan.needs.keepable if recorded.tape.values[v].op is None)
    plan = kind.chosen.plan
    install(kind, recorded, keeping(plan, kept, plan.block_of), proven=True)
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


@pytest.mark.parametrize(("name", "watcher"), [("additive", "native"), ("affine", "native"), ("affine", "python")])
def test_couplings_are_inverted_beside_any_plan(name: str, watcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them and fewer, with all else kept, and with a plan drawn for the rest."""
    monkeypatch.setenv(native.CHOICE, watcher)
    (model, args, loss), fitted, kind, recorded = recorded_step(name, monkeypatch)
    want = state(model, lambda: loss(model(*args)))
    planner = Planner(Needs(recorded.step), Costs().of(recorded.step), any_caller=True)
    kept_plan, counts, draw = kind.chosen, list[int](), random.Random(0)
    for inverted, of_rest, _ in InvertedSteps(planner, recorded):
        counts.append(len(inverted.units))
        assert kept_plan is not None
        kind.known = [(kept_plan._replace(plan=of_rest.plain[0], model=of_rest.model), kind.plan.path)]
        tried, drawn = 0, of_rest.plain[0]
        while tried < 2:
            try:
                foreseen = of_rest.model.load(drawn).peak
            except LookupError:  # something of it does not come back
                drawn = drawn_plan(kind, draw)
                continue
            tried += 1
            install(kind, recorded, drawn, inverted=inverted)
            for _ in range(3):
                assert equal(state(model, lambda: loss(fitted(*args))), want)
            assert not kind.is_due and not kind.plan.reasons
            assert peak(model, partial(_step, fitted, args, loss)) <= foreseen + SLACK
            drawn = drawn_plan(kind, draw)
    assert len(counts) > 2 and counts[0] >= len(model.f)


@pytest.mark.parametrize("watcher", ["native", "python"])
def test_units_that_end_with_a_view_of_what_was_written_are_dropped(
    watcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(native.CHOICE, watcher)
    model, x = Transposing(), torch.randn(512, 64)
    want, plain = state(model, lambda: square(model(x))), peak(model, lambda: square(model(x)))
    fitted = planned(model, x, memory=0.7)
    assert equal(state(model, lambda: square(fitted(x))), want)
    assert peak(model, lambda: square(fitted(x))) <= 0.7 * plain


def test_no_plan_recomputes_across_couplings_that_are_inverted(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, _, recorded = recorded_step("bridged", monkeypatch)
    planner = Planner(Needs(recorded.step), Costs().of(recorded.step), any_caller=True)
    step = next(iter(InvertedSteps(planner, recorded)))
    needs, everything = step.planner.needs, step.planner.plain[0]
    barred = frozenset(v for v in needs.keepable if needs.tape.made_by[v] in needs.barred)
    assert step.can_follow(everything)
    assert not step.can_follow(replace(everything, kept=barred))


@pytest.mark.parametrize("watcher", ["native", "python"])
def test_a_tensor_is_not_taken_for_its_first_part(watcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks end with both, later ones recompute from them, and the forward leaves little but its output."""
    monkeypatch.setenv(native.CHOICE, watcher)
    (model, args, loss), fitted, kind, recorded = recorded_step("splitting", monkeypatch)
    want = state(model, lambda: loss(model(*args)))
    assert kind.chosen is not None
    plan = kind.chosen.plan
    tape = plan.needs.tape
    activations = [o for o, op in enumerate(tape.ops) if op.func is torch.ops.aten.leaky_relu_.default]
    kept = frozenset(v for v in plan.needs.keepable if tape.made_by[v] is None)
    block_of = [bisect_left(activations, o) for o in range(tape.backward_start)]
    drawn = keeping(plan, kept, block_of)
    install(kind, recorded, drawn)
    assert equal(state(model, lambda: loss(fitted(*args))), want)
    assert measure_memory(partial(_step, fitted, args, loss)).kept <= 2 * args[0].nbytes


@pytest.mark.parametrize("watcher", ["native", "python"])
def test_tensors_that_are_filled_part_by_part_can_be_kept(watcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.CHOICE, watcher)
    (model, args, loss), fitted, kind, recorded = recorded_step("filling", monkeypatch)
    want = state(model, lambda: loss(model(*args)))
    assert kind.chosen is not None
    plan, values = kind.chosen.plan, recorded.tape.values
    needs = plan.needs
    numbers = {known: v for v, known in recorded.value_of.items()}
    filled = frozenset(v for v in needs.keepable if values[numbers[v]].writes == 2)
    assert len(filled) == 4
    drawn = keeping(plan, filled, [0] * len(plan.block_of))
    foreseen = kind.chosen.model.load(drawn).peak
    install(kind, recorded, drawn)
    assert equal(state(model, lambda: loss(fitted(*args))), want)
    assert not kind.plan.reasons
    assert peak(model, partial(_step, fitted, args, loss)) <= foreseen + SLACK


def test_loans_are_freed_when_later_blocks_have_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that is recomputed through two blocks takes the first layer's output for a moment only."""
    (model, args, loss), fitted, kind, recorded = recorded_step("additive", monkeypatch)
    want = state(model, lambda: loss(model(*args)))
    assert kind.chosen is not None
    plan = kind.chosen.plan
    needs, tape = plan.needs, plan.needs.tape
    sums = [o for o, op in enumerate(tape.ops[: tape.backward_start]) if op.func is torch.ops.aten.add.Tensor]
    # Drop the first layer, three of the first sums, all of the later layers, and each second of their sums.
    dropped = {0, sums[0], sums[1], *range(sums[3], tape.backward_start)}.difference(sums[4::2])
    kept = frozenset(v for v in needs.keepable if tape.made_by[v] not in dropped)
    drawn = keeping(plan, kept, [bisect_left(sums, o) for o in range(tape.backward_start)])
    foreseen = Model(needs, kind.chosen.model.costs).load(drawn).peak
    install(kind, recorded, drawn)
    assert equal(state(model, lambda: loss(fitted(*args))), want)
    assert not kind.plan.reasons
    assert peak(model, partial(_step, fitted, args, loss)) <= foreseen


def test_no_plan_recomputes_memory_that_numpy_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "numpy", lambda: (Normalizing(), (torch.randn(512, 64),), square))
    _, _, kind, recorded = recorded_step("numpy", monkeypatch)
    empty = torch.ops.aten.empty.memory_format
    made = [o for o, number in enumerate(recorded.numbers) if recorded.tape.ops[number].func is empty]
    assert len(made) == 4 and recorded.unfilled() == {*made}
    assert kind.chosen is not None
    assert not any(map(kind.chosen.plan.needs.replayed.__getitem__, made))

"""Compiled parts of a model with a budget: each runs again whole, by the same kernels."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from compiled import QUIET
from fit_models import Made, Residual, branch, equal, fit_of, make, peak, planned, square, state
from helpers import deep_but
from torch import Tensor, nn
from torch._dynamo import graph_break

import revfx
from revfx import _torch
from revfx.converted import conversion_of
from revfx.engine.whole import Whole
from revfx.errors import BudgetError, RevfxWarning


pytestmark = QUIET


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing is compiled before or after."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


FIRST = 1.25  # of plain's peak, by a first step: parts are tried as they end


def parts_again(fitted: Any) -> int:
    """How many calls of compiled parts run again under the only plan."""
    return sum(isinstance(op.func, Whole) for op in again(fitted))


def compiled_as(fitted: Any) -> Any:
    """A context in which the plain model runs with the compiled blocks of the converted one."""
    calls = conversion_of(fitted).block_calls
    return contextlib.nullcontext() if calls is None else calls.active()


def check(model: nn.Module, fitted: Any, x: Tensor, memory: float, half: bool = False) -> None:
    """Steps are those of `model`, whose parts are compiled, in less memory, and parts run again."""
    check_steps(model, fitted, x, memory, half)
    assert parts_again(fitted)


def check_steps(model: nn.Module, fitted: Any, x: Tensor, memory: float, half: bool = False) -> None:
    """Steps are those of `model`, whose parts are compiled, in less memory."""

    def step(m: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half), compiled_as(fitted):
            out = m(x)
        return square(out).float()

    plain = peak(model, partial(step, model))
    assert peak(fitted, partial(step, fitted)) <= FIRST * plain
    assert peak(fitted, partial(step, fitted)) <= memory * plain
    for seed in range(3):
        assert equal(state(fitted, partial(step, fitted), seed), state(model, partial(step, model), seed))


def convolutions() -> Made:
    """Layers with BatchNorm; the compiler keeps none of their inputs as they are."""
    layers: list[Any] = [layer for _ in range(3) for layer in make("convolutions")[0].layers]  # type: ignore[union-attr]
    return Residual(*layers), (torch.randn(16, 16, 16, 16),), square


KINDS = [*itertools.product(("mlp", "convolutions", "encoder", "asks"), (False, True))]


@pytest.mark.parametrize(
    ("name", "half"), deep_but([("mlp", False), ("convolutions", False), ("encoder", True), ("asks", True)], KINDS)
)
def test_blocks_are_compiled_and_run_again(name: str, half: bool) -> None:
    """Dropout, BatchNorm and attention within them; numbers are asked for between them."""
    model, (x,), _ = make(name) if name != "convolutions" else convolutions()
    fitted: Any = revfx.convert(model, memory=0.6, compile=True)
    check(model, fitted, x, 0.6, half)
    assert not fitted.revfx.refusals


def test_what_parts_run_again_from_goes_as_the_backward_passes_them() -> None:
    """Of many layers what they run again from takes as much as one layer within."""
    torch.manual_seed(0)
    model, x = Residual(*(branch(64) for _ in range(24))), torch.randn(1024, 64)
    fitted: Any = planned(model, x, memory=0.17, compile=True)
    check(model, fitted, x, 0.17)


def test_the_input_that_a_compiled_part_saves_is_dropped() -> None:
    """The cheapest plan keeps the input of each GELU, and computes the input of the compiled layer after it again."""
    blocks = [nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64)) for _ in range(4)]
    for block in blocks:
        block[2].compile(backend="aot_eager")
    model, x = nn.Sequential(*blocks), torch.randn(256, 64)
    check_steps(model, planned(model, x, memory=0.75), x, 0.75)


@pytest.mark.parametrize("how", ["in place", "wrapped", "breaks"])
def test_some_parts_may_be_compiled(how: str) -> None:
    """By `module.compile()`, by `torch.compile(module)`, or with two graphs in one; the others run as they are."""
    model, (x,), _ = make("mlp")
    layers: Any = model.layers
    for i in (1, 2, 4):
        if how == "wrapped":
            layers[i] = torch.compile(layers[i], backend="aot_eager")
        else:
            if how == "breaks":
                layers[i].insert(2, Breaks())
            layers[i].compile(backend="aot_eager")
    fitted: Any = planned(model, x, memory=0.5)
    check(model, fitted, x, 0.5)
    assert any(str(op.func).startswith("aten") for op in again(fitted))


class Breaks(nn.Module):
    """Something at which the compiler ends a graph."""

    def forward(self, x: Tensor) -> Tensor:
        graph_break()
        return x.sin()


def again(fitted: Any) -> list[Any]:
    """The operators that run again."""
    plan = fit_of(fitted).plans[0].chosen.plan
    return [plan.needs.tape.ops[o] for o in plan.recomputed]


def test_copies_and_pickles_run_uncompiled_as_those_of_torch() -> None:
    model, (x,), _ = make("mlp")
    fitted: Any = planned(model, x, memory=0.5, compile=True)
    for twin in (copy.deepcopy(fitted), pickle.loads(pickle.dumps(fitted))):
        plain = copy.deepcopy(model)
        assert equal(state(twin, lambda m=twin: square(m(x))), state(plain, lambda m=plain: square(m(x))))


def test_evaluation_and_several_forwards_in_between() -> None:
    model, (x,), _ = make("mlp")
    fitted = planned(model, x, memory=0.5, compile=True)
    found: list[list[Tensor]] = []
    for m in (model, fitted):
        model.zero_grad()
        torch.manual_seed(1)
        with compiled_as(fitted):
            losses = [square(m(x)), square(m(x + 1))]
            with torch.no_grad():
                value = m(x)
        for loss in losses:
            loss.backward()
        found.append([value, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert equal(*found)


def test_the_least_names_the_part() -> None:
    model, (x,), _ = make("mlp")
    with pytest.raises(BudgetError, match=r"(?s)least feasible budget is \d+ bytes.*compiled Sequential"):
        planned(model, x, memory=0.05, compile=True)


def test_explain_names_parts() -> None:
    model, (x,), _ = make("mlp")
    for layer in model.layers:  # type: ignore[union-attr]
        layer.compile(backend="aot_eager")
    report = revfx.explain(model, x, memory=0.5)
    assert report.fit is not None and report.fit.peak <= 0.5 * report.fit.plain
    assert "layers.2" in str(report)


def test_parts_may_be_compiled_after_it_was_planned() -> None:
    model, (x,), _ = make("mlp")
    fitted: Any = planned(model, x, memory=0.5)
    for layer in model.layers:  # type: ignore[union-attr]
        layer.compile(backend="aot_eager")
    for _ in range(2):
        assert equal(state(fitted, lambda: square(fitted(x))), state(model, lambda: square(model(x))))


def test_parts_that_change_places_are_no_others() -> None:
    """Calls of alike parts are the same operators in any order."""

    class Turned(Residual):
        def forward(self, x: Tensor) -> Tensor:
            for layer in reversed(self.layers) if x[0, 0] < 0 else self.layers:
                x = x + layer(x)
            return x

    torch.manual_seed(0)
    model, x = Turned(*(branch() for _ in range(6))), torch.randn(256, 64).abs()
    for layer in model.layers:
        layer.compile(backend="aot_eager")
    fitted = planned(model, x, memory=0.5)
    assert equal(state(fitted, lambda: square(fitted(-x))), state(model, lambda: square(model(-x))))
    assert not fit_of(fitted).plans[0].is_due


def test_an_argument_that_is_written_to_before_the_backward_raises() -> None:
    """One element, of what a part reads and autograd does not keep."""

    class Doubling(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward((input * 2).sin())

    class Added(Residual):
        seen: list[Tensor]

        def forward(self, x: Tensor) -> Tensor:
            self.seen = []
            for layer in self.layers:
                self.seen.append(x := x + 1)
                x = layer(x)
            return x

    torch.manual_seed(0)
    model: Any = Added(*(Doubling(*branch()) for _ in range(8)))
    for layer in model.layers:
        layer.compile(backend="eager")
    x = torch.randn(256, 64)
    fitted: Any = planned(model, x, memory=0.5)
    assert parts_again(fitted)
    loss = square(fitted(x))
    with torch.no_grad():
        for t in fitted.seen:
            t[3, 5] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_hooks_of_parameters_hear_of_real_gradients_alone() -> None:
    model, (x,), _ = make("mlp")
    for layer in model.layers:  # type: ignore[union-attr]
        layer.compile(backend="aot_eager")
    heard: list[Tensor] = []
    for p in model.parameters():
        p.register_hook(heard.append)
    fitted = planned(model, x, memory=0.5)
    heard.clear()
    square(fitted(x)).backward()
    assert len(heard) == len([*model.parameters()])


def _writing(model: Any) -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x.add_(1)
            return x.sin()

    model.layers[2] = nn.Sequential(nn.Linear(64, 64), Writes())
    model.layers[2][1].compile(backend="eager")


@dataclass
class Result:
    y: Tensor


def _objects(model: Any) -> None:
    class Gives(nn.Linear):
        def forward(self, input: Tensor) -> Any:
            return Result(super().forward(input))

    class Takes(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return self[0](input).y

    model.layers[2] = Takes(Gives(64, 64))
    model.layers[2][0].compile(backend="eager")


@pytest.mark.parametrize("change", [_writing, _objects])
def test_what_can_not_run_again_is_kept(change: Callable[[Any], None]) -> None:
    """A part that writes to its arguments, or returns an object."""
    model, (x,), _ = make("mlp")
    change(model)
    fitted = planned(model, x, memory=0.6)
    for seed in range(3):
        assert equal(state(fitted, lambda: square(fitted(x)), seed), state(model, lambda: square(model(x)), seed))


def test_a_model_that_is_compiled_as_a_whole_says_so() -> None:
    model, (x,), _ = make("mlp")
    want = state(model, lambda: square(model(x)))
    wrapped: Any = torch.compile(model, backend="eager")
    with pytest.warns(RevfxWarning, match="compiled as a whole.*the budget is not kept"):
        converted = revfx.convert(wrapped, memory=0.5)
    assert equal(state(model, lambda: square(converted(x))), want)
    model.compile(backend="eager")
    with pytest.warns(RevfxWarning, match="compiled as a whole.*the budget is not kept"):
        revfx.convert(model, memory=0.5)(x)


def test_a_budget_is_kept_when_the_converted_model_is_compiled() -> None:
    model, (x,), _ = make("mlp")
    want = state(model, lambda: square(model(x)))
    plain = peak(model, lambda: square(model(x)))
    fitted = planned(model, x, memory=0.5)
    fitted.compile(backend="eager")
    assert equal(state(model, lambda: square(fitted(x))), want)
    assert peak(model, lambda: square(fitted(x))) <= 0.5 * plain


def test_a_model_without_blocks_says_so() -> None:
    with pytest.raises(ValueError, match=r"this Linear has none.*part.compile"):
        revfx.convert(nn.Linear(4, 4), memory=0.5, compile=True)


def test_what_the_compiler_can_not_take_runs_as_it_is_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no compiler on this machine")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", failing)
    model, (x,), _ = make("mlp")
    plain = copy.deepcopy(model)
    fitted: Any = planned(model, x, memory=0.5, compile=True)
    assert equal(state(fitted, lambda: square(fitted(x))), state(plain, lambda: square(plain(x))))
    assert ["layers.3" in str(r) for r in fitted.revfx.refusals].count(True) == 1 and parts_again(fitted)


def test_alike_blocks_are_compiled_once() -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    model = Residual(*(branch() for _ in range(12)))
    x = torch.randn(64, 64)
    fitted = planned(model, x, memory=0.5, compile=True)
    square(fitted(x)).backward()
    assert counters["stats"]["unique_graphs"] == 2  # the input of the first needs no gradient


def test_the_plain_model_stays_uncompiled() -> None:
    """It shares its modules with the converted one, which runs compiled."""
    from torch._dynamo.utils import counters

    def frames() -> int:
        return counters["frames"]["total"]

    def joined(a: Tensor, b: Tensor) -> Tensor:
        """Between blocks of the converted model, another thread runs the plain one."""
        if armed and threading.current_thread() is threading.main_thread():
            armed.clear()
            before = frames()
            with ThreadPoolExecutor(1) as thread:
                is_plain = thread.submit(lambda: torch.equal(model.eval()(x), want)).result()
            found.append(is_plain and frames() == before)
            model.train()
        return a + b

    armed: list[bool] = []
    found: list[bool] = []
    torch.manual_seed(0)
    model, x = Residual(*(branch() for _ in range(6)), join=joined), torch.randn(256, 64)
    want = model.eval()(x)
    model.train()
    fitted: Any = revfx.convert(model, memory=0.5, compile=True)

    def are_clean() -> bool:
        return not any(_torch.is_compiled(m) or _torch.COMPILED in vars(m) for m in model.modules())

    assert are_clean()
    counters.clear()
    plain = state(model, lambda: square(model(x)))
    assert frames() == 0
    square(fitted(x)).backward()
    compiled = frames()
    assert compiled and are_clean()
    assert equal(state(model, lambda: square(model(x))), plain)
    assert frames() == compiled and fitted.state_dict().keys() == model.state_dict().keys()
    for _ in range(3):
        square(fitted(x)).backward()
    assert frames() == compiled and len(fit_of(fitted).plans) == 1 and parts_again(fitted)
    armed.append(True)
    square(fitted(x)).backward()
    assert found == [True] and are_clean()


def test_a_forward_that_raises_leaves_nothing_compiled() -> None:
    model, (x,), _ = make("mlp")
    fitted = revfx.convert(model, memory=0.5, compile=True)
    for _ in range(2):
        with pytest.raises(Exception, match="normalized_shape"):
            fitted(x[:, :63])
        assert not any(map(_torch.is_compiled, model.modules()))

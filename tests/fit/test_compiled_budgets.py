"""Compiled parts of a model with a budget: each runs again whole, by the same kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from compiled import QUIET
from compiled_budgets import again, check, check_steps, fresh as fresh, parts_again
from fit_models import (
    Made,
    Residual,
    branch,
    equal,
    fit_of,
    make,
    peak,
    planned,
    quick_search as quick_search,
    square,
    state,
)
from helpers import deep_but
from torch import Tensor, nn
from torch._dynamo import graph_break

import revfx
from revfx.errors import RevfxWarning


pytestmark = QUIET


def convolutions() -> Made:
    """Layers with BatchNorm; the compiler keeps none of their inputs as they are."""
    layers: list[Any] = [layer for _ in range(3) for layer in make("convolutions")[0].layers]  # type: ignore[union-attr]
    return Residual(*layers), (torch.randn(16, 16, 16, 16),), square


KINDS = [*itertools.product(("mlp", "convolutions", "encoder", "asks"), (False, True))]


@pytest.mark.parametrize(("name", "half"), deep_but([("mlp", False), ("convolutions", False), ("asks", True)], KINDS))
def test_blocks_are_compiled_and_run_again(name: str, half: bool) -> None:
    """Dropout, BatchNorm and attention within them; numbers are asked for between them."""
    model, (x,), _ = make(name) if name != "convolutions" else convolutions()
    fitted: Any = revfx.convert(model, memory=0.6, compile=True)
    check(model, fitted, x, 0.6, half)
    assert not fitted.revfx.refusals


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

"""`torch.compile(model, backend="revfx")` from the outside: options, messages, reports and the log."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from compiled import fresh as fresh
from helpers import TOLERANCE, leaf, loss_of, mlps, relative_error
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._functorch import config as functorch_config
from torch._inductor import list_mode_options

import revfx
from revfx.compiled import _inductor
from revfx.compiled.partitioner import reports


Options = dict[str, str | int | bool | Callable[..., Any]]  # as `torch.compile` takes them
EAGER: Options = {"inner": "aot_eager"}
ROUNDING: Options = {**EAGER, "exact": False}
DEPTH, ROWS = 4, 16


class Couplings(nn.Module):
    """Additive couplings of two streams."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.f, self.g, self.dropout = mlps(DEPTH), mlps(DEPTH), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + self.dropout(f(b))
            b = b + g(a)
        return torch.cat([a, b], -1)


class Scaling(nn.Module):
    """Couplings that multiply by exp(s) with an s that nothing bounds."""

    def __init__(self) -> None:
        super().__init__()
        self.s, self.t = mlps(DEPTH), mlps(DEPTH)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for s, t in zip(self.s, self.t, strict=True):
            a, b = b * s(a).exp() + t(a), a
        return torch.cat([a, b], -1)


class Momentum(nn.Module):
    """A velocity that halves in every step: inverting it doubles rounding errors."""

    def __init__(self) -> None:
        super().__init__()
        self.f = mlps(3 * DEPTH)

    def forward(self, x: Tensor) -> Tensor:
        x, v = x.chunk(2, -1)
        for f in self.f:
            v = 0.5 * v + f(x)
            x = x + v
        return torch.cat([x, v], -1)


def irreversible() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def gradients(model: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> Sequence[Tensor | None]:
    """The gradients of the input and of all parameters, from a fixed random state."""
    torch.manual_seed(1)
    return torch.autograd.grad(loss_of(model(x)), [x, *module.parameters()])


def assert_right(model: nn.Module, x: Tensor, **door: Any) -> Callable[[Tensor], Tensor]:
    """The compiled model, which gives the plain model's gradients."""
    compiled = torch.compile(model, **door)
    assert relative_error(gradients(compiled, model, x), gradients(model, model, x)) < TOLERANCE
    return compiled


# --- options
@pytest.mark.parametrize("model", [Couplings, Scaling, Momentum])
def test_eager_kernels_give_the_plain_gradients(model: type[nn.Module]) -> None:
    with reports() as found:
        assert_right(model(), leaf(ROWS, 8), backend="revfx", options={**ROUNDING, "strict": True})
    (report,) = found
    assert len(report.regions) == 1
    assert report.regions[0].freed_bytes > 2 * report.regions[0].kept_bytes


def test_what_is_regenerated_is_as_the_forward_made_it_where_the_backward_runs_under_autocast() -> None:
    model, x = Couplings().float(), leaf(ROWS, 8, dtype=torch.float32)

    def step(call: Callable[[Tensor], Tensor]) -> Sequence[Tensor | None]:
        y = call(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):  # which leaves fp64 alone
            return torch.autograd.grad(loss_of(y), [x, *model.parameters()])

    compiled = torch.compile(model, backend="revfx", options={**EAGER, "strict": True})
    assert relative_error(step(compiled), step(model)) < 1e-5, "plain autograd's products are in bfloat16 too"
    assert relative_error(gradients(model, model, x), step(model)) > 1e-3


def test_inputs_of_a_coupling_with_a_vanishing_factor_are_kept() -> None:
    model, x = Scaling(), leaf(ROWS, 8)
    with torch.no_grad():
        list(model.s[2].parameters())[-1].sub_(50.0)
    assert_right(model, x, backend="revfx", options=EAGER)  # by codes
    torch.compiler.reset()
    assert_right(model, x, backend="revfx", options=ROUNDING)


def test_strict_raises_with_the_reason_for_a_graph_that_is_left_as_it_was() -> None:
    model, x = irreversible(), leaf(ROWS, 8)
    assert_right(model, x, backend="revfx", options=EAGER)
    torch.compiler.reset()
    with pytest.raises(BackendCompilerFailed, match="`relu` maps all negative numbers to 0") as raised:
        torch.compile(model, backend="revfx", options={**EAGER, "strict": True})(x)
    assert isinstance(raised.value.inner_exception, revfx.NotReversibleError)
    assert "NotReversibleError: a compiled graph is left as it was:" in str(raised.value)


MISUSES: list[tuple[Any, str]] = [
    ({"nonsense": 1}, r"unknown options \['nonsense'\]: neither revfx \(inner, exact, strict\) nor inductor has them"),
    ({"inner": "eager"}, "`inner='eager'` is not known; use 'inductor' or 'aot_eager'"),
    ({"inner": "aot_eager", "max_autotune": False}, r"takes no mode and no options of inductor: \['max_autotune'\]"),
    ({"inner": "aot_eager", "nonsense": 1}, r"unknown options \['nonsense'\]"),
    ({"exact": True}, "`exact=True`: inductor's kernels may round a function otherwise.*'inner': 'aot_eager'"),
    ({"unbounded": "store"}, r"unknown options \['unbounded'\]"),
    ({"custom_partitioner_fn": None}, "`custom_partitioner_fn` is what the backend 'revfx' sets"),
]


@pytest.mark.parametrize(("options", "message"), MISUSES)
def test_wrong_options_raise_in_words(options: Options, message: str) -> None:
    with pytest.raises(BackendCompilerFailed, match=f"backend='revfx' raised:\nValueError: .*{message}") as raised:
        torch.compile(Couplings(), backend="revfx", options=options)(leaf(ROWS, 8))
    assert isinstance(raised.value.inner_exception, ValueError)


def test_eager_kernels_take_no_mode() -> None:
    with pytest.raises(ValueError, match="takes no mode and no options of inductor: default"):
        _backend()(fx.symbolic_trace(nn.Identity()), [], mode="default", options=EAGER)


def _backend() -> Callable[..., Any]:
    from revfx.compiled.backend import revfx as backend

    return backend


@pytest.mark.parametrize("mode", [None, "default", "max-autotune-no-cudagraphs"])
def test_inductor_gets_its_mode_and_its_options(monkeypatch: pytest.MonkeyPatch, mode: str | None) -> None:
    given: list[dict[str, Any]] = []

    def compile_fx(gm: fx.GraphModule, inputs: Sequence[Any], config_patches: dict[str, Any]) -> Callable[..., Any]:
        given.append(config_patches)
        return gm.forward

    monkeypatch.setattr(_inductor, "compile_fx", compile_fx)
    given_options: Options = {"max-autotune": False, "fallback_random": True, "strict": True}
    options = given_options if mode is None else None
    torch.compile(Couplings(), backend="revfx", mode=mode, options=options)(leaf(ROWS, 8))
    partitioner = given[0].pop("custom_partitioner_fn")
    assert isinstance(partitioner, revfx.ReversiblePartitioner)
    assert partitioner.strict == (mode is None)
    assert given == [{"max_autotune": False, "fallback_random": True} if mode is None else list_mode_options(mode)]


# --- what is found is told
def test_a_later_backward_may_keep_the_graph_over_eager_kernels(fp64: None) -> None:
    model, x = Couplings(), leaf(ROWS, 8)
    call = torch.compile(model, backend="revfx", options=EAGER)
    loss_of(call(x)).backward()
    wanted = [x, *model.parameters()]
    loss = loss_of(call(x))
    first, second = torch.autograd.grad(loss, wanted, retain_graph=True), torch.autograd.grad(loss, wanted)
    assert relative_error(first, second) == 0.0
    assert relative_error(first, torch.autograd.grad(loss_of(model(x)), wanted)) < TOLERANCE


SETTINGS = ({"activation_memory_budget": 0.0}, {"activation_memory_budget": 0.3}, {"aggressive_recomputation": True})


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_what_torch_would_recompute_besides_is_left(fp64: None, setting: dict[str, Any]) -> None:
    model, x = Couplings(), leaf(ROWS, 8)
    wanted = [x, *model.parameters()]
    with functorch_config.patch(setting), reports() as found:
        got = torch.autograd.grad(loss_of(torch.compile(model, backend="revfx", options=EAGER)(x)), wanted)
    assert found[0].regions
    assert relative_error(got, torch.autograd.grad(loss_of(model(x)), wanted)) < TOLERANCE


def test_reports_has_one_entry_for_each_graph_compiled_inside_it() -> None:
    model, x = Couplings(), leaf(ROWS, 8)
    compiled = torch.compile(model, backend="revfx", options=EAGER)
    with reports() as outer:
        compiled(x)
        with reports() as inner, torch.no_grad():
            compiled(x)  # a graph of its own, but nothing is kept in it anyway
        torch.compile(irreversible(), backend="revfx", options=EAGER)(x)
    compiled(leaf(ROWS + 1, 8))
    assert inner == []
    assert [len(report.regions) for report in outer] == [1, 0]
    region = outer[0].regions[0]
    assert all(place.rpartition(":")[0] == __file__ for place in region.where)
    # cat is a step, too; the two halves of the input are kept
    assert (region.steps, region.inverted, region.kept_cuts) == (2 * DEPTH + 1, 2 * DEPTH, 2)
    assert outer[1].refusals


def test_each_graph_is_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    x = leaf(ROWS, 8)
    with caplog.at_level(logging.INFO, logger="revfx"):
        torch.compile(Couplings(), backend="revfx", options=EAGER)(x)
        torch.compile(irreversible(), backend="revfx", options=EAGER)(x)
    first, second = (r.getMessage() for r in caplog.records if r.name == "revfx")
    sizes = r"2 cuts kept \([\d,]+ bytes\), [\d,]+ bytes regenerated"
    assert re.fullmatch(
        rf"a compiled graph: reversible: .*{__name__}.py:\d+ .. .*: 9 steps, 8 inverted, {sizes}.*", first
    )
    assert "reversible: nothing | left as it was: " in second
    assert "`relu` maps all negative numbers to 0" in second


def test_the_log_is_silent_unless_it_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    torch.compile(Couplings(), backend="revfx", options=EAGER, dynamic=True)(leaf(ROWS, 8))
    assert [r for r in caplog.records if r.levelno >= logging.INFO] == []

"""Models under plans that are learnt in the first call: their training is plain training, to the last bit."""

from __future__ import annotations

import copy
import cProfile
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import ZOO

from revfx.engine import native
from revfx.plan.model import PlannedModel


STEPS = 4  # the first one learns, the second one proves the plan
ROWS = 16


def _loss(out: Any) -> Tensor:
    return torch.stack([t.square().mean() for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]).sum()


def _trained(model: nn.Module, call: Any, inputs: list[Tensor], steps: int = STEPS) -> list[Tensor]:
    """Train for some steps; return losses, gradients, buffers and the random state of each."""
    torch.manual_seed(1)
    seen: list[Tensor] = []
    for _ in range(steps):
        model.zero_grad()
        given = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
        loss = _loss(call(*given))
        loss.backward()
        seen += [loss.detach(), *(t.grad for t in given if t.grad is not None), torch.get_rng_state()]
        seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        seen += [b.clone() for b in model.buffers()]
    return seen


def _calls(planned: PlannedModel, model: nn.Module) -> Any:
    return lambda *args: planned.call(model, model.forward, args, {})


@pytest.mark.parametrize("watcher", ["native", "python"])
@pytest.mark.parametrize("name", ZOO)
def test_training_is_plain_training(name: str, watcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.CHOICE, watcher)
    torch.manual_seed(0)
    plain = ZOO[name][0](4)
    model, inputs, planned = copy.deepcopy(plain), list(ZOO[name][1](ROWS)), PlannedModel()
    got, want = _trained(model, _calls(planned, model), inputs), _trained(plain, plain, inputs)
    assert len(got) == len(want)
    assert all(map(torch.equal, got, want))
    (kind,) = planned.kinds.values()
    assert kind.found.regions and kind.matched == kind.units > 0


class Varying(nn.Module):
    """Couplings of which each call leaves out some, with a factor that Python counts up."""

    def __init__(self, depth: int = 6) -> None:
        super().__init__()
        self.f = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(depth))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        a, b = x.chunk(2, -1)
        for k, f in enumerate(self.f):
            if (k + self.calls) % 4:
                a, b = b, a + f(b) * (1 + 0.1 * self.calls)
        return torch.cat([a, b], -1)


def test_python_runs_once_whatever_it_does() -> None:
    torch.manual_seed(0)
    plain = Varying()
    model, planned = copy.deepcopy(plain), PlannedModel()
    inputs = [torch.randn(ROWS, 16)]
    got, want = _trained(model, _calls(planned, model), inputs, 9), _trained(plain, plain, inputs, 9)
    assert all(map(torch.equal, got, want))
    assert model.calls == plain.calls == 9
    (kind,) = planned.kinds.values()
    assert kind.matched >= 3, "a coupling that is left out costs that coupling alone"


class Shapes(nn.Module):
    """Couplings of batches of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.Linear(16, 8)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f in self.f:
            a, b = b, a + f(b)
        return torch.cat([a, b], -1)


def test_one_plan_serves_batches_of_any_size() -> None:
    torch.manual_seed(0)
    plain = Shapes()
    model, planned = copy.deepcopy(plain), PlannedModel()
    for rows in (5, 7, 16, 3):
        inputs = [torch.randn(rows, 16)]
        got, want = _trained(model, _calls(planned, model), inputs, 1), _trained(plain, plain, inputs, 1)
        assert all(map(torch.equal, got, want))
    (kind,) = planned.kinds.values()
    assert kind.matched >= kind.units - 1 > 0, "all but the last one, whose inverse stands for a shape"


def test_a_model_without_couplings_runs_plainly_after_it_was_learnt() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model, planned = copy.deepcopy(plain), PlannedModel()
    inputs = [torch.randn(ROWS, 8)]
    got, want = _trained(model, _calls(planned, model), inputs), _trained(plain, plain, inputs)
    assert all(map(torch.equal, got, want))
    (kind,) = planned.kinds.values()
    assert not kind.units and kind.found.refusals


def test_a_written_weight_raises_as_without_a_plan() -> None:
    torch.manual_seed(0)
    model, planned = Shapes(), PlannedModel()
    call, x, weight = _calls(planned, model), torch.randn(ROWS, 16), model.get_parameter("f.2.2.weight")
    for _ in range(3):
        loss = call(x).square().mean()
        with torch.no_grad():
            weight.mul_(1.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


class Drawing(nn.Module):
    """Couplings under autocast with a layer that is not registered, and a generator of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.g = [nn.Linear(16, 16)], nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(3):
                a = a + self.hidden[0](b) * torch.rand(16, generator=self.generator)
                b = b + self.g(a)
        return a, b


@pytest.mark.parametrize("watcher", ["native", "python"])
def test_an_exit_that_a_replay_takes_too_may_be_gone(watcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.CHOICE, watcher)
    plain, model, planned, inputs = Drawing(), Drawing(), PlannedModel(), [torch.randn(ROWS, 16) for _ in "ab"]
    got, want = _trained(model, _calls(planned, model), inputs), _trained(plain, plain, inputs)
    assert all(map(torch.equal, got, want))
    (kind,) = planned.kinds.values()
    assert kind.matched == kind.units > 0


def test_a_backward_that_raises_leaves_no_tensors() -> None:
    def fail(_: Tensor) -> None:
        raise KeyError("mine")

    def step() -> None:
        given = [torch.randn(8, 16, requires_grad=True) for _ in "ab"]
        with pytest.raises(KeyError, match="mine"):
            _loss(planned.call(model, model.forward, (*given,), {})).backward()

    model, planned = Drawing(), PlannedModel()
    for _ in range(3):
        _trained(model, _calls(planned, model), [torch.randn(8, 16) for _ in "ab"], 1)
    next(model.g.parameters()).register_hook(fail)
    counts: list[int] = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(4):
            step()
            counts.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
    finally:
        gc.enable()
    assert counts[-1] <= counts[0]


def test_learning_leaves_a_profiler_on() -> None:
    plain, model, planned, inputs = Drawing(), Drawing(), PlannedModel(), [torch.randn(ROWS, 16) for _ in "ab"]
    want = _trained(plain, plain, inputs)
    profiler = cProfile.Profile()
    profiler.enable()
    try:
        got = _trained(model, _calls(planned, model), inputs)
        sum([1, 2])
    finally:
        profiler.disable()
    assert all(map(torch.equal, got, want))
    called = [str(entry.code) for entry in profiler.getstats()]
    assert any("run_backward" in name for name in called)  # of steps after the one that learns
    assert any("built-in method builtins.sum" in name for name in called)

"""`convert(compile=True)`: the functions of regions are compiled, alike ones once, and training stays lossless."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compiled import fresh as fresh
from helpers import deep_but
from torch import Tensor, nn
from torch._dynamo import graph_break
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from zoo import ZOO

import revfx
from revfx.converted import conversion_of
from revfx.testing import store_activations


D = 16
pytestmark = pytest.mark.usefixtures("fresh")


# Inductor compiles them for a quarter of a minute each.
by_kernels = pytest.mark.parametrize("kernels", deep_but(["eager"], ["eager", "inductor"]))


def choose(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let functions be compiled to calls of eager kernels, or by inductor."""
    if kernels == "eager":
        monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", aot_eager)


class Breaks(nn.Module):
    """A function in which the compiler ends a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        graph_break()
        return self.b(h)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))


def dropping() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.Dropout(0.3), nn.ReLU(), nn.Linear(D, D))


class Net(nn.Module):
    def __init__(self, make: Callable[[], nn.Module], depth: int = 4) -> None:
        super().__init__()
        self.f, self.g = (nn.ModuleList(make() for _ in range(depth)) for _ in "fg")

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            b = b + g(a)
        return torch.cat([a, b], -1)


def steps(model: Any, rows: tuple[int, ...] = (64, 64, 64), autocast: bool = False) -> list[Tensor]:
    found: list[Tensor] = []
    torch.manual_seed(1)
    for n in rows:
        x = torch.randn(n, 2 * D, generator=torch.Generator().manual_seed(n), requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(x).float().sin().mean()
        found += [loss.detach(), *torch.autograd.grad(loss, [x, *model.parameters()])]
    return [*found, torch.rand(2)]


@pytest.fixture(autouse=True)
def counted() -> Iterator[None]:
    counters.clear()
    yield
    counters.clear()


EACH = [(make, autocast) for make in (plain, dropping, Breaks) for autocast in (False, True)]


@pytest.mark.parametrize(("make", "autocast"), deep_but([(dropping, True), (Breaks, False)], EACH))
def test_gradients_are_those_of_the_same_compiled_functions_bit_for_bit(make: Any, autocast: bool) -> None:
    converted: Any = revfx.convert(Net(make), compile=True)
    ours = steps(converted, autocast=autocast)
    with store_activations():
        stored = steps(converted, autocast=autocast)
    assert all(torch.equal(a, b) for a, b in zip(ours, stored, strict=True))
    (found,) = conversion_of(converted).couplings
    assert found.regions and conversion_of(converted).coded_bytes and not converted.revfx.refusals
    graphs = 3 if make is Breaks else 2  # eight functions, alike; but the first reads a view, of other strides
    assert counters["stats"]["unique_graphs"] == graphs


@by_kernels
def test_functions_that_save_their_arguments(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(kernels, monkeypatch)
    make, inputs = ZOO["transformer"]
    converted: Any = revfx.convert(make(2), compile=True)

    def step() -> list[Tensor]:
        torch.manual_seed(1)
        return [*torch.autograd.grad(converted(*inputs(8)).sin().sum(), [*converted.parameters()])]

    ours = [step() for _ in range(3)]
    with store_activations():
        stored = step()
    assert all(torch.equal(a, b) for found in ours for a, b in zip(found, stored, strict=True))
    assert conversion_of(converted).couplings


def test_the_backward_runs_in_the_modes_of_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    choose("eager", monkeypatch)
    converted: Any = revfx.convert(Net(dropping), compile=True)
    steps(converted)
    x, found = torch.randn(64, 2 * D, requires_grad=True), list[Tensor]()
    for switches in (False, True):
        torch.manual_seed(2)
        loss = converted.train()(x).square().mean()
        converted.train(not switches)
        found += torch.autograd.grad(loss, x)
    assert torch.equal(*found)


def test_they_are_near_to_the_plain_ones() -> None:
    model = Net(plain)
    for a, b in zip(steps(revfx.convert(copy.deepcopy(model), compile=True)), steps(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@by_kernels
def test_sizes_that_change_between_a_forward_and_its_backward(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(kernels, monkeypatch)
    converted: Any = revfx.convert(Net(plain), compile=True)
    sizes = (64, 48, 32, 64)
    ours = steps(converted, sizes)
    x = torch.randn(64, 2 * D, requires_grad=True)
    losses = [converted(x[:n]).square().mean() for n in (64, 40, 24)]
    late = [torch.autograd.grad(loss, [*converted.parameters()]) for loss in losses]
    with store_activations():
        assert all(torch.equal(a, b) for a, b in zip(ours, steps(converted, sizes), strict=True))
        losses = [converted(x[:n]).square().mean() for n in (64, 40, 24)]
        plain_ones = [torch.autograd.grad(loss, [*converted.parameters()]) for loss in losses]
    for got, want in zip(late, plain_ones, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_the_compiler_can_not_take_runs_as_it_is_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no compiler on this machine")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", failing)
    model = Net(plain)
    converted: Any = revfx.convert(copy.deepcopy(model), compile=True)
    assert all(torch.equal(a, b) for a, b in zip(steps(converted), steps(model), strict=True))
    reasons = [str(r) for r in converted.revfx.refusals]
    assert len(reasons) == 8 and all("is not compiled" in r and "test_functions.py:" in r for r in reasons)
    assert [str(r) for r in revfx.explain(converted, torch.randn(64, 2 * D)).refusals] == reasons


def test_the_model_stays_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    choose("eager", monkeypatch)
    model = Net(plain)
    converted: Any = revfx.convert(model, compile=True)
    steps(converted)
    assert list(converted.state_dict()) == list(model.state_dict())
    for twin in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert all(torch.equal(a, b) for a, b in zip(steps(twin), steps(converted), strict=True))
        assert conversion_of(twin).options.compile

"""A step on fake tensors takes what the same step takes on real ones."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
from bench.models import MODELS
from helpers import deep_but
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import ZOO

import revfx
from revfx.report.explain import total
from revfx.report.simulate import scratch, simulate_step
from revfx.testing import measure_memory
from revfx.world.fake import FakeWorld


CHAINS = ("mlp", "revnet", "transformer", "flow", "leapfrog")


def square(output: Tensor) -> Tensor:
    return output.square().mean()


@pytest.mark.parametrize("depth", deep_but((16,), (4, 16)))
@pytest.mark.parametrize("name", deep_but(("revnet", "transformer"), CHAINS))
def test_the_predicted_peak_is_within_a_tenth_of_the_measured_one(name: str, depth: int) -> None:
    bench = MODELS[name]
    task = bench.make(depth, bench.batch // 8)
    model, inputs = task.model, task.args
    found = revfx.explain(model, inputs, loss=task.loss)
    ways = {"plain": model, "revfx": revfx.convert(model)}
    for way, call in ways.items():
        seen, usage = measure_memory(lambda call=call: task.loss(call(*inputs))), found.way(way)
        assert usage is not None and usage.peak is not None and usage.kept is not None
        assert abs(usage.peak / seen.peak - 1) < 0.1, (way, usage.peak, seen.peak)
        assert abs(usage.kept / seen.kept - 1) < 0.1, (way, usage.kept, seen.kept)
    assert [r.kept_cuts for r in found.regions] == [2]


@pytest.mark.parametrize("name", deep_but([*ZOO][1::4], ZOO))
def test_the_zoo_is_predicted_as_well(name: str) -> None:
    make, inputs = ZOO[name]
    model, x = make(6), inputs(64)
    found = revfx.explain(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = revfx.convert(model)
        seen = measure_memory(lambda: total(converted(*x)))
    usage = found.way("revfx")
    assert usage is not None and usage.peak is not None and found.regions
    assert abs(usage.peak / seen.peak - 1) < 0.1, (usage.peak, seen.peak)


def test_a_model_is_as_it_was_afterwards() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.Flatten(), nn.Linear(8 * 36, 4))
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    tensors = [(id(t), t.clone()) for t in (*model.parameters(), *model.buffers())]
    state, python = torch.get_rng_state(), random.getstate()
    simulate_step(FakeWorld(model, (x,), {}), model.forward, square)
    now = [*model.parameters(), *model.buffers()]
    assert [id(t) for t in now] == [i for i, _ in tensors]
    assert all(torch.equal(t, before) for t, (_, before) in zip(now, tensors, strict=True))
    assert all(p.grad is None for p in model.parameters()) and x.grad is None
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python


def test_a_model_is_as_it_was_after_an_error() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = x
            raise ValueError("no")

    model = Fails()
    weight = model.weight
    with pytest.raises(ValueError, match="no"):
        simulate_step(FakeWorld(model, (torch.ones(3),), {}), model.forward, square)
    assert model.weight is weight and not hasattr(model, "seen")


def test_a_step_that_would_not_fit_is_counted() -> None:
    model = nn.Linear(1 << 12, 1 << 12, bias=False)
    x = torch.empty(1, 1 << 12).expand(1 << 24, 1 << 12)  # its result would take 256 GiB
    found = simulate_step(FakeWorld(model, (x,), {}), model.forward, square)
    assert found.kept is not None and found.kept > 1 << 38


def test_flops_are_those_of_matrix_products_in_both_directions() -> None:
    model = nn.Linear(8, 16, bias=False)
    x = torch.randn(4, 8, requires_grad=True)
    found = simulate_step(FakeWorld(model, (x,), {}), model.forward, square)
    assert found.flops == 3 * 2 * 4 * 8 * 16


def test_what_convolutions_allocate_within_themselves() -> None:
    aten = torch.ops.aten
    x, y = torch.empty(2, 12, 8, 8), torch.empty(2, 16, 8, 8)
    assert scratch(aten.convolution.default, (x,), y) == 4 * y.numel()
    assert scratch(aten.convolution_backward.default, (y, x), ()) == 4 * (y.numel() + x.numel() // 12 * 16)
    assert scratch(aten.add.Tensor, (x, x), x) == 0
    assert scratch(aten.convolution.default, (torch.empty(2, 3, 8, 8),), torch.empty(2, 3, 8, 8)) == 0


def test_the_loss_may_be_a_users_own() -> None:
    model = nn.Linear(8, 4)
    labels = torch.zeros(16, dtype=torch.long)
    found = revfx.explain(model, torch.randn(16, 8), loss=lambda out: F.cross_entropy(out, labels))
    assert found.way("plain") is not None

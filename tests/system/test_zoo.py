"""Every reversible program is found, its gradients are plain autograd's, and its memory does not grow with depth."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same_as_stored, deep_but, regions_of
from torch import Tensor, nn
from zoo import ZOO, Momentum, Pairs

import revfx
from revfx.testing import Memory, assert_same_grads, measure_memory


def _inputs(name: str, n: int) -> list[Tensor]:
    return [t.requires_grad_() if t.is_floating_point() else t for t in ZOO[name][1](n)]


def _mean_square(model: nn.Module, inputs: list[Tensor]) -> Callable[[], Tensor]:
    def step() -> Tensor:
        out = model(*inputs)
        return torch.stack([t.square().mean() for t in (out if isinstance(out, tuple) else (out,))]).sum()

    return step


@pytest.mark.parametrize("name", ZOO)
def test_gradients_are_those_of_plain_autograd(name: str, fp64: None) -> None:
    model, inputs = ZOO[name][0](4), _inputs(name, 8)
    converted: Any = revfx.convert(model)
    assert_same_grads(converted, model, inputs)
    assert_same_as_stored(converted, inputs)
    assert regions_of(converted)


@pytest.mark.parametrize("streams", ["float32", "bfloat16", "bfloat16 autocast", "float16 autocast"])
@pytest.mark.parametrize("name", ZOO)
def test_all_is_as_in_plain_training_to_the_last_bit(name: str, streams: str) -> None:
    torch.manual_seed(0)
    dtype, _, casting = streams.partition(" ")
    narrow = getattr(torch, dtype)
    model = ZOO[name][0](4).to(torch.float32 if casting else narrow)
    inputs = [t.to(torch.float32 if casting else narrow) if t.is_floating_point() else t for t in ZOO[name][1](8)]
    found: list[list[Tensor]] = []
    for run in (copy.deepcopy(model), revfx.convert(copy.deepcopy(model))):
        torch.manual_seed(1)
        seen: list[Tensor] = []
        for _ in range(2):
            given = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
            with torch.autocast("cpu", narrow, enabled=bool(casting)):
                loss = _mean_square(run, given)().float()
            loss.backward()
            seen += [loss.detach(), *(t.grad for t in given if t.grad is not None)]
        gradients = [p.grad for p in run.parameters() if p.grad is not None]
        found.append([*seen, *gradients, *run.buffers(), torch.get_rng_state()])
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", deep_but([*ZOO][::2], ZOO))
def test_peak_memory_does_not_grow_with_depth(name: str) -> None:
    peak: dict[tuple[str, int], int] = {}
    inputs = _inputs(name, 1024)
    for depth in (4, 12):
        model = ZOO[name][0](depth)
        for way, m in (("plain", model), ("revfx", revfx.convert(model, exact=False))):
            peak[way, depth] = measure_memory(_mean_square(m, inputs)).peak
    assert peak["revfx", 12] - peak["revfx", 4] < 0.03 * (peak["plain", 12] - peak["plain", 4])


def narrow(d: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(d, d), nn.Tanh(), nn.Linear(d, d)]
    return nn.Sequential(*layers)


class Wide(Pairs):
    """Couplings whose f and g are Linear-Tanh-Linear without a wider middle."""

    def __init__(self, depth: int, d: int = 64) -> None:
        super().__init__(0)
        for fs in (self.f, self.g):
            fs.extend(narrow(d) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            b = b + g(a)
        return torch.cat([a, b], -1)


def test_bytes_kept_and_peak_in_units_of_one_activation() -> None:
    x = torch.randn(2048, 128)
    unit = x.numel() * x.element_size()
    seen: dict[str, list[Memory]] = {"convert": [], "rev_block": []}
    for depth in (4, 16):
        model = Wide(depth)
        converted = revfx.convert(model, exact=False)

        def block(model: Wide = model, depth: int = depth) -> Tensor:
            a, b = x.chunk(2, -1)
            a, b = revfx.rev_block(a, b, model.f, model.g, depth, exact=False)
            return a.square().mean() + b.square().mean()

        seen["convert"].append(measure_memory(_mean_square(converted, [x])))
        seen["rev_block"].append(measure_memory(block))
    for shallow, deep in seen.values():
        assert deep.kept / unit <= 1.05 and deep.peak / unit <= 6.5
        assert deep.peak - shallow.peak < 0.02 * unit and deep.kept - shallow.kept < 0.02 * unit


def test_growth_of_codes_in_bytes_per_element_of_a_stream() -> None:
    """A coupling and stream element take at most .6 bytes; momentum, which has two values, 1."""
    cases: list[tuple[Any, int, float]] = [(Wide, 128, 0.6), (Momentum, 32, 1.0)]
    for make, width, most in cases:
        x = torch.randn(4096, width)
        kept = [measure_memory(_mean_square(revfx.convert(make(depth)), [x])).kept for depth in (4, 12)]
        assert 0.1 < (kept[1] - kept[0]) / 8 / x.numel() < most


def test_planning_runs_nothing_on_real_data(fp64: None) -> None:
    plain = ZOO["conv+BN"][0](4)
    model = copy.deepcopy(plain)
    inputs = ZOO["conv+BN"][1](3)
    states: list[Tensor] = []
    for call in (plain, revfx.convert(model)):
        torch.manual_seed(0)
        call(*inputs)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    for got, want in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(got, want), "running statistics of one batch"

"""Where rounding errors grow, in ways that no arc declares, the backward notices."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from helpers import lines, loss_of, relative_error
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from zoo import Additive, AffineExp, D, mlp

import revfx
from revfx.eager.cancellation import loses
from revfx.eager.regeneration import Regeneration
from revfx.errors import RevfxWarning
from revfx.inspection import watched
from revfx.passes.program import Arc
from revfx.testing import assert_same_grads, measure_memory


@pytest.mark.parametrize("way", ["convert", "rev_block"])
def test_streams_that_grow_raise_before_their_gradients_are_garbage(way: str) -> None:
    def make() -> nn.Module:
        layers: list[nn.Module] = [nn.Linear(D, 2 * D), nn.SiLU(), nn.Linear(2 * D, D)]
        return nn.Sequential(*layers)

    model = Additive(8)
    for fs in (model.f, model.g):
        for i in range(len(fs)):
            fs[i] = make()
    with torch.no_grad():
        for p in model.parameters():
            p *= 3
    x = torch.randn(6, 2 * D, requires_grad=True)
    if way == "convert":
        out = revfx.convert(model)(x)
    else:
        a, b = x.chunk(2, -1)
        out = torch.cat(revfx.rev_block(a, b, model.f, model.g, 8), -1)
    with pytest.raises(revfx.RevfxError, match=r"is off by .* amplify rounding errors"):
        out.sin().sum().backward()


def test_small_drift_is_warned_of_once(fp64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("revfx.eager.numerics.DRIFT", 1e-9)
    converted = revfx.convert(Additive(8))
    x = torch.randn(6, 2 * D, requires_grad=True)
    with pytest.warns(RevfxWarning, match=r"is off by .* \(relative\)"):
        converted(x).sin().sum().backward()
    converted(x).sin().sum().backward()


def last_layers(*functions: Iterable[nn.Module]) -> list[Tensor]:
    return [p for fs in functions for f in fs for p in [*f.parameters()][-2:]]


class Started(AffineExp):
    """A flow whose functions end in layers that start as zeros."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        for p in last_layers(self.f, self.g):
            nn.init.zeros_(p)


def test_functions_that_start_as_zeros_keep_nothing(fp64: None) -> None:
    """Sums of exact zeros, such as the log-determinant, are what they were."""
    x = torch.randn(64, 2 * D)
    x[::3] = 0  # of the data too
    peaks: list[int] = []
    for depth in (4, 12):
        model = Started(depth)
        converted: Any = revfx.convert(copy.deepcopy(model))
        assert_same_grads(converted, model, [x.clone().requires_grad_()])
        assert converted.revfx.kept_cuts == 2
        weights = sum(p.nbytes for p in model.parameters())
        peaks.append(measure_memory(lambda call=converted: loss_of(call(x))).peak - weights)
    assert peaks[1] < peaks[0] + x.nbytes


def test_layers_of_which_some_start_as_zeros_are_right(fp64: None) -> None:
    model = Started(6)
    for p in last_layers(list(model.f)[::2], list(model.g)[1::3]):
        nn.init.normal_(p)
    x = torch.randn(64, 2 * D)
    x[::3] = 0
    assert_same_grads(revfx.convert(copy.deepcopy(model)), model, [x.requires_grad_()])


# --- sums in which an operand disappears
def undone(x: Tensor, h: Tensor) -> bool:
    """Whether `x` is lost when `x + h` is undone."""
    y = x + h
    return loses(Arc(0, (2, 1), torch.sub, exact=False), x, [y, h], None)


def with_one(t: Tensor, value: float) -> Tensor:
    """`t` with one element replaced, at a place that no sample sees."""
    t = t.clone()
    t.view(-1)[-1] = value
    return t


LOST = {
    torch.float64: (1e9, 1e300, torch.inf, torch.nan),
    torch.float32: (2e4, 1e9, 3e38, torch.inf),
    torch.bfloat16: (256.0, 1e9),
}


@pytest.mark.parametrize(("dtype", "value"), [(d, v) for d, values in LOST.items() for v in values])
def test_a_single_element_that_a_huge_one_is_added_to_is_lost(dtype: torch.dtype, value: float) -> None:
    x, h = torch.randn(2, 30, 401).to(dtype)
    x = with_one(x, 1.3)
    assert not undone(x, h)
    assert undone(x, with_one(h, value)) and undone(x, with_one(h, -value))
    x.view(-1)[3:9] = value  # others that are as large already hide nothing
    assert undone(x, with_one(h, value))


@pytest.mark.parametrize("dtype", list(LOST))
def test_what_comes_back_as_it_was_is_not_lost(dtype: torch.dtype) -> None:
    x, h = torch.randn(2, 30, 401).to(dtype)
    for value in (1e9, -torch.inf, torch.nan):
        assert not undone(with_one(x, value), h), "it was as large before"
    assert not undone(torch.zeros_like(x), h) and not undone(x * 0, with_one(h, 1e9))
    assert undone(x * 1e-12, h)
    assert not undone(torch.cat([x, 0 * x[:20]]), torch.cat([h, 5 * h[:20]])), "padded rows"
    assert not undone(torch.where(x > 1.5, x, x * 1e-6), torch.where(x > 1.5, h, h * 1e-6))
    assert not undone(x.t()[::2], h.t()[::2]) and not undone(x[:0], h[:0]) and not undone(x[0, 0] + 3, h[0, 0])


def test_only_sums_are_looked_at() -> None:
    class Products(Additive):
        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            for f, g in zip(self.f, self.g, strict=True):
                a = -(a * torch.exp(torch.tanh(f(b))))
                b = b * 2 + g(a)
            return torch.cat([a, b], -1)

    seen: list[str] = []

    class Look:
        def made(self, run: Regeneration, value: int, tensor: Tensor) -> None:
            seen[:] = [a.text for s in run.plan.steps for arcs in s.sums.after.values() for a in arcs if a.sums]

        def regenerated(self, run: Regeneration, derivation: Any, value: int, tensor: Tensor) -> None: ...

    with watched(lambda run: Look()):
        revfx.convert(Products(4))(torch.randn(6, 2 * D, requires_grad=True))
    assert seen and all("(add)" in text for text in seen)


class Rectified(nn.Sequential):
    """Tells zero from what is near it, and gives zeros."""

    def __init__(self) -> None:
        super().__init__(nn.ReLU(), nn.Linear(D, D), nn.ReLU())


@pytest.mark.parametrize("kind", [mlp, Rectified])
def test_streams_that_wrap_several_tensors_are_looked_at_in_each(kind: Callable[[], nn.Module]) -> None:
    functions = nn.ModuleList(kind() for _ in range(8))
    x = torch.randn(4, D, dtype=torch.float64)

    def gradients(block: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        streams = [TwoTensor(t, 2 * t.relu()).requires_grad_() for t in (x, x.flip(0))]
        functions.double().zero_grad()
        torch.stack([y.sin().sum() for y in block(*streams)]).sum().backward()
        grads: list[Any] = [t.grad for t in (*streams, *functions.parameters())]
        return [part for g in grads for part in ((g.a, g.b) if isinstance(g, TwoTensor) else (g,))]

    got = gradients(lambda a, b: revfx.rev_block(a, b, functions[:4], functions[4:], 4))
    assert relative_error(got, gradients(lines(functions[:4], functions[4:]))) < 1e-9

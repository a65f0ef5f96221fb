"""Couplings by indices and masks, and layers that a first call sets up."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import kept_cuts
from torch import Tensor, nn
from training import assert_same_steps, twins
from zoo import D, mlp

import revfx
from revfx.errors import RevfxWarning
from revfx.testing import assert_same_grads, measure_memory


pytestmark = pytest.mark.usefixtures("fp64")
DEPTH, ROWS = 6, 64


def x_() -> Tensor:
    return torch.randn(ROWS, 2 * D, requires_grad=True)


class Layers(nn.Module):
    """A chain of layers."""

    def __init__(self, make: Callable[[int], nn.Module], depth: int = DEPTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make(k) for k in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def saved(make: Callable[[int], nn.Module]) -> float:
    """What of plain's activations a converted chain keeps as it grows; its gradients are the same, bit for bit."""
    kept: list[list[int]] = []
    for depth in (DEPTH, 2 * DEPTH):
        model = Layers(make, depth)
        converted, x = revfx.convert(model), x_()
        for _ in range(2):
            assert_same_grads(converted, model, [x])
        kept.append([measure_memory(lambda m=m, x=x: m(x).sum()).kept for m in (converted, model)])
    (ours, plain), (ours_deep, plain_deep) = kept
    return (ours_deep - ours) / (plain_deep - plain)


# --- indices: which part of a coupling goes where
class ByIndex(nn.Module):
    """Half of the features, as an index says which, are added to what the other half gives; put together in place."""

    def __init__(self, k: int, kind: str) -> None:
        super().__init__()
        self.f = mlp()
        order = torch.randperm(2 * D, generator=torch.Generator().manual_seed(k))
        halves = order[:D], order[D:]
        self.kind = kind
        self.mask: Tensor
        self.register_buffer("mask", torch.zeros(2 * D, dtype=torch.bool).index_fill(0, halves[0], value=True))
        self.lists = [h.tolist() for h in halves]
        self.rows: Tensor
        self.register_buffer("rows", torch.stack(halves))
        self.a: Tensor
        self.b: Tensor
        for name, half in zip("ab", halves, strict=True):
            self.register_buffer(name, half)

    def halves(self) -> tuple[Any, Any]:
        if self.kind == "mask":
            return self.mask.nonzero().squeeze(-1), (~self.mask).nonzero().squeeze(-1)
        if self.kind == "booleans":
            return self.mask, ~self.mask
        if self.kind == "rows":
            first, second = self.rows
            return first, second
        return (self.lists[0], self.lists[1]) if self.kind == "list" else (self.a, self.b)

    def empty(self, x: Tensor) -> Tensor:
        return x.new_empty(x.shape) if self.kind == "mask" else torch.empty_like(x)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.halves()
        a, b = x[..., first], x[:, second]
        if self.kind == "copied":
            y = x.clone()
            y[..., second] = b + self.f(a)
            return y
        y = self.empty(x)
        y[..., second] = b + self.f(a)
        y[:, first] = a
        return y


@pytest.mark.parametrize("kind", ["buffer", "mask", "booleans", "list", "rows", "copied"])
def test_parts_that_an_index_takes_and_puts_back_are_a_coupling(kind: str) -> None:
    assert saved(lambda k: ByIndex(k, kind)) < 0.15


class PartByPart(ByIndex):
    """Every feature is written by itself."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        for k in range(2 * D):
            y[:, k] = x[:, k] + 1
        return super().forward(y)


def test_a_tensor_that_is_written_part_by_part_is_not_copied_each_time() -> None:
    model, x = Layers(lambda k: PartByPart(k, "buffer"), 1), torch.randn(256, 2 * D, requires_grad=True)
    converted: Any = revfx.convert(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RevfxWarning)
        assert_same_steps(converted, model, [x])
    ours, plain = (measure_memory(lambda m=m: m(x).sum()) for m in (converted, model))
    ends = 2 * x.nbytes  # of the one coupling, which plain does not save
    assert ours.kept <= plain.kept + ends and ours.peak <= plain.peak + 4 * ends


class OnZeros(ByIndex):
    def empty(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Overlapping(OnZeros):
    def halves(self) -> tuple[Any, Any]:
        return torch.cat([self.a[:-1], self.b[:1]]), self.b


class Repeated(OnZeros):
    def halves(self) -> tuple[Any, Any]:
        return torch.cat([self.a[:-1], self.a[:1]]), self.b


@pytest.mark.parametrize("kind", [Overlapping, Repeated])
def test_parts_that_leave_something_out_are_not_inverted(kind: Callable[..., nn.Module]) -> None:
    model = Layers(lambda k: kind(k, "buffer"))
    converted: Any = revfx.convert(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RevfxWarning)
        assert_same_steps(converted, model, [x_()])
    assert not converted.revfx.regions


def test_an_index_that_changes_is_seen() -> None:
    model = Layers(lambda k: OnZeros(k, "buffer"))
    converted: Any = revfx.convert(model)
    assert_same_steps(converted, model, [x_()])
    for layer in converted.layers:
        both = torch.cat([layer.a, layer.b]).roll(1)
        layer.a.copy_(both[:D])
        layer.b.copy_(both[D:])
    assert_same_steps(converted, model, [x_()], steps=5)
    assert kept_cuts(converted) == 2
    for layer in converted.layers:
        layer.b.copy_(layer.a)  # no permutation any more
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RevfxWarning)
        assert_same_steps(converted, model, [x_()])


# --- flags: layers that a first call sets up
class SetsItself(nn.Module):
    """A scale that the first batch chooses, before an additive coupling; `how` it is set and what says that it is."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.f, self.how, self.ready = mlp(), how, False
        self.scale = nn.Parameter(torch.ones(2 * D))
        self.done: Tensor
        self.register_buffer("done", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        if not (self.ready if self.how == "attribute" else self.done > 0):
            self.set_up(1 / x.detach().std(0))
        x = x * self.scale
        a, b = x.chunk(2, -1)
        return torch.cat([b, a + self.f(b)], -1)

    def set_up(self, scale: Tensor) -> None:
        if self.how == "in place":
            with torch.no_grad():
                self.scale.copy_(scale)
                self.done.fill_(1)
            return
        self.scale.data = scale
        if self.how == "attribute":
            self.ready = True
        else:
            self.done = torch.tensor(1.0)


@pytest.mark.parametrize("how", ["attribute", "buffer", "in place"])
def test_a_layer_that_its_first_call_sets_up_is_reversed_from_then_on(how: str) -> None:
    converted, plain = twins(Layers(lambda k: SetsItself(how)))
    assert_same_steps(converted, plain, [x_()], steps=5)
    assert converted.revfx.plans[-1].regions and kept_cuts(converted) == 2


class SkipsLayers(SetsItself):
    """Layer drop, as libraries of transformers write it."""

    def forward(self, x: Tensor) -> Tensor:
        return x if torch.rand([]) < 0.5 else super().forward(x)


class Counts(SetsItself):
    """A position that is read, and moved on in every call."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.position: Tensor
        self.register_buffer("position", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        x = x + (self.position + torch.arange(2 * D))
        self.position += 1
        a, b = x.chunk(2, -1)
        return torch.cat([b, a + self.f(b)], -1)


@pytest.mark.parametrize("kind", [SkipsLayers, Counts])
def test_draws_and_positions_that_go_on_are_no_constants(kind: Callable[[str], nn.Module]) -> None:
    converted, plain = twins(Layers(lambda k: kind("attribute")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RevfxWarning)
        assert_same_steps(converted, plain, [x_()], steps=8)


class AsksParameter(SetsItself):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.scale.sum() > 0 else -x)


def test_numbers_that_training_changes_are_no_constants() -> None:
    model, x = Layers(lambda k: AsksParameter("attribute")), x_()
    model(x)  # sets it up
    assert "no prediction" in str(revfx.explain(model, x))
    converted, plain = twins(model)
    for step in range(8):
        assert_same_steps(converted, plain, [x], steps=(step,))
        for m in (converted, plain):
            with torch.no_grad():
                m.layers[step % DEPTH].scale.mul_(-1)
    assert converted.revfx.regions

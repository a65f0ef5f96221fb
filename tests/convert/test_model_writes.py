"""Writes to tensors, in the forward of a converted model or between its forward and its backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from steps import IN_PLACE, STEPS, assert_steps_like_plain, raised
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from zoo import Additive, D, Pairs, mlp

import revfx
from revfx.testing import assert_same_grads


DEPTH = 4


class AliasReadLater(Pairs):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            h = f(b)
            alias = h.view(-1, D)
            h += 1
            a, b = a + alias, b + g(alias)
        return torch.cat([a, b], -1)


def test_write_with_an_alias_that_is_read_later(fp64: None) -> None:
    assert_steps_like_plain(lambda: AliasReadLater(DEPTH), [torch.randn(6, 2 * D, requires_grad=True)])


class WritesItsInput(Pairs):
    def forward(self, x: Tensor) -> Tensor:
        x += 1
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            b = b + g(a)
        return torch.cat([a, b], -1)


def test_write_to_an_input_of_the_model_happens_as_the_user_wrote_it(fp64: None) -> None:
    x = torch.randn(6, 2 * D)
    converted, _ = assert_steps_like_plain(lambda: WritesItsInput(DEPTH), [x])
    given = x.clone()
    converted(given)
    assert torch.equal(given, x + 1)
    assert len(converted.revfx.regions) == 1, "the couplings after the write are reversible"


class ScalesItsInput(nn.Module):
    def __init__(self, copies: bool) -> None:
        super().__init__()
        self.inner, self.copies = mlp(), copies

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x.clone() if self.copies else x)
        x.mul_(0.5)
        return h


@pytest.mark.parametrize("copies", [False, True])
def test_function_that_writes_to_its_input(copies: bool, fp64: None) -> None:
    """Without the copy, plain code raises: the saved input was written to. One that is dropped comes back as it was."""
    model = Additive(DEPTH)
    model.f[2] = ScalesItsInput(True)
    converted: Any = revfx.convert(copy.deepcopy(model))
    converted.f[2].copies = copies
    x = torch.randn(6, 2 * D)
    for _ in range(STEPS):
        try:
            assert_same_grads(converted, model, [x])
        except RuntimeError as e:
            assert IN_PLACE in str(e) and not copies


class WritesWhenArmed(nn.Module):
    """Writes to its input in every third call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls % 3 == 0:
            x.detach().mul_(0.5)
        return torch.tanh(x)


def test_function_that_writes_to_its_input_in_some_calls(fp64: None) -> None:
    def make() -> nn.Module:
        model = Additive(DEPTH)
        model.f[1] = nn.Sequential(nn.Identity(), WritesWhenArmed())
        return model

    assert_steps_like_plain(make, [torch.randn(6, 2 * D)], count=7)


# --- state changed between forward and backward
def _write(t: Tensor) -> None:
    with torch.no_grad():
        t.add_(1)


def _swap(t: Tensor) -> None:
    t.data = t.data.clone() + 1


class WithBuffer(nn.Module):
    big: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.register_buffer("big", torch.randn(4097, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.big[: x.shape[0]]


@pytest.mark.parametrize("change", [_write, _swap])
@pytest.mark.parametrize("which", ["weight", "bias", "buffer"])
def test_change_between_forward_and_backward(change: Callable[[Tensor], None], which: str, fp64: None) -> None:
    def make() -> nn.Module:
        model = Additive(DEPTH)
        model.f[1] = WithBuffer()
        return model

    def spoil(model: Any, _: Any) -> None:
        linear = model.f[1].inner[0]
        change({"weight": linear.weight, "bias": linear.bias, "buffer": model.f[1].big}[which])

    is_read_again = change is _write and which == "bias"  # autograd saves no bias; a replay reads it
    x = torch.randn(6, 2 * D, requires_grad=True)
    _, found = assert_steps_like_plain(make, [x], spoil, may_raise=is_read_again)
    assert is_read_again or raised(found) == [change is _write] * len(found)


class SideInput(Pairs):
    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b + side)
            b = b + g(a)
        return torch.cat([a, b], -1)


def test_side_input_written_between_forward_and_backward_is_noticed(fp64: None) -> None:
    """Autograd saves no addend; a replay reads it."""
    given: list[Tensor] = []

    def make() -> nn.Module:
        model = SideInput(DEPTH)
        model.register_forward_pre_hook(lambda m, args: given.append(args[1]))
        return model

    x = [torch.randn(6, 2 * D, requires_grad=True), torch.randn(6, D)]
    assert_steps_like_plain(make, x, lambda *_: given[-1].add_(1), may_raise=True)


def test_output_written_in_place(fp64: None) -> None:
    x = torch.randn(6, 2 * D, requires_grad=True)
    assert_steps_like_plain(lambda: Additive(DEPTH), [x], lambda _, outputs: outputs[0].detach().add_(1))


def test_counters_that_no_replay_reads_are_not_copied() -> None:
    """Each forward adds 1 to `num_batches_tracked`, which no gradient reads."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fs = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, 1)
            for f in self.fs:
                a, b = b, a + f(b)
            return torch.cat((a, b), 1)

    model, x = Net(), torch.randn(32, 16)
    converted = revfx.convert(copy.deepcopy(model))
    copies: list[int] = []
    for of in (model, converted):
        for _ in range(4):
            of(x).sin().sum().backward()
        with profile(activities=[ProfilerActivity.CPU]) as found:
            of(x).sin().sum().backward()
        copies.append(sum(e.count for e in found.key_averages() if e.key == "aten::clone"))
    assert copies[0] == copies[1]


class ViewReadAfterAWrite(Pairs):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            h = f(b)
            view = h.view(-1, D // 2)
            h.mul_(0.5)
            wave = torch.sin(view)
            a = a + h
            b = b + g(a) * wave.view(h.shape)
        return torch.cat([a, b], -1)


@pytest.mark.usefixtures("sizes")
def test_decoding_writes_over_no_memory_that_a_view_shows() -> None:
    """The plan is learnt and proven on streams that are too small to be coded."""
    plain = ViewReadAfterAWrite(DEPTH)
    converted = revfx.convert(copy.deepcopy(plain))
    for rows in (16, 16, 1024, 1024):
        x = torch.randn(rows, 2 * D)
        grads: list[list[Tensor | None]] = []
        for model in (plain, converted):
            model.zero_grad()
            model(x).sin().sum().backward()
            grads.append([p.grad for p in model.parameters()])
        for got, want in zip(*grads, strict=True):
            assert got is not None and want is not None and torch.equal(got, want)


class StreamUsedAsScratch(Pairs):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            y = a + f(b * 0.5)
            z = b + g(y - y.mean())
            with torch.no_grad():
                if a._base is None:
                    a.zero_()
            a, b = y, z
        return torch.cat([a, b], -1)


@pytest.mark.usefixtures("sizes")
def test_a_stream_that_is_held_as_its_code_would_be_larger_may_be_written_to() -> None:
    assert_steps_like_plain(lambda: StreamUsedAsScratch(DEPTH), [torch.randn(16, 2 * D)])


class BufferWrittenByForeach(Pairs):
    scale: Tensor

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.register_buffer("scale", torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            h = f(b)
            with torch.no_grad():
                torch.ops.aten._foreach_mul_([self.scale], 0.9)
            a = a + h * torch.exp(self.scale + h)
            b = b + g(a)
        return torch.cat([a, b], -1)


def test_writes_by_operators_without_results() -> None:
    assert_steps_like_plain(lambda: BufferWrittenByForeach(DEPTH), [torch.randn(16, 2 * D)])


class SideWrittenAfterItWasRead(Pairs):
    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.side = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        side = self.side * 2
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b + side)
            b = b + g(a)
        side.mul_(1.5)
        return torch.cat([a, b + side], -1)


def test_a_value_beside_the_streams_that_is_written_to_in_the_end() -> None:
    assert_steps_like_plain(lambda: SideWrittenAfterItWasRead(DEPTH), [torch.randn(16, 2 * D)])

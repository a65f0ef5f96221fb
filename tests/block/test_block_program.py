"""`rev_block` and `RevBlock` in programs: runs of f, hooks, transforms, autocast, threads."""

# pyright: reportUnknownLambdaType=false
from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import (
    WAYS,
    Pair,
    assert_like_lines,
    block,
    both,
    fp64 as fp64,
    leaf,
    lines,
    loss_of,
    mlp,
    mlps,
    relative_error,
)  # fmt: skip
from steps import STEPS, assert_same_bits
from torch import Tensor, nn

from revfx import RevBlock, rev_block
from revfx.modes import store_activations


ways = pytest.mark.parametrize("way", WAYS)


@ways
def test_f_runs_once_in_the_forward_and_never_in_the_backward(way: str) -> None:
    runs: list[str] = []

    class Counted(nn.Linear):
        name: str

        def forward(self, input: Tensor) -> Tensor:
            runs.append(self.name)
            return super().forward(input).tanh()

    fs, gs = ([Counted(4, 4) for _ in range(4)] for _ in range(2))
    for i, m in enumerate([m for pair in zip(fs, gs, strict=True) for m in pair]):
        m.name = str(i)
    call = block(way, fs, gs)
    for _ in range(STEPS):
        y = call(leaf(3, 4), leaf(3, 4))
        assert runs == list("01234567")
        loss_of(y).backward()
        assert runs == list("01234567")
        runs.clear()


@ways
def test_hooks_on_f_run_and_what_they_change_counts(way: str) -> None:
    def scale_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * 1.5,)

    def scale_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * 0.5

    fs, gs = mlps(3), mlps(3)
    backward_calls: list[int] = []
    for i, f in enumerate(fs):
        f.register_forward_pre_hook(scale_input)
        f.register_forward_hook(scale_output)
        f.register_full_backward_hook(lambda m, gi, go, i=i: backward_calls.append(i))
    assert_like_lines(way, fs, gs, [leaf(3, 4), leaf(3, 4)])
    assert backward_calls == [2, 1, 0] * 4  # the lines once, the block in three steps


@ways
def test_gradient_hooks_on_inputs_and_parameters_fire_once(way: str) -> None:
    fs, gs = mlps(2), mlps(2)
    x1, x2 = leaf(3, 4), leaf(3, 4)
    fired: list[str] = []
    x1.register_hook(lambda g: fired.append("x1"))
    fs[0][0].weight.register_post_accumulate_grad_hook(lambda p: fired.append("w"))  # type: ignore[index]
    for _ in range(STEPS):
        fired.clear()
        y = block(way, fs, gs)(x1, x2)
        y[0].register_hook(lambda g: fired.append("y1"))
        loss_of(y).backward()
        assert sorted(fired) == ["w", "x1", "y1"]


@ways
def test_anomaly_mode_works(way: str) -> None:
    with torch.autograd.set_detect_anomaly(True):
        assert_like_lines(way, mlps(3), mlps(3), [leaf(3, 4), leaf(3, 4)])


def test_torch_func_transforms_of_functional_call_work() -> None:
    module = RevBlock(mlp, mlp, 3)
    x1, x2 = torch.randn(3, 4), torch.randn(3, 4)
    parameters = dict(module.named_parameters())

    def loss(parameters: dict[str, Tensor], x1: Tensor, x2: Tensor) -> Tensor:
        return loss_of(torch.func.functional_call(module, parameters, (x1, x2)))

    expected = torch.autograd.grad(loss_of(lines(module.f, module.g)(x1, x2)), list(parameters.values()))
    for _ in range(STEPS):
        got = torch.func.grad(loss)({k: p.detach() for k, p in parameters.items()}, x1, x2)
        assert relative_error(list(got.values()), expected) < 1e-9
        rows = torch.func.vmap(module)(x1, x2)
        assert relative_error(rows, module(x1, x2)) < 1e-9
        loss_of(module(x1, x2)).backward()


def test_functional_call_then_backward_after_the_parameters_were_swapped_back() -> None:
    module = RevBlock(mlp, mlp, 3)
    other = {k: torch.randn_like(p).requires_grad_() for k, p in module.named_parameters()}
    x1, x2 = leaf(3, 4), leaf(3, 4)
    own = list(module.parameters())
    with store_activations():
        y = torch.func.functional_call(module, other, (x1, x2))
    expected = torch.autograd.grad(loss_of(y), [x1, x2, *other.values()])
    for _ in range(STEPS):
        y = torch.func.functional_call(module, other, (x1, x2))
        got = torch.autograd.grad(loss_of(y), [x1, x2, *other.values()])
        assert all(a is b for a, b in zip(module.parameters(), own, strict=True))
        assert all(p.grad is None for p in module.parameters())
        assert_same_bits(got, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_forward_mode_derivatives_equal_plain_ones() -> None:
    fs, gs = mlps(3), mlps(3)
    x, tangent = torch.randn(3, 4), torch.randn(3, 4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        got = [torch.autograd.forward_ad.unpack_dual(y).tangent for y in rev_block(dual, dual, fs, gs, 3)]
        expected = [torch.autograd.forward_ad.unpack_dual(y).tangent for y in lines(fs, gs)(dual, dual)]
    assert relative_error(got, expected) < 1e-9


@ways
@pytest.mark.parametrize("around", ["forward", "backward", "both"])
def test_autocast_around_the_forward_or_the_backward(way: str, around: str) -> None:
    seen: list[torch.dtype] = []

    class Noting(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            h = super().forward(input)
            seen.append(h.dtype)
            return h.tanh()

    fs, gs = (nn.ModuleList(Noting(4, 4) for _ in range(3)).float() for _ in range(2))
    x = [leaf(3, 4, dtype=torch.float32), leaf(3, 4, dtype=torch.float32)]

    def step(call: Callable[..., Pair]) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=around != "backward"):
            y = call(*x)
            assert y[0].dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=around != "forward"):
            return [*y, *torch.autograd.grad(loss_of(y), [*x, *both(fs, gs).parameters()])]

    expected, call = step(lines(fs, gs)), block(way, fs, gs)
    for number in range(STEPS):
        assert_same_bits(step(call), expected)
        assert seen == [torch.float32 if around == "backward" else torch.bfloat16] * 6 * (number + 2)


@ways
def test_low_precision_streams_give_gradients_of_that_precision(way: str) -> None:
    fs, gs = mlps(2).to(torch.bfloat16), mlps(2).to(torch.bfloat16)
    inputs = [leaf(8, 4, dtype=torch.bfloat16), leaf(8, 4, dtype=torch.bfloat16)]
    assert_like_lines(way, fs, gs, inputs)


def test_two_threads_may_train_the_same_block_at_once() -> None:
    module = RevBlock(lambda: nn.Sequential(mlp(), nn.BatchNorm1d(4)), mlp, 4)
    buffers = {k: id(b) for k, b in module.named_buffers()}
    xs = [leaf(8, 4) for _ in range(2)]
    wanted = list(module.parameters())
    expected = [torch.autograd.grad(loss_of(lines(module.f, module.g)(x, x)), [x, *wanted]) for x in xs]
    equal: list[bool] = []

    def train(x: Tensor, expected: Sequence[Tensor]) -> None:
        for _ in range(15):
            got = torch.autograd.grad(loss_of(module(x, x)), [x, *wanted])
            equal.append(all(map(torch.equal, got, expected)))

    threads = [threading.Thread(target=train, args=(x, e)) for x, e in zip(xs, expected, strict=True)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert equal == [True] * 30
    assert {k: id(b) for k, b in module.named_buffers()} == buffers


def test_the_backward_may_run_in_another_thread() -> None:
    fs, gs = mlps(3), mlps(3)
    x1, x2 = leaf(3, 4), leaf(3, 4)
    expected = torch.autograd.grad(loss_of(lines(fs, gs)(x1, x2)), [x1, x2])
    for _ in range(STEPS):
        x1.grad = x2.grad = None
        loss = loss_of(rev_block(x1, x2, fs, gs, 3))
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        assert_same_bits([x1.grad, x2.grad], expected)

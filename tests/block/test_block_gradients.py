"""All ways to ask for gradients of `rev_block` and `RevBlock`, and functions f that ask for gradients."""

# pyright: reportUnknownLambdaType=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    WAYS,
    Pair,
    assert_like_lines,
    assert_steps,
    block,
    both,
    fp64 as fp64,
    leaf,
    lines,
    loss_of,
    mlps,
    outcome,
)  # fmt: skip
from steps import STEPS, assert_same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


ways = pytest.mark.parametrize("way", WAYS)


@ways
@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone_may_be_used(way: str, used: int) -> None:
    assert_like_lines(way, mlps(3), mlps(3), [leaf(3, 4), leaf(3, 4)], lambda call: lambda *x: call(*x)[used])


@ways
def test_autograd_grad_of_some_inputs_and_parameters_leaves_grad_fields_alone(way: str) -> None:
    fs, gs = mlps(3), mlps(3)
    x1, x2 = leaf(3, 4), leaf(3, 4)
    for wanted in ([x1], [x2, *fs[1].parameters()], list(both(fs, gs).parameters())):
        expected = torch.autograd.grad(loss_of(lines(fs, gs)(x1, x2)), wanted)
        for _ in range(STEPS):
            assert_same_bits(torch.autograd.grad(loss_of(block(way, fs, gs)(x1, x2)), wanted), expected)
    assert all(t.grad is None for t in (x1, x2, *both(fs, gs).parameters()))


@ways
def test_second_and_third_derivatives_equal_plain_ones(way: str) -> None:
    fs, gs = mlps(3), mlps(3)
    x1, x2 = leaf(3, 4), leaf(3, 4)
    wanted = [x1, x2, *both(fs, gs).parameters()]

    def derivatives(y: Pair) -> list[Tensor | None]:
        first = torch.autograd.grad(loss_of(y).square(), wanted, create_graph=True)
        second = torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), wanted, create_graph=True)
        third = torch.autograd.grad(torch.stack([g.sin().sum() for g in second]).sum(), wanted, allow_unused=True)
        return [*first, *second, *third]

    expected = derivatives(lines(fs, gs)(x1, x2))
    for _ in range(STEPS):
        assert_same_bits(derivatives(block(way, fs, gs)(x1, x2)), expected)


@ways
def test_retain_graph_allows_a_second_backward_and_its_absence_forbids_it(way: str) -> None:
    fs, gs = mlps(3), mlps(3)
    x1, x2 = leaf(3, 4), leaf(3, 4)
    wanted = [x1, x2, *both(fs, gs).parameters()]
    expected = torch.autograd.grad(loss_of(lines(fs, gs)(x1, x2)), wanted)
    for _ in range(STEPS):
        loss = loss_of(block(way, fs, gs)(x1, x2))
        for _ in range(3):
            assert_same_bits(torch.autograd.grad(loss, wanted, retain_graph=True), expected)
        assert_same_bits(torch.autograd.grad(loss, wanted), expected)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, wanted)


@ways
def test_backwards_of_two_calls_may_follow_both_forwards_in_any_order(way: str) -> None:
    fs, gs = mlps(3), mlps(3)
    call = block(way, fs, gs)
    a, b = leaf(3, 4), leaf(5, 4)

    def accumulated(first: Callable[..., Pair], order: int) -> list[Tensor | None]:
        losses = [loss_of(first(x, x.cos())) for x in (a, b)]
        for loss in losses[::order]:
            loss.backward()
        tensors = [a, b, *both(fs, gs).parameters()]
        grads = [t.grad for t in tensors]
        for t in tensors:
            t.grad = None
        return grads

    expected = {order: accumulated(lines(fs, gs), order) for order in (1, -1)}
    for order in (1, -1, 1, -1):
        assert_same_bits(accumulated(call, order), expected[order])


@ways
def test_blocks_may_follow_each_other_and_nest(way: str) -> None:
    fs, gs = mlps(2), mlps(2)
    one = block(way, fs, gs)
    assert_like_lines(way, fs, gs, [leaf(3, 4), leaf(3, 4)], lambda call: lambda *x: call(*call(*x)))

    def outer(inner: Any) -> Any:
        return lambda x: torch.cat(inner(*x.chunk(2, -1)), -1)

    wide = mlps(2, 8)
    inputs = [leaf(3, 8), leaf(3, 8)]
    modules = both([fs, gs], wide)
    expected = outcome(lines([outer(lines(fs, gs))] * 2, wide), inputs, modules)
    assert_steps(block(way, [outer(one)] * 2, wide), expected, inputs, modules)


@ways
def test_f_may_differentiate_within_itself(way: str) -> None:
    potentials = mlps(3, 4, 1)

    def force(potential: nn.Module) -> Any:
        def call(x: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x if x.requires_grad else x.requires_grad_()
                return torch.autograd.grad(potential(x).square().sum(), x, create_graph=True)[0]

        return call

    fs = [force(m) for m in potentials]
    inputs = [leaf(3, 4), leaf(3, 4)]
    expected = outcome(lines(fs, [torch.sin] * 3), inputs, potentials)
    assert_steps(block(way, fs, [torch.sin] * 3), expected, inputs, potentials)


@ways
def test_checkpointing_inside_and_around_and_saving_on_cpu_around_work(way: str) -> None:
    inner = mlps(3)
    fs: Any = [lambda x, m=m: checkpoint(m, x, use_reentrant=False) for m in inner]
    inputs = [leaf(3, 4), leaf(3, 4)]
    expected = outcome(lines(inner, inner), inputs, inner)
    call = block(way, fs, fs)
    assert_steps(call, expected, inputs, inner)
    around = block(way, list(inner), list(inner))
    assert_steps(lambda *x: checkpoint(around, *x, use_reentrant=False), expected, inputs, inner)

    def on_cpu(*x: Tensor) -> Pair:
        with torch.autograd.graph.save_on_cpu():
            return call(*x)

    assert_steps(on_cpu, expected, inputs, inner)


@ways
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_grad_and_inference_mode_give_the_same_values_without_a_graph(way: str, mode: Callable[[], Any]) -> None:
    fs, gs = mlps(3), mlps(3)
    x = leaf(3, 4), leaf(3, 4)
    for _ in range(STEPS):
        with mode():
            y = block(way, fs, gs)(*x)
        assert all(torch.equal(a, b) and a.grad_fn is None for a, b in zip(y, lines(fs, gs)(*x), strict=True))
        loss_of(block(way, fs, gs)(*x)).backward()


@ways
def test_gradcheck_passes(way: str) -> None:
    call = block(way, list(mlps(2, 2)), list(mlps(2, 2)))
    x = [leaf(2, 2), leaf(2, 2)]
    assert torch.autograd.gradcheck(call, x)
    assert torch.autograd.gradgradcheck(call, x)

"""`rev_block` and `RevBlock` in programs: derivatives, modes, hooks, transforms, threads, memory."""

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
    assert_like_stored,
    assert_same,
    block,
    both,
    fp64 as fp64,
    leaf,
    lines,
    loss_of,
    mlp,
    mlps,
    outcome,
    relative_error,
    unseen,
)
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from revfx import RevBlock, rev_block
from revfx.eager.modes import store_activations


ways = pytest.mark.parametrize("way", WAYS)


# --- ways of asking for gradients
@ways
@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone_may_be_used(way: str, used: int) -> None:
    assert_like_lines(way, mlps(3), mlps(3), [leaf(3, 4), leaf(3, 4)], lambda call: lambda *x: call(*x)[used])


@ways
def test_autograd_grad_of_some_inputs_and_parameters_leaves_grad_fields_alone(way: str) -> None:
    fs, gs = mlps(3), mlps(3)
    x1, x2 = leaf(3, 4), leaf(3, 4)
    for wanted in ([x1], [x2, *fs[1].parameters()], list(both(fs, gs).parameters())):
        got = torch.autograd.grad(loss_of(block(way, fs, gs)(x1, x2)), wanted)
        expected = torch.autograd.grad(loss_of(lines(fs, gs)(x1, x2)), wanted)
        assert relative_error(got, expected) < 1e-9
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

    got, expected = derivatives(block(way, fs, gs)(x1, x2)), derivatives(lines(fs, gs)(x1, x2))
    assert relative_error(got, expected) < 1e-8


@ways
def test_retain_graph_allows_a_second_backward_and_its_absence_forbids_it(way: str) -> None:
    fs, gs = mlps(3), mlps(3)
    x1, x2 = leaf(3, 4), leaf(3, 4)
    wanted = [x1, x2, *both(fs, gs).parameters()]
    loss = loss_of(block(way, fs, gs)(x1, x2))
    expected = torch.autograd.grad(loss_of(lines(fs, gs)(x1, x2)), wanted)
    for _ in range(3):
        assert relative_error(torch.autograd.grad(loss, wanted, retain_graph=True), expected) < 1e-9
    assert relative_error(torch.autograd.grad(loss, wanted), expected) < 1e-9
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

    expected = accumulated(lines(fs, gs), 1)
    assert relative_error(accumulated(call, 1), expected) < 1e-9
    assert relative_error(accumulated(call, -1), expected) < 1e-9


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
    got = outcome(block(way, [outer(one)] * 2, wide), inputs, modules)
    plain = outer(lines(fs, gs))
    assert_same(got, outcome(lines([plain] * 2, wide), inputs, modules))


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
    assert_same(outcome(block(way, fs, [torch.sin] * 3), inputs, potentials), expected)


@ways
def test_checkpointing_inside_and_around_and_saving_on_cpu_around_work(way: str) -> None:
    inner = mlps(3)
    fs: Any = [lambda x, m=m: checkpoint(m, x, use_reentrant=False) for m in inner]
    inputs = [leaf(3, 4), leaf(3, 4)]
    expected = outcome(lines(inner, inner), inputs, inner)
    call = block(way, fs, fs)
    assert_same(outcome(call, inputs, inner), expected)
    assert_same(
        outcome(
            lambda *x: checkpoint(block(way, list(inner), list(inner)), *x, use_reentrant=False),
            inputs,
            inner,
        ),
        expected,
    )

    def on_cpu(*x: Tensor) -> Pair:
        with torch.autograd.graph.save_on_cpu():
            return call(*x)

    assert_same(outcome(on_cpu, inputs, inner), expected)


@ways
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_grad_and_inference_mode_give_the_same_values_without_a_graph(way: str, mode: Callable[[], Any]) -> None:
    fs, gs = mlps(3), mlps(3)
    x = leaf(3, 4), leaf(3, 4)
    with mode():
        y = block(way, fs, gs)(*x)
    assert all(torch.equal(a, b) and a.grad_fn is None for a, b in zip(y, lines(fs, gs)(*x), strict=True))


@ways
def test_gradcheck_passes(way: str) -> None:
    call = block(way, list(mlps(2, 2)), list(mlps(2, 2)))
    x = [leaf(2, 2), leaf(2, 2)]
    assert torch.autograd.gradcheck(call, x)
    assert torch.autograd.gradgradcheck(call, x)


# --- the program around the block
@ways
def test_f_runs_once_in_the_forward_and_once_in_the_backward(way: str) -> None:
    runs = unseen()

    class Counted(nn.Linear):
        name: str

        def forward(self, input: Tensor) -> Tensor:
            runs.values.append(self.name)
            return super().forward(input).tanh()

    fs, gs = ([Counted(4, 4) for _ in range(4)] for _ in range(2))
    for i, m in enumerate([m for pair in zip(fs, gs, strict=True) for m in pair]):
        m.name = str(i)
    y = block(way, fs, gs)(leaf(3, 4), leaf(3, 4))
    assert list(runs.values) == list("01234567")
    runs.values.clear()
    loss_of(y).backward()
    assert sorted(runs.values) == list("01234567")


@ways
@pytest.mark.parametrize("layers", [4, 16])
def test_the_graph_keeps_no_activation_of_any_layer_alive(way: str, layers: int) -> None:
    made: list[StorageWeakRef] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            for m in self.inner:
                x = m(x)
                made.append(StorageWeakRef(x.untyped_storage()))
            return x

    def alive() -> int:
        return sum(not ref.expired() for ref in made)

    fs, gs = ([Watched() for _ in range(layers)] for _ in range(2))
    x1, x2 = leaf(3, 4), leaf(3, 4)
    y = block(way, fs, gs)(x1, x2)
    assert len(made) == 6 * layers and alive() == 0
    peak: list[int] = []
    for m in (*fs, *gs):
        next(m.inner.parameters()).register_hook(lambda g: peak.append(alive()))
    loss_of(y).backward()
    assert len(peak) == 2 * layers and max(peak) <= 8
    del y
    assert alive() == 0
    with store_activations():
        y = block(way, fs, gs)(x1, x2)
    assert alive() >= 2 * layers
    del y


@ways
def test_streams_between_layers_are_freed_too(way: str) -> None:
    seen: list[StorageWeakRef] = []

    def f(x: Tensor) -> Tensor:
        seen.append(StorageWeakRef(x.untyped_storage()))
        return torch.tanh(x)

    y = block(way, [f] * 8, [f] * 8)(leaf(3, 4), leaf(3, 4))
    assert len(seen) == 16
    alive = sum(not ref.expired() for ref in seen)
    assert alive <= 3  # x2, and y1 of the last layer
    loss_of(y).backward()


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
    assert backward_calls == [2, 1, 0, 2, 1, 0]  # the lines once, the block once


@ways
def test_gradient_hooks_on_inputs_and_parameters_fire_once(way: str) -> None:
    fs, gs = mlps(2), mlps(2)
    x1, x2 = leaf(3, 4), leaf(3, 4)
    fired: list[str] = []
    x1.register_hook(lambda g: fired.append("x1"))
    fs[0][0].weight.register_post_accumulate_grad_hook(lambda p: fired.append("w"))  # type: ignore[index]
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

    got = torch.func.grad(loss)({k: p.detach() for k, p in parameters.items()}, x1, x2)
    expected = torch.autograd.grad(loss_of(lines(module.f, module.g)(x1, x2)), list(parameters.values()))
    assert relative_error(list(got.values()), expected) < 1e-9
    rows = torch.func.vmap(module)(x1, x2)
    assert relative_error(rows, module(x1, x2)) < 1e-9


def test_functional_call_then_backward_after_the_parameters_were_swapped_back() -> None:
    module = RevBlock(mlp, mlp, 3)
    other = {k: torch.randn_like(p).requires_grad_() for k, p in module.named_parameters()}
    x1, x2 = leaf(3, 4), leaf(3, 4)
    y = torch.func.functional_call(module, other, (x1, x2))
    own = dict(module.named_parameters())
    loss_of(y).backward()
    assert all(a is b for a, b in zip(module.parameters(), own.values(), strict=True))
    assert all(p.grad is None for p in module.parameters())
    with store_activations():
        y = torch.func.functional_call(module, other, (x1, x2))
    expected = torch.autograd.grad(loss_of(y), [x1, x2, *other.values()])
    assert relative_error([x1.grad, x2.grad, *(p.grad for p in other.values())], expected) < 1e-9


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
@pytest.mark.parametrize("backward_inside", [False, True])
def test_under_autocast_f_computes_in_the_same_dtype_again(way: str, backward_inside: bool) -> None:
    seen = unseen()

    class Noting(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            h = super().forward(input)
            seen.values.append(h.dtype)
            return h.tanh()

    fs, gs = (nn.ModuleList(Noting(4, 4) for _ in range(3)).float() for _ in range(2))
    call = block(way, list(fs), list(gs))

    def program(x1: Tensor, x2: Tensor) -> Pair:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = call(x1, x2)
            assert y[0].dtype == torch.float32
            if backward_inside:
                loss_of(y).backward(retain_graph=True)
        return y

    inputs = [leaf(3, 4, dtype=torch.float32), leaf(3, 4, dtype=torch.float32)]
    assert_like_stored(program, inputs, both(fs, gs), tolerance=2e-2)
    assert set(seen.values) == {torch.bfloat16} and len(seen.values) == 6 * (3 + backward_inside)


@ways
def test_without_autocast_f_does_not_see_the_autocast_of_the_backward(way: str) -> None:
    seen = unseen()

    def f(x: Tensor) -> Tensor:
        h = x @ torch.ones(4, 4, dtype=torch.float32)
        seen.values.append(h.dtype)
        return h.tanh()

    y = block(way, [f] * 3, [f] * 3)(leaf(3, 4, dtype=torch.float32), leaf(3, 4, dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_of(y).backward()
    assert set(seen.values) == {torch.float32} and len(seen.values) == 12


@ways
def test_low_precision_streams_give_gradients_of_that_precision(way: str) -> None:
    fs, gs = mlps(2).to(torch.bfloat16), mlps(2).to(torch.bfloat16)
    inputs = [leaf(8, 4, dtype=torch.bfloat16), leaf(8, 4, dtype=torch.bfloat16)]
    assert_like_stored(block(way, list(fs), list(gs)), inputs, both(fs, gs), tolerance=0.05)


def test_two_threads_may_train_the_same_block_at_once() -> None:
    module = RevBlock(lambda: nn.Sequential(mlp(), nn.BatchNorm1d(4)), mlp, 4)
    buffers = {k: id(b) for k, b in module.named_buffers()}
    xs = [leaf(8, 4) for _ in range(2)]
    wanted = list(module.parameters())
    expected = [torch.autograd.grad(loss_of(lines(module.f, module.g)(x, x)), [x, *wanted]) for x in xs]
    errors: list[float] = []

    def train(x: Tensor, expected: Sequence[Tensor]) -> None:
        for _ in range(15):
            errors.append(relative_error(torch.autograd.grad(loss_of(module(x, x)), [x, *wanted]), expected))

    threads = [threading.Thread(target=train, args=(x, e)) for x, e in zip(xs, expected, strict=True)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(errors) == 30 and max(errors) < 1e-9
    assert {k: id(b) for k, b in module.named_buffers()} == buffers


def test_the_backward_may_run_in_another_thread() -> None:
    fs, gs = mlps(3), mlps(3)
    x1, x2 = leaf(3, 4), leaf(3, 4)
    loss = loss_of(rev_block(x1, x2, fs, gs, 3))
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    expected = torch.autograd.grad(loss_of(lines(fs, gs)(x1, x2)), [x1, x2])
    assert relative_error([x1.grad, x2.grad], expected) < 1e-9

"""`rev_block` and `RevBlock`: every promise of the coupling as a function, against the same lines under plain autograd."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from helpers import (
    WAYS,
    Pair,
    assert_like_stored,
    assert_same,
    block,
    by_hand,
    leaf,
    loss_of,
    mlp,
    mlps,
    outcome,
    relative_error,
)
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from revfx import RevBlock, rev_block
from revfx.mode import store_activations


ways = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(autouse=True)
def fp64() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def both(fs: Sequence[nn.Module] | nn.ModuleList, gs: Sequence[nn.Module] | nn.ModuleList) -> nn.ModuleList:
    return nn.ModuleList([*fs, *gs])


def assert_like_by_hand(
    way: str,
    fs: Any,
    gs: Any,
    inputs: Sequence[Tensor],
    wrap: Callable[[Any], Callable[..., Any]] | None = None,
) -> None:
    """The block gives what the lines give; `wrap` makes the program of `inputs` out of either."""
    wrap = wrap or (lambda call: call)
    modules = [m for m in (*fs, *gs) if isinstance(m, nn.Module)]
    module = nn.ModuleList(modules) if modules else None
    expected = outcome(wrap(lambda *a: by_hand(a[0], a[1], fs, gs, *a[2:])), inputs, module)
    assert_same(outcome(wrap(block(way, fs, gs)), inputs, module), expected)


# --- values and gradients ---------------------------------------------------------------------------------------------
@ways
@pytest.mark.parametrize("layers", [1, 2, 7])
def test_outputs_and_gradients_equal_those_of_the_lines_written_out(way: str, layers: int) -> None:
    assert_like_by_hand(way, mlps(layers), mlps(layers), [leaf(3, 4), leaf(3, 4)])


@pytest.mark.parametrize("training", [True, False])
def test_is_training_changes_neither_values_nor_gradients(training: bool) -> None:
    fs, gs = mlps(3), mlps(3)
    inputs = [leaf(3, 4), leaf(3, 4)]
    got = outcome(lambda *x: rev_block(*x, fs, gs, 3, None, None, training), inputs, both(fs, gs))
    assert_same(got, outcome(lambda *x: by_hand(*x, fs, gs), inputs, both(fs, gs)))


def test_one_module_given_to_rev_block_shares_its_weights_over_the_layers() -> None:
    f, g = mlp(), mlp()
    inputs = [leaf(3, 4), leaf(3, 4)]
    got = outcome(lambda *x: rev_block(*x, f, g, num_layers=3), inputs, both([f], [g]))
    assert_same(got, outcome(lambda *x: by_hand(*x, [f] * 3, [g] * 3), inputs, both([f], [g])))


@ways
@pytest.mark.parametrize("container", [list, tuple, nn.ModuleList])
def test_a_sequence_of_functions_has_one_per_layer(way: str, container: Callable[[Any], Any]) -> None:
    fs, gs = mlps(2), mlps(2)
    call: Any = RevBlock(container(fs), container(gs), 2)
    if way == "rev_block":
        call = lambda *x: rev_block(*x, container(fs), container(gs), 2)  # noqa: E731
    inputs = [leaf(3, 4), leaf(3, 4)]
    expected = outcome(lambda *x: by_hand(*x, fs, gs), inputs, both(fs, gs))
    assert_same(outcome(call, inputs, both(fs, gs)), expected)


@ways
def test_no_layers_return_the_inputs(way: str) -> None:
    x1, x2 = leaf(3, 4), leaf(3, 4)
    y1, y2 = RevBlock(mlp, mlp, 0)(x1, x2) if way == "RevBlock" else rev_block(x1, x2, mlp(), mlp(), 0)
    assert y1 is x1 and y2 is x2
    y1, y2 = RevBlock([], [], 0)(x1, x2) if way == "RevBlock" else rev_block(x1, x2, [], [], 0)
    assert y1 is x1 and y2 is x2


@ways
def test_streams_may_have_different_widths(way: str) -> None:
    assert_like_by_hand(way, mlps(3, 5, 2), mlps(3, 2, 5), [leaf(3, 2), leaf(3, 5)])


@ways
def test_x1_may_be_x2(way: str) -> None:
    assert_like_by_hand(way, mlps(3), mlps(3), [leaf(3, 4)], lambda call: lambda x: call(x, x))


@ways
@pytest.mark.parametrize("function_first", [False, True])
def test_streams_may_be_views_of_one_tensor(way: str, function_first: bool) -> None:
    def wrap(call: Any) -> Any:
        return lambda x: call(*(x.tanh() if function_first else x).chunk(2, dim=-1))

    assert_like_by_hand(way, mlps(3), mlps(3), [leaf(3, 8)], wrap)


@ways
def test_overlapping_transposed_and_expanded_streams_work(way: str) -> None:
    assert_like_by_hand(way, mlps(2), mlps(2), [leaf(3, 6)], lambda call: lambda x: call(x[:, :4], x[:, 2:]))
    assert_like_by_hand(way, mlps(2), mlps(2), [leaf(4, 3)], lambda call: lambda x: call(x.T, x.T.flip(0)))
    assert_like_by_hand(
        way, mlps(2), mlps(2), [leaf(1, 4)], lambda call: lambda x: call(*[x.expand(3, 4)] * 2)
    )


@ways
def test_channels_last_convolutions_work(way: str) -> None:
    fs, gs = [nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for _ in range(3)) for _ in range(2)]

    def wrap(call: Any) -> Any:
        return lambda x: call(*(h.to(memory_format=torch.channels_last) for h in x.chunk(2, dim=1)))

    assert_like_by_hand(way, fs, gs, [leaf(2, 4, 5, 5)], wrap)


@ways
def test_empty_batches_and_scalars_work(way: str) -> None:
    assert_like_by_hand(way, mlps(2), mlps(2), [leaf(0, 4), leaf(0, 4)])
    assert_like_by_hand(way, [torch.sin] * 3, [torch.cos] * 3, [leaf(), leaf()])


@ways
def test_streams_with_exact_zeros_into_relu_keep_their_mask(way: str) -> None:
    x1, x2 = (torch.randn(6, 4).relu().requires_grad_() for _ in range(2))
    fs, gs = ([nn.Sequential(nn.ReLU(), nn.Linear(4, 4)) for _ in range(4)] for _ in range(2))
    assert_like_by_hand(way, fs, gs, [x1, x2])


# --- inverse ----------------------------------------------------------------------------------------------------------
def test_inverse_undoes_forward_and_forward_undoes_inverse() -> None:
    module = RevBlock(mlp, mlp, 5)
    x1, x2 = leaf(3, 4), leaf(3, 4)
    assert relative_error(module.inverse(*module(x1, x2)), (x1, x2)) < 1e-9
    assert relative_error(module(*module.inverse(x1, x2)), (x1, x2)) < 1e-9


def test_inverse_takes_the_same_side_inputs_and_is_differentiable() -> None:
    f: Any = SideMLP
    module = RevBlock(f, mlp, 3)
    y1, y2, side = leaf(3, 4), leaf(3, 4), leaf(3, 4)

    def lines(y1: Tensor, y2: Tensor, side: Tensor) -> Pair:
        for f, g in zip(reversed(module.f), reversed(module.g), strict=True):
            y2 = y2 - g(y1)
            y1 = y1 - f(y2, [side])
        return y1, y2

    got = outcome(lambda y1, y2, side: module.inverse(y1, y2, [side]), [y1, y2, side], module)
    assert_same(got, outcome(lines, [y1, y2, side], module))
    assert relative_error(module(*module.inverse(y1, y2, [side]), [side]), (y1, y2)) < 1e-9


# --- side inputs ------------------------------------------------------------------------------------------------------
class SideMLP(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.inner = mlp(width)

    def forward(self, x: Tensor, side: Any) -> Tensor:
        return self.inner(x * side[0]) + torch.sin(side[-1])


def side_mlps(count: int) -> nn.ModuleList:
    return nn.ModuleList(SideMLP() for _ in range(count))


@ways
@pytest.mark.parametrize("empty", [None, [], (), {}])
def test_no_side_input_and_an_empty_one_are_alike(way: str, empty: Any) -> None:
    fs, gs = mlps(2), mlps(2)
    inputs = [leaf(3, 4), leaf(3, 4)]
    call = block(way, fs, gs)  # type: ignore[arg-type]
    expected = outcome(lambda *x: by_hand(*x, fs, gs), inputs, both(fs, gs))
    assert_same(outcome(lambda *x: call(*x, empty, empty), inputs, both(fs, gs)), expected)


@ways
def test_f_gets_the_whole_list_of_side_inputs_in_every_layer(way: str) -> None:
    seen: list[Any] = []

    def f(x: Tensor, side: Any) -> Tensor:
        seen.append(side)
        return x * side[0]

    a, b = leaf(3, 4), torch.ones(2)
    block(way, [f] * 3, [torch.sin] * 3)(leaf(3, 4), leaf(3, 4), [a, b, "name", None])
    assert len(seen) == 3
    assert all(type(s) is list and s[0] is a and s[1] is b and s[2:] == ["name", None] for s in seen)


@ways
def test_a_side_input_may_be_a_leaf_or_not_and_serve_f_and_g_both(way: str) -> None:
    inputs = [leaf(3, 4), leaf(3, 4), leaf(3, 4)]
    fs, gs = side_mlps(3), side_mlps(3)
    assert_like_by_hand(way, fs, gs, inputs, lambda call: lambda x1, x2, s: call(x1, x2, [s], [s]))
    assert_like_by_hand(
        way, fs, gs, inputs, lambda call: lambda x1, x2, s: call(x1, x2, [s.exp()], [s, s.cos()])
    )


@ways
def test_a_side_input_may_appear_twice_or_be_a_stream(way: str) -> None:
    inputs = [leaf(3, 4), leaf(3, 4), leaf(3, 4)]
    fs, gs = side_mlps(3), mlps(3)
    assert_like_by_hand(way, fs, gs, inputs, lambda call: lambda x1, x2, s: call(x1, x2, [s, s]))
    assert_like_by_hand(way, fs, gs, inputs, lambda call: lambda x1, x2, s: call(x1, x2, [x1, x2]))
    assert_like_by_hand(way, fs, gs, inputs, lambda call: lambda x1, x2, s: call(x1, x2, [s[:, :1], s]))


@ways
def test_side_inputs_may_nest_and_hold_what_is_no_tensor(way: str) -> None:
    def f(x: Tensor, side: Any) -> Tensor:
        a, (b, mask) = side["a"], side["more"]
        return torch.where(mask, x * a, b) * side["scale"] if side["name"] == "f" else x

    def wrap(call: Any) -> Any:
        mask = torch.arange(4) % 2 == 0
        return lambda x1, x2, a, b: call(
            x1, x2, {"a": a, "more": (b, mask), "scale": 0.5, "name": "f", "none": None}
        )

    assert_like_by_hand(way, [f] * 3, mlps(3), [leaf(3, 4) for _ in range(4)], wrap)


@ways
def test_a_tensor_alone_may_be_the_side_input(way: str) -> None:
    def f(x: Tensor, side: Tensor) -> Tensor:
        return torch.tanh(x * side)

    assert_like_by_hand(way, [f] * 3, mlps(3), [leaf(3, 4) for _ in range(3)])


@ways
def test_a_side_input_may_alone_need_a_gradient(way: str) -> None:
    fs, gs = side_mlps(3).requires_grad_(False), mlps(3).requires_grad_(False)
    inputs = [torch.randn(3, 4), torch.randn(3, 4), leaf(3, 4)]
    assert_like_by_hand(way, fs, gs, inputs, lambda call: lambda x1, x2, s: call(x1, x2, [s]))


# --- functions --------------------------------------------------------------------------------------------------------
@ways
def test_tensors_that_f_closes_over_get_their_gradients(way: str) -> None:
    def wrap(name: str) -> Any:
        def program(x1: Tensor, x2: Tensor, w: Tensor) -> Pair:
            z = w.exp()  # not a leaf
            f = [lambda x: torch.tanh(x @ w) * z] * 3
            g = [lambda x, z=z: torch.sin(x) * z[0]] * 3
            return by_hand(x1, x2, f, g) if name == "lines" else block(name, f, g)(x1, x2)

        return program

    inputs = [leaf(4, 4), leaf(4, 4), leaf(4, 4)]
    assert_same(outcome(wrap(way), inputs), outcome(wrap("lines"), inputs))


@ways
@pytest.mark.parametrize(
    "f",
    [
        torch.sin,
        torch.zeros_like,
        lambda x: x,
        lambda x: torch.ones(3, 4),
        lambda x: x.detach().cos() * x.sin(),
        nn.Identity(),
    ],
    ids=[
        "no weights",
        "ignores its values",
        "its input",
        "ignores its input",
        "detaches",
        "module without weights",
    ],
)
def test_unusual_functions_work(way: str, f: Any) -> None:
    assert_like_by_hand(way, [f] * 3, mlps(3), [leaf(3, 4), leaf(3, 4)])
    assert_like_by_hand(way, [f] * 3, [f] * 3, [leaf(3, 4), leaf(3, 4)])


@ways
def test_f_may_return_a_parameter_expanded_over_the_batch(way: str) -> None:
    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.bias.expand_as(x)

    assert_like_by_hand(way, [Bias() for _ in range(3)], mlps(3), [leaf(3, 4), leaf(3, 4)])


@ways
def test_f_may_write_to_its_own_temporaries(way: str) -> None:
    def f(x: Tensor) -> Tensor:
        h = x * 2
        h.add_(1).tanh_()
        h = h * 3
        h[:, 0] = 0
        return h.relu_()

    assert_like_by_hand(
        way, [f] * 3, [nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))] * 3, [leaf(3, 4), leaf(3, 4)]
    )


@ways
@pytest.mark.parametrize("frozen", ["inputs", "x1", "x2", "f", "g", "half", "all but one"])
def test_what_needs_no_gradient_gets_none_and_the_rest_is_right(way: str, frozen: str) -> None:
    fs, gs = mlps(4), mlps(4)
    x1, x2 = leaf(3, 4), leaf(3, 4)
    for name, tensors in {
        "inputs": [x1, x2],
        "x1": [x1],
        "x2": [x2],
        "f": list(fs.parameters()),
        "g": list(gs.parameters()),
        "half": list(both(fs[:2], gs[:2]).parameters()),
        "all but one": [x1, x2, *fs.parameters(), *gs[:2].parameters(), *gs[3].parameters()],
    }.items():
        for t in tensors if name == frozen else ():
            t.requires_grad_(False)
    assert_like_by_hand(way, fs, gs, [x1, x2])


@ways
def test_nothing_that_needs_a_gradient_is_fine(way: str) -> None:
    fs, gs = mlps(2).requires_grad_(False), mlps(2).requires_grad_(False)
    x = torch.randn(3, 4), torch.randn(3, 4)
    y = block(way, fs, gs)(*x)  # type: ignore[arg-type]
    assert not y[0].requires_grad and not y[1].requires_grad
    assert all(torch.equal(a, b) for a, b in zip(y, by_hand(*x, fs, gs), strict=True))


# --- ways of asking for gradients -------------------------------------------------------------------------------------
@ways
@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone_may_be_used(way: str, used: int) -> None:
    assert_like_by_hand(
        way, mlps(3), mlps(3), [leaf(3, 4), leaf(3, 4)], lambda call: lambda *x: call(*x)[used]
    )


@ways
def test_autograd_grad_of_some_inputs_and_parameters_leaves_grad_fields_alone(way: str) -> None:
    fs, gs = mlps(3), mlps(3)
    x1, x2 = leaf(3, 4), leaf(3, 4)
    for wanted in ([x1], [x2, *fs[1].parameters()], list(both(fs, gs).parameters())):
        got = torch.autograd.grad(loss_of(block(way, fs, gs)(x1, x2)), wanted)  # type: ignore[arg-type]
        expected = torch.autograd.grad(loss_of(by_hand(x1, x2, fs, gs)), wanted)
        assert relative_error(got, expected) < 1e-9
    assert all(t.grad is None for t in (x1, x2, *both(fs, gs).parameters()))


@ways
def test_second_and_third_derivatives_equal_plain_ones(way: str) -> None:
    fs, gs = mlps(3), mlps(3)
    x1, x2 = leaf(3, 4), leaf(3, 4)
    wanted = [x1, x2, *both(fs, gs).parameters()]

    def derivatives(y: Pair) -> list[Tensor | None]:
        first = torch.autograd.grad(loss_of(y).square(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted, create_graph=True)
        third = torch.autograd.grad(sum(g.sin().sum() for g in second), wanted, allow_unused=True)
        return [*first, *second, *third]

    got, expected = derivatives(block(way, fs, gs)(x1, x2)), derivatives(by_hand(x1, x2, fs, gs))  # type: ignore[arg-type]
    assert relative_error(got, expected) < 1e-8


@ways
def test_retain_graph_allows_a_second_backward_and_its_absence_forbids_it(way: str) -> None:
    fs, gs = mlps(3), mlps(3)
    x1, x2 = leaf(3, 4), leaf(3, 4)
    wanted = [x1, x2, *both(fs, gs).parameters()]
    loss = loss_of(block(way, fs, gs)(x1, x2))  # type: ignore[arg-type]
    expected = torch.autograd.grad(loss_of(by_hand(x1, x2, fs, gs)), wanted)
    for _ in range(3):
        assert relative_error(torch.autograd.grad(loss, wanted, retain_graph=True), expected) < 1e-9
    assert relative_error(torch.autograd.grad(loss, wanted), expected) < 1e-9
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, wanted)


@ways
def test_backwards_of_two_calls_may_follow_both_forwards_in_any_order(way: str) -> None:
    fs, gs = mlps(3), mlps(3)
    call = block(way, fs, gs)  # type: ignore[arg-type]
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

    expected = accumulated(lambda *x: by_hand(*x, fs, gs), 1)
    assert relative_error(accumulated(call, 1), expected) < 1e-9
    assert relative_error(accumulated(call, -1), expected) < 1e-9


@ways
def test_blocks_may_follow_each_other_and_nest(way: str) -> None:
    fs, gs = mlps(2), mlps(2)
    one = block(way, fs, gs)  # type: ignore[arg-type]
    assert_like_by_hand(way, fs, gs, [leaf(3, 4), leaf(3, 4)], lambda call: lambda *x: call(*call(*x)))

    def outer(inner: Any) -> Any:
        return lambda x: torch.cat(inner(*x.chunk(2, -1)), -1)

    wide = mlps(2, 8)
    inputs = [leaf(3, 8), leaf(3, 8)]
    modules = both([fs, gs], wide)
    got = outcome(block(way, [outer(one)] * 2, wide), inputs, modules)  # type: ignore[arg-type]
    lines = outer(lambda *x: by_hand(*x, fs, gs))
    assert_same(got, outcome(lambda *x: by_hand(*x, [lines] * 2, wide), inputs, modules))


@ways
def test_checkpointing_inside_and_around_and_saving_on_cpu_around_work(way: str) -> None:
    inner = mlps(3)
    fs: Any = [lambda x, m=m: checkpoint(m, x, use_reentrant=False) for m in inner]
    inputs = [leaf(3, 4), leaf(3, 4)]
    expected = outcome(lambda *x: by_hand(*x, inner, inner), inputs, inner)
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
def test_no_grad_and_inference_mode_give_the_same_values_without_a_graph(
    way: str, mode: Callable[[], Any]
) -> None:
    fs, gs = mlps(3), mlps(3)
    x = leaf(3, 4), leaf(3, 4)
    with mode():
        y = block(way, fs, gs)(*x)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) and a.grad_fn is None for a, b in zip(y, by_hand(*x, fs, gs), strict=True))


@ways
def test_gradcheck_passes(way: str) -> None:
    call = block(way, list(mlps(2, 2)), list(mlps(2, 2)))
    x = [leaf(2, 2), leaf(2, 2)]
    assert torch.autograd.gradcheck(call, x)
    assert torch.autograd.gradgradcheck(call, x)


# --- the program around the block -------------------------------------------------------------------------------------
@ways
def test_f_runs_once_in_the_forward_and_once_in_the_backward(way: str) -> None:
    runs: list[str] = []

    class Counted(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            runs.append(self.name)
            return super().forward(input).tanh()

    fs, gs = ([Counted(4, 4) for _ in range(4)] for _ in range(2))
    for i, m in enumerate([m for pair in zip(fs, gs, strict=True) for m in pair]):
        m.name = str(i)
    y = block(way, fs, gs)(leaf(3, 4), leaf(3, 4))
    assert runs == list("01234567")
    runs.clear()
    loss_of(y).backward()
    assert sorted(runs) == list("01234567")


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
        m.inner[0].weight.register_hook(lambda g: peak.append(alive()))
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
    fs, gs = mlps(3), mlps(3)
    backward_calls: list[int] = []
    for i, f in enumerate(fs):
        f.register_forward_pre_hook(lambda m, args: (args[0] * 1.5,))
        f.register_forward_hook(lambda m, args, y: y * 0.5)
        f.register_full_backward_hook(lambda m, gi, go, i=i: backward_calls.append(i))
    assert_like_by_hand(way, fs, gs, [leaf(3, 4), leaf(3, 4)])
    assert backward_calls == [2, 1, 0, 2, 1, 0]  # the lines once, the block once


@ways
def test_gradient_hooks_on_inputs_and_parameters_fire_once(way: str) -> None:
    fs, gs = mlps(2), mlps(2)
    x1, x2 = leaf(3, 4), leaf(3, 4)
    fired: list[str] = []
    x1.register_hook(lambda g: fired.append("x1"))
    fs[0][0].weight.register_post_accumulate_grad_hook(lambda p: fired.append("w"))  # type: ignore[index]
    y = block(way, fs, gs)(x1, x2)  # type: ignore[arg-type]
    y[0].register_hook(lambda g: fired.append("y1"))
    loss_of(y).backward()
    assert sorted(fired) == ["w", "x1", "y1"]


@ways
def test_anomaly_mode_works(way: str) -> None:
    with torch.autograd.set_detect_anomaly(True):
        assert_like_by_hand(way, mlps(3), mlps(3), [leaf(3, 4), leaf(3, 4)])


def test_torch_func_transforms_of_functional_call_work() -> None:
    module = RevBlock(mlp, mlp, 3)
    x1, x2 = torch.randn(3, 4), torch.randn(3, 4)
    parameters = dict(module.named_parameters())

    def loss(parameters: dict[str, Tensor], x1: Tensor, x2: Tensor) -> Tensor:
        return loss_of(torch.func.functional_call(module, parameters, (x1, x2)))

    got = torch.func.grad(loss)({k: p.detach() for k, p in parameters.items()}, x1, x2)
    expected = torch.autograd.grad(loss_of(by_hand(x1, x2, module.f, module.g)), list(parameters.values()))
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


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_forward_mode_derivatives_equal_plain_ones() -> None:
    fs, gs = mlps(3), mlps(3)
    x, tangent = torch.randn(3, 4), torch.randn(3, 4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        got = [torch.autograd.forward_ad.unpack_dual(y).tangent for y in rev_block(dual, dual, fs, gs, 3)]
        expected = [torch.autograd.forward_ad.unpack_dual(y).tangent for y in by_hand(dual, dual, fs, gs)]
    assert relative_error(got, expected) < 1e-9


@ways
@pytest.mark.parametrize("backward_inside", [False, True])
def test_under_autocast_f_computes_in_the_same_dtype_again(way: str, backward_inside: bool) -> None:
    seen: list[torch.dtype] = []

    class Noting(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            h = super().forward(input)
            seen.append(h.dtype)
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
    assert set(seen) == {torch.bfloat16} and len(seen) == 6 * (3 + backward_inside)


@ways
def test_without_autocast_f_does_not_see_the_autocast_of_the_backward(way: str) -> None:
    seen: list[torch.dtype] = []

    def f(x: Tensor) -> Tensor:
        h = x @ torch.ones(4, 4, dtype=torch.float32)
        seen.append(h.dtype)
        return h.tanh()

    y = block(way, [f] * 3, [f] * 3)(leaf(3, 4, dtype=torch.float32), leaf(3, 4, dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_of(y).backward()
    assert set(seen) == {torch.float32} and len(seen) == 12


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
    expected = [torch.autograd.grad(loss_of(by_hand(x, x, module.f, module.g)), [x, *wanted]) for x in xs]
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
    expected = torch.autograd.grad(loss_of(by_hand(x1, x2, fs, gs)), [x1, x2])
    assert relative_error([x1.grad, x2.grad], expected) < 1e-9


# --- RevBlock as a module ---------------------------------------------------------------------------------------------
def make_mlp() -> nn.Sequential:
    return mlp()


class Kernel(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)


@pytest.mark.parametrize(
    "f", [Kernel, make_mlp, mlp, lambda: mlp()], ids=["class", "function", "defaults", "lambda"]
)
def test_a_factory_makes_new_weights_for_each_layer(f: Any) -> None:
    module = RevBlock(f, f, 3)
    parameters = list(module.parameters())
    assert len({id(p) for p in parameters}) == len(parameters) == 6 * len(list(f().parameters()))
    weights = [p for p in parameters if p.dim() == 2]
    assert not any(torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


def test_a_module_is_used_in_the_first_layer_and_copied_with_new_weights_for_the_others() -> None:
    f = mlp()
    before = copy.deepcopy(f.state_dict())
    module = RevBlock(f, mlp, 3)
    assert module.f[0] is f and all(torch.equal(v, before[k]) for k, v in f.state_dict().items())
    assert not torch.equal(module.f[1][0].weight, f[0].weight)
    assert not torch.equal(module.f[2][0].weight, module.f[1][0].weight)


def test_a_sequence_is_used_as_it_is_and_a_function_in_every_layer() -> None:
    shared = mlp()
    module = RevBlock([shared, shared], torch.sin, 2)
    assert module.f[0] is shared and module.f[1] is shared
    assert len(list(module.parameters())) == 4
    inputs = [leaf(3, 4), leaf(3, 4)]
    expected = outcome(lambda *x: by_hand(*x, [shared] * 2, [torch.sin] * 2), inputs, module)
    assert_same(outcome(module, inputs, module), expected)


def test_state_dict_keys_are_those_of_the_functions_by_layer() -> None:
    module = RevBlock(Kernel, lambda: nn.BatchNorm1d(4), 2)
    names = [f"{n}.{i}.{k}" for n in "fg" for i in range(2) for k in ("weight", "bias")]
    names += [f"g.{i}.{k}" for i in range(2) for k in ("running_mean", "running_var", "num_batches_tracked")]
    assert sorted(module.state_dict()) == sorted(names)
    other = RevBlock(Kernel, lambda: nn.BatchNorm1d(4), 2)
    other.load_state_dict(module.state_dict())
    x = leaf(3, 4)
    assert all(torch.equal(a, b) for a, b in zip(module(x, x), other(x, x), strict=True))
    assert "num_layers=2" in repr(module)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("after_use", [False, True])
def test_copies_of_a_block_compute_the_same_and_share_nothing(how: str, after_use: bool) -> None:
    module = RevBlock(Kernel, make_mlp, 2)
    x = leaf(3, 4)
    if after_use:
        loss_of(module(x, x)).backward()
        x.grad = None
        module.zero_grad()
    if how == "deepcopy":
        twin = copy.deepcopy(module)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    else:
        stream = io.BytesIO()
        torch.save(module, stream)
        twin = torch.load(io.BytesIO(stream.getvalue()), weights_only=False)
    assert not {id(p) for p in module.parameters()} & {id(p) for p in twin.parameters()}
    run = lambda m: outcome(lambda x: m(x, x), [x], m)  # noqa: E731
    assert_same(run(twin), run(module), tolerance=1e-15)


def test_train_eval_and_to_reach_the_functions() -> None:
    module = RevBlock(lambda: nn.Sequential(mlp(), nn.Dropout(0.5)), mlp, 2).eval()
    x = leaf(3, 4)
    assert all(not m.training for m in module.modules())
    assert all(torch.equal(a, b) for a, b in zip(module(x, x), module(x, x), strict=True))
    assert {p.dtype for p in module.float().parameters()} == {torch.float32}

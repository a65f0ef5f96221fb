"""`rev_block` and `RevBlock` as functions: values, gradients, inverses, side inputs."""

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
    assert_same,
    assert_steps,
    block,
    both,
    fp64 as fp64,
    leaf,
    lines,
    mlp,
    mlps,
    outcome,
    relative_error,
)  # fmt: skip
from torch import Tensor, nn

from revfx import RevBlock, rev_block


ways = pytest.mark.parametrize("way", WAYS)


# --- values and gradients
@ways
@pytest.mark.parametrize("layers", [1, 2, 7])
def test_outputs_and_gradients_equal_those_of_the_lines_written_out(way: str, layers: int) -> None:
    assert_like_lines(way, mlps(layers), mlps(layers), [leaf(3, 4), leaf(3, 4)])


@pytest.mark.parametrize("training", [True, False])
def test_is_training_changes_neither_values_nor_gradients(training: bool) -> None:
    fs, gs = mlps(3), mlps(3)
    inputs = [leaf(3, 4), leaf(3, 4)]
    module = both(fs, gs)
    expected = outcome(lines(fs, gs), inputs, module)
    assert_steps(lambda a, b: rev_block(a, b, fs, gs, 3, None, None, training), expected, inputs, module)


def test_one_module_given_to_rev_block_shares_its_weights_over_the_layers() -> None:
    f, g = mlp(), mlp()
    inputs = [leaf(3, 4), leaf(3, 4)]
    expected = outcome(lines([f] * 3, [g] * 3), inputs, both([f], [g]))
    assert_steps(lambda a, b: rev_block(a, b, f, g, num_layers=3), expected, inputs, both([f], [g]))


@ways
@pytest.mark.parametrize("container", [list, tuple, nn.ModuleList])
def test_a_sequence_of_functions_has_one_per_layer(way: str, container: Callable[[Any], Any]) -> None:
    fs, gs = mlps(2), mlps(2)
    call: Any = RevBlock(container(fs), container(gs), 2)
    if way == "rev_block":
        call = block(way, container(fs), container(gs))
    inputs = [leaf(3, 4), leaf(3, 4)]
    expected = outcome(lines(fs, gs), inputs, both(fs, gs))
    assert_steps(call, expected, inputs, both(fs, gs))


@ways
def test_no_layers_return_the_inputs(way: str) -> None:
    x1, x2 = leaf(3, 4), leaf(3, 4)
    y1, y2 = RevBlock(mlp, mlp, 0)(x1, x2) if way == "RevBlock" else rev_block(x1, x2, mlp(), mlp(), 0)
    assert y1 is x1 and y2 is x2
    y1, y2 = RevBlock([], [], 0)(x1, x2) if way == "RevBlock" else rev_block(x1, x2, [], [], 0)
    assert y1 is x1 and y2 is x2


@ways
def test_streams_may_have_different_widths(way: str) -> None:
    assert_like_lines(way, mlps(3, 5, 2), mlps(3, 2, 5), [leaf(3, 2), leaf(3, 5)])


@ways
def test_x1_may_be_x2(way: str) -> None:
    assert_like_lines(way, mlps(3), mlps(3), [leaf(3, 4)], lambda call: lambda x: call(x, x))


@ways
@pytest.mark.parametrize("function_first", [False, True])
def test_streams_may_be_views_of_one_tensor(way: str, function_first: bool) -> None:
    def wrap(call: Any) -> Any:
        return lambda x: call(*(x.tanh() if function_first else x).chunk(2, dim=-1))

    assert_like_lines(way, mlps(3), mlps(3), [leaf(3, 8)], wrap)


@ways
def test_overlapping_transposed_and_expanded_streams_work(way: str) -> None:
    assert_like_lines(way, mlps(2), mlps(2), [leaf(3, 6)], lambda call: lambda x: call(x[:, :4], x[:, 2:]))
    assert_like_lines(way, mlps(2), mlps(2), [leaf(4, 3)], lambda call: lambda x: call(x.T, x.T.flip(0)))
    assert_like_lines(way, mlps(2), mlps(2), [leaf(1, 4)], lambda call: lambda x: call(*[x.expand(3, 4)] * 2))


@ways
def test_channels_last_convolutions_work(way: str) -> None:
    fs, gs = [nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for _ in range(3)) for _ in range(2)]

    def wrap(call: Any) -> Any:
        return lambda x: call(*(h.to(memory_format=torch.channels_last) for h in x.chunk(2, dim=1)))

    assert_like_lines(way, fs, gs, [leaf(2, 4, 5, 5)], wrap)


@ways
def test_empty_batches_and_scalars_work(way: str) -> None:
    assert_like_lines(way, mlps(2), mlps(2), [leaf(0, 4), leaf(0, 4)])
    assert_like_lines(way, [torch.sin] * 3, [torch.cos] * 3, [leaf(), leaf()])


@ways
def test_streams_with_exact_zeros_into_relu_keep_their_mask(way: str) -> None:
    x1, x2 = (torch.randn(6, 4).relu().requires_grad_() for _ in range(2))
    fs, gs = ([nn.Sequential(nn.ReLU(), nn.Linear(4, 4)) for _ in range(4)] for _ in range(2))
    assert_like_lines(way, fs, gs, [x1, x2])


# --- inverse
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


# --- side inputs
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
    call = block(way, fs, gs)
    expected = outcome(lines(fs, gs), inputs, both(fs, gs))
    assert_steps(lambda a, b: call(a, b, empty, empty), expected, inputs, both(fs, gs))


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
    assert_like_lines(way, fs, gs, inputs, lambda call: lambda x1, x2, s: call(x1, x2, [s], [s]))
    assert_like_lines(way, fs, gs, inputs, lambda call: lambda x1, x2, s: call(x1, x2, [s.exp()], [s, s.cos()]))


@ways
def test_a_side_input_may_appear_twice_or_be_a_stream(way: str) -> None:
    inputs = [leaf(3, 4), leaf(3, 4), leaf(3, 4)]
    fs, gs = side_mlps(3), mlps(3)
    assert_like_lines(way, fs, gs, inputs, lambda call: lambda x1, x2, s: call(x1, x2, [s, s]))
    assert_like_lines(way, fs, gs, inputs, lambda call: lambda x1, x2, s: call(x1, x2, [x1, x2]))
    assert_like_lines(way, fs, gs, inputs, lambda call: lambda x1, x2, s: call(x1, x2, [s[:, :1], s]))


@ways
def test_side_inputs_may_nest_and_hold_what_is_no_tensor(way: str) -> None:
    def f(x: Tensor, side: Any) -> Tensor:
        a, (b, mask) = side["a"], side["more"]
        return torch.where(mask, x * a, b) * side["scale"] if side["name"] == "f" else x

    def wrap(call: Any) -> Any:
        mask = torch.arange(4) % 2 == 0
        return lambda x1, x2, a, b: call(x1, x2, {"a": a, "more": (b, mask), "scale": 0.5, "name": "f", "none": None})

    assert_like_lines(way, [f] * 3, mlps(3), [leaf(3, 4) for _ in range(4)], wrap)


@ways
def test_a_tensor_alone_may_be_the_side_input(way: str) -> None:
    def f(x: Tensor, side: Tensor) -> Tensor:
        return torch.tanh(x * side)

    assert_like_lines(way, [f] * 3, mlps(3), [leaf(3, 4) for _ in range(3)])


@ways
def test_a_side_input_may_alone_need_a_gradient(way: str) -> None:
    fs, gs = side_mlps(3).requires_grad_(False), mlps(3).requires_grad_(False)
    inputs = [torch.randn(3, 4), torch.randn(3, 4), leaf(3, 4)]
    assert_like_lines(way, fs, gs, inputs, lambda call: lambda x1, x2, s: call(x1, x2, [s]))


# --- functions
@ways
def test_tensors_that_f_closes_over_get_their_gradients(way: str) -> None:
    def wrap(name: str) -> Any:
        def program(x1: Tensor, x2: Tensor, w: Tensor) -> Pair:
            z = w.exp()  # not a leaf
            f = [lambda x: torch.tanh(x @ w) * z] * 3
            g = [lambda x, z=z: torch.sin(x) * z[0]] * 3
            return lines(f, g)(x1, x2) if name == "lines" else block(name, f, g)(x1, x2)

        return program

    inputs = [leaf(4, 4), leaf(4, 4), leaf(4, 4)]
    assert_steps(wrap(way), outcome(wrap("lines"), inputs), inputs)


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
    assert_like_lines(way, [f] * 3, mlps(3), [leaf(3, 4), leaf(3, 4)])
    assert_like_lines(way, [f] * 3, [f] * 3, [leaf(3, 4), leaf(3, 4)])


@ways
def test_f_may_return_a_parameter_expanded_over_the_batch(way: str) -> None:
    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.bias.expand_as(x)

    assert_like_lines(way, [Bias() for _ in range(3)], mlps(3), [leaf(3, 4), leaf(3, 4)])


@ways
def test_f_may_write_to_its_own_temporaries(way: str) -> None:
    def f(x: Tensor) -> Tensor:
        h = x * 2
        h.add_(1).tanh_()
        h = h * 3
        h[:, 0] = 0
        return h.relu_()

    assert_like_lines(
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
    assert_like_lines(way, fs, gs, [x1, x2])


@ways
def test_nothing_that_needs_a_gradient_is_fine(way: str) -> None:
    fs, gs = mlps(2).requires_grad_(False), mlps(2).requires_grad_(False)
    x = torch.randn(3, 4), torch.randn(3, 4)
    y = block(way, fs, gs)(*x)
    assert not y[0].requires_grad and not y[1].requires_grad
    assert all(torch.equal(a, b) for a, b in zip(y, lines(fs, gs)(*x), strict=True))

"""Tensors that are written to or swapped, by functions or between forward and backward: blocks train as plain code."""

# pyright: reportUnknownLambdaType=false
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import WAYS, block, both, fp64 as fp64, leaf, lines, loss_of
from steps import Functions, assert_steps_like_lines, raised, run
from torch import Tensor, nn


ways = pytest.mark.parametrize("way", WAYS)
Spoil = Callable[[Any], object]


class Smooth(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).tanh()


def smooth() -> Functions:
    return [Smooth() for _ in range(3)], [Smooth() for _ in range(3)]


# --- written between forward and backward
SPOILS: dict[str, Spoil] = {
    "weight in place": lambda m: m.weight.detach().mul_(2),
    "weight storage swapped": lambda m: setattr(m.weight, "data", m.weight.detach() * 2),
    "bias storage swapped": lambda m: setattr(m.bias, "data", m.bias.detach() + 1),
    "an optimizer's step": lambda m: nn.init.normal_(m.weight),
    "weights loaded": lambda m: m.load_state_dict(nn.Linear(4, 4).state_dict()),
    "another weight": lambda m: setattr(m, "weight", nn.Parameter(torch.randn(4, 4))),
}


@ways
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("spoil", SPOILS)
def test_weight_changed_between_forward_and_backward(way: str, spoil: str, layer: int) -> None:
    found = assert_steps_like_lines(
        way, smooth, [leaf(3, 4), leaf(3, 4)], lambda functions, _: SPOILS[spoil](functions[0][layer])
    )
    assert raised(found) == [spoil in ("weight in place", "an optimizer's step", "weights loaded")] * len(found)


@ways
@pytest.mark.parametrize("layer", [0, 2])
def test_bias_written_between_forward_and_backward_is_noticed(way: str, layer: int) -> None:
    """Autograd saves no bias; a replay reads it."""
    assert_steps_like_lines(
        way,
        smooth,
        [leaf(3, 4), leaf(3, 4)],
        lambda functions, _: functions[0][layer].bias.detach().add_(1),
        may_raise=True,
    )


@ways
def test_weights_whose_storage_is_swapped_twice(way: str) -> None:
    def swap(functions: Functions, outputs: Sequence[Tensor]) -> None:
        for m in (*functions[0], *functions[1]):
            address = m.weight.data_ptr()
            for _ in range(20):  # until a copy gets the address that the original had
                m.weight.data = m.weight.detach() * 1.5
                if m.weight.data_ptr() == address:
                    break

    assert_steps_like_lines(way, smooth, [leaf(3, 4), leaf(3, 4)], swap)


class Scaled(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale: Tensor
        self.register_buffer("scale", torch.rand(width))
        self.table = torch.rand(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.scale + self.table)


BUFFERS: dict[str, Spoil] = {
    "factor in place": lambda m: m.scale.mul_(2),
    "another factor": lambda m: setattr(m, "scale", torch.ones_like(m.scale)),
    "addend in place": lambda m: m.table.mul_(2),
    "addend's storage swapped": lambda m: setattr(m.table, "data", torch.ones_like(m.table)),
}


@ways
@pytest.mark.parametrize("width", [4, 5000])
@pytest.mark.parametrize("spoil", BUFFERS)
def test_buffer_changed_between_forward_and_backward(way: str, spoil: str, width: int) -> None:
    for layer in range(3):
        assert_steps_like_lines(
            way,
            lambda: ([Scaled(width) for _ in range(3)], [Scaled(width) for _ in range(3)]),
            [leaf(2, width), leaf(2, width)],
            lambda functions, _, layer=layer: BUFFERS[spoil](functions[0][layer]),
            may_raise=spoil == "addend in place",  # autograd saves no addend; a replay reads it
        )


@ways
def test_storage_of_a_buffer_swapped_before_the_backward_is_not_seen_as_with_any_saved_tensor_hooks(way: str) -> None:
    layers = [Scaled(4) for _ in range(6)]
    scales = [m.scale.clone() for m in layers]
    a, b = leaf(2, 4), leaf(2, 4)
    want = torch.autograd.grad(loss_of(lines(layers[:3], layers[3:])(a, b)), [a, b])
    run = block(way, layers[:3], layers[3:])
    for _ in range(3):
        out = run(a, b)
        for m in layers:
            m.scale.data = torch.ones_like(m.scale)
        got = torch.autograd.grad(loss_of(out), [a, b])
        assert all(map(torch.equal, got, want))
        for m, scale in zip(layers, scales, strict=True):
            m.scale.data = scale.clone()


class Namespace:
    scale: Tensor


@ways
@pytest.mark.parametrize("what", ["side", "side of a leaf", "in a namespace", "closure", "nested closure"])
def test_another_tensor_that_f_reads_written_between_forward_and_backward(way: str, what: str) -> None:
    scales: list[Tensor] = []  # of this step

    def with_side(x: Tensor, side: Any) -> Tensor:
        return torch.sin(x * (side.scale if isinstance(side, Namespace) else side[0]) + 1)

    def without(x: Tensor) -> Tensor:
        return torch.sin(x * scales[-1] + 1)

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def program(x1: Tensor, x2: Tensor, a: Tensor) -> Any:
            scales.append(a if what == "side of a leaf" else a.exp())
            side: Any = None
            if what.startswith("side"):
                side = [scales[-1]]
            elif what == "in a namespace":
                side = Namespace()
                side.scale = scales[-1]
            return call(x1, x2, side)

        return program

    f: Any = with_side
    if "closure" in what:
        f = without if what == "closure" else lambda x: without(x)
    found = assert_steps_like_lines(
        way,
        lambda: ([f] * 3, [torch.sin] * 3),
        [leaf(3, 4), leaf(3, 4), leaf(3, 4)],
        lambda *_: scales[-1].detach().mul_(2),
        wrap=wrap,
    )
    assert all(raised(found))


class Scale:
    def __init__(self) -> None:
        self.scale = leaf(3, 4)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.sin(x * self.scale + self.scale)


@ways
@pytest.mark.parametrize("how", ["callable", "bound method"])
def test_tensor_of_an_object_that_is_no_module_written_between_forward_and_backward(way: str, how: str) -> None:
    objects: list[Scale] = []

    def make() -> Functions:
        objects[:] = [Scale() for _ in range(3)]
        f: list[Any] = [*objects] if how == "callable" else [o.__call__ for o in objects]
        return f, [torch.sin] * 3

    found = assert_steps_like_lines(way, make, [leaf(3, 4), leaf(3, 4)], lambda *_: objects[1].scale.detach().mul_(2))
    assert all(raised(found))


@ways
@pytest.mark.parametrize("which", [0, 1])
def test_output_written_in_place_before_the_backward(way: str, which: int) -> None:
    """Autograd saves y1, and no y2; from the second step on a block holds copies of both."""

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def program(*x: Tensor) -> Any:
            y = call(*x)
            y[which].mul_(2)
            return y

        return program

    sines, inputs = [torch.sin] * 3, [leaf(3, 4), leaf(3, 4)]
    if which == 1:
        assert_steps_like_lines(way, lambda: (sines, sines), inputs, wrap=wrap)
        return
    found, _ = run(lambda functions: wrap(block(way, *functions)), lambda: (sines, sines), inputs)
    assert not any(raised(found)[1:])


@ways
@pytest.mark.parametrize("which", [0, 1])
def test_input_written_in_place_before_the_backward(way: str, which: int) -> None:
    given: list[Tensor] = []

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def program(*x: Tensor) -> Any:
            given[:] = x
            return call(*x)

        return program

    sines = [torch.sin] * 3
    assert_steps_like_lines(
        way, lambda: (sines, sines), [leaf(3, 4), leaf(3, 4)], lambda *_: given[which].detach().mul_(2), wrap=wrap
    )


@ways
def test_error_in_the_backward_leaves_the_rest_of_the_program_usable(way: str) -> None:
    steps: list[int] = []

    def write_in_every_second(functions: Functions, _: Sequence[Tensor]) -> None:
        steps.append(1)
        if len(steps) % 2:
            functions[0][1].weight.detach().mul_(2)

    def make() -> Functions:
        steps.clear()
        return smooth()

    found = assert_steps_like_lines(way, make, [leaf(3, 4), leaf(3, 4)], write_in_every_second)
    assert raised(found) == [True, False, True]


# --- written by f
def times_one(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a program that may write to its inputs, which are no leaves."""
    return lambda x1, x2, *more: call(x1 * 1, x2 * 1, *more)


def writes(x: Tensor) -> Tensor:
    return x.mul_(0.5).sin()


@ways
@pytest.mark.parametrize(("name", "layer"), [("f", 0), ("f", 2), ("g", 0), ("g", 1)])
def test_function_that_writes_to_its_input(way: str, name: str, layer: int) -> None:
    functions: dict[str, list[Any]] = {"f": [torch.sin] * 3, "g": [torch.sin] * 3}
    functions[name][layer] = writes
    assert_steps_like_lines(way, lambda: (functions["f"], functions["g"]), [leaf(3, 4), leaf(3, 4)], wrap=times_one)


@ways
def test_function_that_writes_to_a_view_of_its_input(way: str) -> None:
    f: list[Any] = [torch.sin, nn.Sequential(nn.Flatten(0), nn.ReLU(inplace=True), nn.Unflatten(0, (3, 4)))]
    assert_steps_like_lines(way, lambda: (f, [torch.cos] * 2), [leaf(3, 4), leaf(3, 4)], wrap=times_one)


@ways
@pytest.mark.parametrize("copied", [False, True])
def test_function_that_writes_to_its_side_input(way: str, copied: bool) -> None:
    side = torch.ones(4)

    def f(x: Tensor, side: list[Tensor]) -> Tensor:
        side[0].add_(1)
        return x * (side[0].clone() if copied else side[0])

    def make() -> Functions:
        side.fill_(1)
        return [f] * 2, [lambda x: torch.sin(x)] * 2

    found = assert_steps_like_lines(
        way,
        make,
        [leaf(3, 4), leaf(3, 4)],
        wrap=lambda call: lambda *x: call(*x, [side]),
        state=lambda _: side.clone(),
    )
    assert all(raised(found)) == (not copied)


@ways
@pytest.mark.parametrize("last", [False, True])
def test_function_that_writes_over_a_saved_tensor(way: str, last: bool) -> None:
    def f(x: Tensor) -> Tensor:
        h = x.exp()  # saves its result
        h.mul_(0.1)
        return h if last else h.sin()

    found = assert_steps_like_lines(way, lambda: ([f] * 2, [torch.sin] * 2), [leaf(3, 4), leaf(3, 4)])
    assert all(raised(found))


class Clipping(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.mul_(0.9)
        return super().forward(input).tanh()


@ways
def test_function_that_writes_to_a_weight(way: str) -> None:
    assert_steps_like_lines(
        way,
        lambda: ([Clipping(4, 4) for _ in range(2)], [torch.sin] * 2),
        [leaf(3, 4), leaf(3, 4)],
        state=lambda functions: [f.weight.detach() for f in functions[0]],
    )


# --- functions that are another one in each call
@ways
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("period", [1, 2, 5])
def test_function_that_changes_from_call_to_call(way: str, period: int, layer: int) -> None:
    calls: list[int] = []

    def moody(x: Tensor) -> Tensor:
        calls.append(1)
        return x.sin().cos() if len(calls) // period % 2 else x.sin().exp().cos()

    def make() -> Functions:
        calls.clear()
        f: list[Any] = [torch.sin] * 3
        f[layer] = moody
        return f, [torch.sin] * 3

    assert_steps_like_lines(way, make, [leaf(3, 4), leaf(3, 4)], state=lambda _: len(calls), count=8)


@ways
def test_parameters_frozen_between_forward_and_backward(way: str) -> None:
    def freeze(functions: Functions, _: Sequence[Tensor]) -> None:
        both(*functions).requires_grad_(False)

    def thawed() -> Functions:
        functions = smooth()
        for m in both(*functions):
            m.register_forward_pre_hook(lambda m, _: m.requires_grad_(True) and None)
        return functions

    assert_steps_like_lines(way, thawed, [leaf(3, 4), leaf(3, 4)], freeze)

"""`rev_block` and `RevBlock` never hand back a wrong gradient, whatever is written when, and by whom."""

# pyright: reportUnknownLambdaType=false
from __future__ import annotations

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
    relative_error,
    unseen,
)
from torch import Tensor, nn

from revfx import NotReversibleError, RevBlock, RevfxError, rev_block
from revfx.eager.modes import store_activations


ways = pytest.mark.parametrize("way", WAYS)


def assert_right_or_raises(
    call: Callable[..., Pair],
    plain: Callable[..., Pair],
    tensors: Sequence[Tensor],
    spoil: Callable[[Pair], object],
) -> bool:
    """Whether the backward raises RevfxError after `spoil(outputs)`; if not, its gradients are right."""
    expected = torch.autograd.grad(loss_of(plain()), tensors, allow_unused=True, retain_graph=True)
    y = call()
    loss = loss_of(y)
    spoil(y)
    try:
        got = torch.autograd.grad(loss, tensors, allow_unused=True)
    except RevfxError:
        return True
    assert relative_error(got, expected) < 1e-9
    return False


# --- written between forward and backward
SPOILS: dict[str, Callable[[nn.Linear], object]] = {
    "weight in place": lambda m: m.weight.detach().mul_(2),
    "bias in place": lambda m: m.bias.detach().add_(1),
    "weight storage swapped": lambda m: setattr(m.weight, "data", m.weight.detach() * 2),
    "bias storage swapped": lambda m: setattr(m.bias, "data", m.bias.detach() + 1),
    "an optimizer's step": lambda m: nn.init.normal_(m.weight),
    "weights loaded": lambda m: m.load_state_dict(nn.Linear(4, 4).state_dict()),
}


class Smooth(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).tanh()


@ways
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("spoil", SPOILS)
def test_a_weight_written_between_forward_and_backward_raises(way: str, spoil: str, layer: int) -> None:
    fs, gs = [Smooth() for _ in range(3)], [Smooth() for _ in range(3)]
    loss = loss_of(block(way, fs, gs)(leaf(3, 4), leaf(3, 4)))
    SPOILS[spoil](fs[layer])
    with pytest.raises(RevfxError, match="between the forward and the backward"):
        loss.backward()


@ways
def test_a_weight_whose_storage_is_swapped_twice_raises(way: str) -> None:
    fs, gs = [Smooth() for _ in range(3)], [Smooth() for _ in range(3)]
    loss = loss_of(block(way, fs, gs)(leaf(3, 4), leaf(3, 4)))
    for m in (*fs, *gs):
        address = m.weight.data_ptr()
        for _ in range(20):  # until a copy gets the address that the original had
            m.weight.data = m.weight.detach() * 1.5
            if m.weight.data_ptr() == address:
                break
    with pytest.raises(RevfxError):  # the address tells, or else what comes back
        loss.backward()


@ways
def test_a_weight_put_back_by_identity_does_not_raise(way: str) -> None:
    fs, gs = [Smooth() for _ in range(3)], [Smooth() for _ in range(3)]
    x = leaf(3, 4), leaf(3, 4)
    expected = torch.autograd.grad(loss_of(lines(fs, gs)(*x)), x)
    loss = loss_of(block(way, fs, gs)(*x))
    own, fs[1].weight = fs[1].weight, nn.Parameter(torch.randn(4, 4))
    assert relative_error(torch.autograd.grad(loss, x), expected) < 1e-9
    assert fs[1].weight is not own


@ways
@pytest.mark.parametrize("width", [4, 5000])
def test_a_buffer_written_between_forward_and_backward_raises_or_does_not_matter(way: str, width: int) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale: Tensor
            self.register_buffer("scale", torch.rand(width))
            self.table = torch.rand(width)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x * self.scale + self.table)

    fs, gs = [Scaled() for _ in range(3)], [Scaled() for _ in range(3)]
    x = [leaf(2, width), leaf(2, width)]
    spoils: list[Callable[[Pair], object]] = [
        lambda y: fs[1].scale.mul_(2),
        lambda y: fs[0].table.mul_(2),
        lambda y: setattr(fs[2].scale, "data", torch.ones(width)),
        lambda y: setattr(fs[2], "scale", torch.ones(width)),
    ]
    for spoil in spoils:
        assert_right_or_raises(lambda: block(way, fs, gs)(*x), lambda: lines(fs, gs)(*x), x, spoil)


@ways
@pytest.mark.parametrize("what", ["side", "side of a leaf", "in a namespace", "closure", "nested closure"])
def test_another_tensor_that_f_reads_written_between_forward_and_backward_raises(way: str, what: str) -> None:
    class Namespace:
        scale: Tensor

    a = leaf(3, 4)
    scale = a if what == "side of a leaf" else a.exp()
    namespace = Namespace()
    namespace.scale = scale

    def with_side(x: Tensor, side: Any) -> Tensor:
        return torch.sin(x * (side.scale if isinstance(side, Namespace) else side[0]) + 1)

    def without(x: Tensor) -> Tensor:
        return torch.sin(x * scale + 1)

    side: Any = None
    f: Any = with_side
    if what.startswith("side"):
        side = [scale]
    elif what == "in a namespace":
        side = namespace
    else:
        f = without if what == "closure" else lambda x: without(x)
    x = [leaf(3, 4), leaf(3, 4)]
    tensors = [*x, a]
    raised = assert_right_or_raises(
        lambda: block(way, [f] * 3, [torch.sin] * 3)(*x, side),
        lambda: lines([f] * 3, [torch.sin] * 3)(*x, side),
        tensors,
        lambda y: scale.detach().mul_(2),
    )
    assert raised


@ways
@pytest.mark.parametrize("how", ["callable", "bound method"])
def test_a_tensor_of_an_object_that_is_no_module_written_between_forward_and_backward_raises(
    way: str, how: str
) -> None:
    class Scale:
        def __init__(self) -> None:
            self.scale = leaf(3, 4)

        def __call__(self, x: Tensor) -> Tensor:
            return torch.sin(x * self.scale + self.scale)

    objects = [Scale() for _ in range(3)]
    f: Any = objects if how == "callable" else [o.__call__ for o in objects]
    x = [leaf(3, 4), leaf(3, 4)]
    assert assert_right_or_raises(
        lambda: block(way, f, [torch.sin] * 3)(*x),
        lambda: lines(f, [torch.sin] * 3)(*x),
        [*x, *(o.scale for o in objects)],
        lambda y: objects[1].scale.detach().mul_(2),
    )


@ways
@pytest.mark.parametrize("which", [0, 1])
def test_an_output_written_in_place_before_the_backward_raises(way: str, which: int) -> None:
    x = leaf(3, 4), leaf(3, 4)
    y = block(way, [torch.sin] * 3, [torch.sin] * 3)(*x)
    y[which].mul_(2)
    with pytest.raises(RevfxError, match=f"y{which + 1}"):
        loss_of(y).backward()


@ways
@pytest.mark.parametrize("which", [0, 1])
def test_an_input_written_in_place_before_the_backward_raises_or_does_not_matter(way: str, which: int) -> None:
    x = [leaf(3, 4), leaf(3, 4)]
    f = [torch.sin] * 3
    expected = torch.autograd.grad(loss_of(lines(f, f)(*x)), x)
    loss = loss_of(block(way, f, f)(*x))
    x[which].detach().mul_(2)
    try:
        assert relative_error(torch.autograd.grad(loss, x), expected) < 1e-9
    except RevfxError as error:
        assert f"x{which + 1}" in str(error)


@ways
def test_an_error_in_the_backward_leaves_the_rest_of_the_program_usable(way: str) -> None:
    fs, gs = [Smooth() for _ in range(3)], [Smooth() for _ in range(3)]
    call = block(way, fs, gs)
    loss = loss_of(call(leaf(3, 4), leaf(3, 4)))
    fs[1].weight.detach().mul_(2)
    with pytest.raises(RevfxError):
        loss.backward()
    both(fs, gs).zero_grad()
    assert_like_lines(way, fs, gs, [leaf(3, 4), leaf(3, 4)])


# --- written by f
def writes(x: Tensor) -> Tensor:
    return x.mul_(0.5).sin()


@ways
@pytest.mark.parametrize(("name", "layer"), [("f", 0), ("f", 2), ("g", 0), ("g", 1)])
def test_a_function_that_writes_to_its_input_is_named_with_its_layer(way: str, name: str, layer: int) -> None:
    functions: dict[str, list[Any]] = {"f": [torch.sin] * 3, "g": [torch.sin] * 3}
    functions[name][layer] = writes
    with pytest.raises(NotReversibleError, match=f"`{name} of layer {layer}`.*in place"):
        block(way, functions["f"], functions["g"])(leaf(3, 4) * 1, leaf(3, 4) * 1)


@ways
def test_a_function_that_writes_to_a_view_of_its_input_is_refused_too(way: str) -> None:
    f: list[Any] = [torch.sin, nn.Sequential(nn.Flatten(0), nn.ReLU(inplace=True), nn.Unflatten(0, (3, 4)))]
    with pytest.raises(NotReversibleError, match="`f of layer 1`"):
        block(way, f, [torch.sin] * 2)(leaf(3, 4), leaf(3, 4))


@ways
def test_a_function_that_writes_to_its_side_input_is_refused(way: str) -> None:
    def f(x: Tensor, side: list[Tensor]) -> Tensor:
        side[0].add_(1)
        return x * side[0]

    with pytest.raises(NotReversibleError, match="`f of layer 0`"):
        block(way, [f] * 2, [torch.sin] * 2)(leaf(3, 4), leaf(3, 4), [torch.ones(4)])


@ways
@pytest.mark.parametrize("last", [False, True])
def test_a_function_that_spoils_what_autograd_saved_raises_as_plain_code_does(way: str, last: bool) -> None:
    def f(x: Tensor) -> Tensor:
        h = x.exp()  # saves its result
        h.mul_(0.1)
        return h if last else h.sin()

    x = leaf(3, 4), leaf(3, 4)
    with pytest.raises(RuntimeError, match="inplace"):
        loss_of(lines([f] * 2, [torch.sin] * 2)(*x)).backward()
    with pytest.raises(RuntimeError, match=r"in.?place"):
        loss_of(block(way, [f] * 2, [torch.sin] * 2)(*x)).backward()


@ways
def test_a_function_that_writes_to_a_weight_gives_the_right_gradient_or_raises(way: str) -> None:
    class Clipping(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            with torch.no_grad():
                self.weight.mul_(0.9)
            return super().forward(input).tanh()

    fs = [Clipping(4, 4) for _ in range(2)]
    x = [leaf(3, 4), leaf(3, 4)]
    weights = [f.weight.detach().clone() for f in fs]
    expected = torch.autograd.grad(loss_of(lines(fs, [torch.sin] * 2)(*x)), [*x, *(f.weight for f in fs)])
    after = [f.weight.detach().clone() for f in fs]
    for f, w in zip(fs, weights, strict=True):
        f.weight.data.copy_(w)
    try:
        got = torch.autograd.grad(loss_of(block(way, fs, [torch.sin] * 2)(*x)), [*x, *(f.weight for f in fs)])
    except RevfxError:
        return
    assert relative_error(got, expected) < 1e-9
    assert all(torch.equal(f.weight, w) for f, w in zip(fs, after, strict=True))


# --- what a function may not do
@ways
@pytest.mark.parametrize("name", ["f", "g"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    ("wrong", "shapes"), [(lambda x: x[:1], r"\(1, 4\).*\(3, 4\)"), (lambda x: x.sum(), r"\(\).*\(3, 4\)")]
)
def test_a_changed_shape_is_refused_even_where_it_broadcasts(
    way: str, name: str, layer: int, wrong: Any, shapes: str
) -> None:
    functions: dict[str, list[Any]] = {"f": [torch.sin] * 2, "g": [torch.sin] * 2}
    functions[name][layer] = wrong
    call = block(way, functions["f"], functions["g"])
    with pytest.raises(ValueError, match=f"`{name}` of layer {layer}.*{shapes}"):
        call(leaf(3, 4), leaf(3, 4))
    with store_activations(), pytest.raises(ValueError, match=f"`{name}` of layer {layer}.*{shapes}"):
        call(leaf(3, 4), leaf(3, 4))


@ways
@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda x: x.double(), "float64"),
        (lambda x: torch.complex(x, x), "complex64"),
        (lambda x: torch.empty(3, 4, device="meta"), "meta"),
        (lambda x: (x, x), "tuple"),
        (lambda x: None, "NoneType"),
    ],
    ids=["wider", "complex", "device", "tuple", "None"],
)
def test_another_dtype_device_or_type_is_refused(way: str, wrong: Any, text: str) -> None:
    call = block(way, [torch.sin, torch.sin], [torch.sin, wrong])
    with pytest.raises((ValueError, TypeError), match=f"`g`? of layer 1`? .*{text}"):
        call(leaf(3, 4, dtype=torch.float32), leaf(3, 4, dtype=torch.float32))


@ways
@pytest.mark.parametrize("name", ["f", "g"])
@pytest.mark.parametrize("given", [0, 1, 3])
def test_a_sequence_of_the_wrong_length_is_refused_with_both_lengths(way: str, name: str, given: int) -> None:
    functions: dict[str, Any] = {"f": torch.sin, "g": torch.sin, name: [torch.sin] * given}
    with pytest.raises(ValueError, match=f"`{name}` .*{given}.*`num_layers` is 2"):
        if way == "RevBlock":
            RevBlock(functions["f"], functions["g"], 2)
        else:
            rev_block(leaf(3, 4), leaf(3, 4), functions["f"], functions["g"], 2)


@ways
def test_a_negative_number_of_layers_and_what_cannot_be_called_are_refused(way: str) -> None:
    def call(f: Any, layers: int) -> Any:
        x = leaf(3, 4), leaf(3, 4)
        return RevBlock(f, torch.sin, layers)(*x) if way == "RevBlock" else rev_block(*x, f, torch.sin, layers)

    with pytest.raises(ValueError, match=r"num_layers.*-1"):
        call(torch.sin, -1)
    with pytest.raises(TypeError, match=r"`f`.*int"):
        call(3, 2)
    with pytest.raises(TypeError, match=r"`f`.*layer 1.*NoneType"):
        call([torch.sin, None], 2)


def test_a_factory_that_makes_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"`g`.*Tensor"):
        RevBlock(mlp, lambda: torch.ones(4), 2)


@ways
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex128])
@pytest.mark.parametrize("name", ["x1", "x2"])
def test_a_stream_that_is_not_floating_point_is_refused_where_a_gradient_is_needed(
    way: str, dtype: torch.dtype, name: str
) -> None:
    streams = {"x1": leaf(3, 4), "x2": leaf(3, 4), name: torch.ones(3, 4, dtype=dtype)}
    call = block(way, [mlp()], [mlp()])
    with pytest.raises(TypeError, match=f"`{name}`.*{str(dtype).split('.')[1]}"):
        call(streams["x1"], streams["x2"])
    if dtype.is_complex:
        with pytest.raises(TypeError, match="`x1`"):
            call(*[torch.ones(3, 4, dtype=dtype).requires_grad_()] * 2)


@ways
def test_integer_and_complex_streams_work_where_nothing_needs_a_gradient(way: str) -> None:
    double = [lambda x: x * 2] * 2
    call = block(way, double, double)
    for x in (torch.arange(4), torch.ones(4, dtype=torch.complex64)):
        assert all(torch.equal(a, b) for a, b in zip(call(x, x), lines(double, double)(x, x), strict=True))
    weight = torch.randn(4, 4, dtype=torch.complex128).requires_grad_()
    linear: list[Any] = [lambda x: x @ weight] * 2
    with torch.no_grad():
        x = torch.ones(4, dtype=torch.complex128)
        assert torch.equal(block(way, linear, linear)(x, x)[0], lines(linear, linear)(x, x)[0])


@ways
@pytest.mark.parametrize("layer", [0, 2])
def test_a_function_that_saves_other_tensors_when_run_again_raises(way: str, layer: int) -> None:
    calls = unseen()

    def moody(x: Tensor) -> Tensor:
        calls.values.append(1)
        return x.sin().cos() if len(calls.values) == 1 else x.sin().exp().cos()

    f: list[Any] = [torch.sin] * 3
    f[layer] = moody
    loss = loss_of(block(way, f, [torch.sin] * 3)(leaf(3, 4), leaf(3, 4)))
    with pytest.raises(RevfxError, match=f"`f of layer {layer}`.*run again"):
        loss.backward()


@ways
@pytest.mark.parametrize("rows", [1, 2])
def test_a_function_that_returns_another_shape_when_run_again_raises(way: str, rows: int) -> None:
    calls = unseen()

    def moody(x: Tensor) -> Tensor:
        calls.values.append(1)
        return x.sin()[: 3 if len(calls.values) == 1 else rows]

    loss = loss_of(block(way, [torch.sin, moody, torch.sin], [torch.sin] * 3)(leaf(3, 4), leaf(3, 4)))
    with pytest.raises(RevfxError, match=r"`f of layer 1`.*run again"):
        loss.backward()


@ways
def test_parameters_frozen_between_forward_and_backward_raise_or_do_not_matter(way: str) -> None:
    fs, gs = [Smooth() for _ in range(3)], [Smooth() for _ in range(3)]
    x = [leaf(3, 4), leaf(3, 4)]
    assert_right_or_raises(
        lambda: block(way, fs, gs)(*x),
        lambda: lines(fs, gs)(*x),
        x,
        lambda y: both(fs, gs).requires_grad_(False),
    )

"""`rev_block` and `RevBlock`: the program is left as plain training leaves it, and a wrong gradient is never handed back."""

from __future__ import annotations

import gc
import weakref
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
from torch.nn.utils.parametrizations import spectral_norm

from revfx import NotReversibleError, RevBlock, RevfxError, rev_block
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


def assert_like_by_hand(way: str, fs: Any, gs: Any, inputs: Sequence[Tensor]) -> None:
    module = nn.ModuleList(m for m in (*fs, *gs) if isinstance(m, nn.Module))
    expected = outcome(lambda *x: by_hand(*x, fs, gs), inputs, module)
    assert_same(outcome(block(way, fs, gs), inputs, module), expected)
    assert_like_stored(block(way, fs, gs), inputs, module)


def assert_right_or_raises(
    call: Callable[..., Pair],
    lines: Callable[..., Pair],
    tensors: Sequence[Tensor],
    spoil: Callable[[Pair], object],
) -> bool:
    """After `spoil(outputs)` the backward raises RevfxError (True) or gives the unspoilt gradients (False)."""
    expected = torch.autograd.grad(loss_of(lines()), tensors, allow_unused=True, retain_graph=True)
    y = call()
    loss = loss_of(y)
    spoil(y)
    try:
        got = torch.autograd.grad(loss, tensors, allow_unused=True)
    except RevfxError:
        return True
    assert relative_error(got, expected) < 1e-9
    return False


# --- random numbers ---------------------------------------------------------------------------------------------------
@ways
def test_dropout_draws_the_same_mask_again_and_leaves_the_random_state_of_plain_code(way: str) -> None:
    fs, gs = (nn.ModuleList(nn.Sequential(mlp(), nn.Dropout(0.4)) for _ in range(4)) for _ in range(2))
    assert_like_by_hand(way, fs, gs, [leaf(3, 4), leaf(3, 4)])


@ways
def test_noise_in_some_layers_only_is_drawn_again_alike(way: str) -> None:
    def noisy(x: Tensor) -> Tensor:
        return torch.tanh(x + torch.randn_like(x)) * torch.rand(())

    assert_like_by_hand(
        way, [torch.sin, noisy, torch.sin, noisy], [noisy, torch.sin, torch.sin, noisy], [leaf(3, 4)] * 2
    )


@ways
def test_random_numbers_drawn_between_forward_and_backward_do_not_matter(way: str) -> None:
    fs, gs = (nn.ModuleList(nn.Sequential(mlp(), nn.Dropout(0.4)) for _ in range(3)) for _ in range(2))
    x1, x2 = leaf(3, 4), leaf(3, 4)
    tensors = [x1, x2, *both(fs, gs).parameters()]
    torch.manual_seed(5)
    expected = torch.autograd.grad(loss_of(by_hand(x1, x2, fs, gs)), tensors)
    torch.manual_seed(5)
    loss = loss_of(block(way, list(fs), list(gs))(x1, x2))
    torch.manual_seed(9)
    torch.randn(7)
    state = torch.get_rng_state()
    assert relative_error(torch.autograd.grad(loss, tensors), expected) < 1e-9
    assert torch.equal(torch.get_rng_state(), state)


# --- buffers ----------------------------------------------------------------------------------------------------------
@ways
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_updates_its_running_statistics_once(
    way: str, training: bool, momentum: float | None
) -> None:
    fs, gs = (
        nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=momentum), nn.Tanh()) for _ in range(3)
        )
        for _ in range(2)
    )
    both(fs, gs).train(training)
    assert_like_by_hand(way, fs, gs, [leaf(5, 4), leaf(5, 4)])
    y = block(way, list(fs), list(gs))(leaf(5, 4), leaf(5, 4))
    assert [int(f[1].num_batches_tracked) for f in fs] == [int(training)] * 3  # type: ignore[index]
    loss_of(y).backward()
    assert [int(f[1].num_batches_tracked) for f in fs] == [int(training)] * 3  # type: ignore[index]


@ways
def test_one_batch_norm_shared_by_layers_is_updated_as_often_as_plain_code_does(way: str) -> None:
    f = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert_like_by_hand(way, [f] * 3, [f] * 3, [leaf(5, 4), leaf(5, 4)])


@ways
def test_a_wide_batch_norm_works_too(way: str) -> None:
    fs, gs = ([nn.BatchNorm1d(5000) for _ in range(2)] for _ in range(2))
    assert_like_by_hand(way, fs, gs, [leaf(3, 5000), leaf(3, 5000)])


@ways
def test_buffers_keep_their_identity(way: str) -> None:
    module = RevBlock(lambda: nn.BatchNorm1d(4), lambda: nn.BatchNorm1d(4), 2)
    before = {k: id(b) for k, b in module.named_buffers()}
    call = module if way == "RevBlock" else block(way, list(module.f), list(module.g))
    loss_of(call(leaf(5, 4), leaf(5, 4))).backward()
    assert {k: id(b) for k, b in module.named_buffers()} == before


@ways
def test_spectral_norm_iterates_once_per_forward(way: str) -> None:
    fs, gs = ([spectral_norm(nn.Linear(4, 4)) for _ in range(3)] for _ in range(2))
    assert_like_by_hand(way, fs, gs, [leaf(5, 4), leaf(5, 4)])


class RunningScale(nn.Module):
    """Divides by a running norm, kept as a buffer or as an attribute, written in place or replaced."""

    def __init__(self, kind: str, width: int = 4) -> None:
        super().__init__()
        self.kind = kind
        self.inner = nn.Linear(width, width)
        self.running: Tensor
        if kind.startswith("buffer"):
            self.register_buffer("running", torch.ones(width))
        else:
            self.running = torch.ones(width)

    def forward(self, x: Tensor) -> Tensor:
        now = x.detach().abs().mean(0)
        if self.kind.endswith("replaced"):
            self.running = 0.9 * self.running + 0.1 * now
        else:
            self.running.mul_(0.9).add_(0.1 * now)
        return torch.tanh(self.inner(x / self.running.clone()))


@ways
@pytest.mark.parametrize("width", [4, 5000])
@pytest.mark.parametrize(
    "kind", ["buffer written", "buffer replaced", "attribute written", "attribute replaced"]
)
def test_state_that_f_updates_itself_is_updated_once(way: str, kind: str, width: int) -> None:
    def run(call: Any, scales: list[RunningScale]) -> tuple[list[Any], list[Tensor]]:
        x = [torch.linspace(0, 1, 2 * width).view(2, width).requires_grad_() for _ in range(2)]
        grads = torch.autograd.grad(loss_of(call(*x)), x)
        return list(grads), [s.running for s in scales]

    def fresh() -> list[RunningScale]:
        made = [RunningScale(kind, width) for _ in range(2)]
        for m in made:
            m.inner = nn.Identity() if width > 4 else nn.Linear(4, 4, bias=False)  # type: ignore[assignment]
            for p in m.inner.parameters():
                nn.init.eye_(p)
        return made

    scales, plain = fresh(), fresh()
    got, left = run(block(way, scales, [torch.sin] * 2), scales)
    expected, plainly_left = run(lambda *x: by_hand(*x, plain, [torch.sin] * 2), plain)
    assert relative_error(got, expected) < 1e-9
    assert all(torch.equal(a, b) for a, b in zip(left, plainly_left, strict=True))


@ways
def test_a_loss_that_f_leaves_as_an_attribute_gets_its_gradient(way: str) -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()
            self.extra = torch.zeros(())

        def forward(self, x: Tensor) -> Tensor:
            h = self.inner(x)
            self.extra = h.square().mean()
            return h

    fs, gs = [Auxiliary() for _ in range(3)], mlps(3)

    def program(call: Any) -> Any:
        return lambda *x: [*call(*x), *(f.extra for f in fs)]

    inputs = [leaf(3, 4), leaf(3, 4)]
    expected = outcome(program(lambda *x: by_hand(*x, fs, gs)), inputs, both(fs, gs))
    for _ in range(2):
        assert_same(outcome(program(block(way, fs, list(gs))), inputs, both(fs, gs)), expected)


class Generated(nn.Module):
    """Reads a weight that something else made and set as an attribute."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.zeros(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight)


@ways
@pytest.mark.parametrize("width", [4, 70])
def test_generated_weights_set_as_attributes_get_their_gradients(way: str, width: int) -> None:
    fs, gs = [Generated(width) for _ in range(3)], [Generated(width) for _ in range(3)]

    def program(call: Any) -> Any:
        def run(x: Tensor, seed: Tensor) -> Pair:
            for i, m in enumerate((*fs, *gs)):
                m.weight = torch.sin(seed * (i + 1)) / width
            return call(x, x)

        return run

    inputs = [leaf(3, width), leaf(width, width)]
    expected = outcome(program(lambda *x: by_hand(*x, fs, gs)), inputs)
    assert_same(outcome(program(block(way, fs, gs)), inputs), expected)


@ways
def test_state_that_f_carries_from_layer_to_layer_with_its_gradient_works_or_raises(way: str) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.state = torch.zeros(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.state = torch.tanh(x + self.state)
            return self.state * 1

    def run(call: Any) -> list[Tensor]:
        f.state = torch.zeros(3, 4)
        return list(torch.autograd.grad(loss_of(call([f] * 4, [torch.sin] * 4)), x))

    f, x = Recurrent(), [leaf(3, 4), leaf(3, 4)]
    expected = run(lambda fs, gs: by_hand(*x, fs, gs))
    try:
        assert relative_error(run(lambda fs, gs: block(way, fs, gs)(*x)), expected) < 1e-9
    except RevfxError:
        assert torch.is_grad_enabled()


# --- written between forward and backward -----------------------------------------------------------------------------
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
    for _ in range(2):  # the second copy may get the address of the first
        for m in (*fs, *gs):
            m.weight.data = m.weight.detach() * 2
    with pytest.raises(RevfxError, match="between the forward and the backward"):
        loss.backward()


@ways
def test_a_weight_put_back_by_identity_does_not_raise(way: str) -> None:
    fs, gs = [Smooth() for _ in range(3)], [Smooth() for _ in range(3)]
    x = leaf(3, 4), leaf(3, 4)
    expected = torch.autograd.grad(loss_of(by_hand(*x, fs, gs)), x)
    loss = loss_of(block(way, fs, gs)(*x))
    own, fs[1].weight = fs[1].weight, nn.Parameter(torch.randn(4, 4))
    assert relative_error(torch.autograd.grad(loss, x), expected) < 1e-9
    assert fs[1].weight is not own


@ways
@pytest.mark.parametrize("width", [4, 5000])
def test_a_buffer_written_between_forward_and_backward_raises_or_does_not_matter(
    way: str, width: int
) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.rand(width))
            self.table = torch.rand(width)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x * self.scale + self.table)

    fs, gs = [Scaled() for _ in range(3)], [Scaled() for _ in range(3)]
    x = [leaf(2, width), leaf(2, width)]
    spoils: list[Callable[[Pair], object]] = [
        lambda y: fs[1].scale.mul_(2),  # type: ignore[operator]
        lambda y: fs[0].table.mul_(2),
        lambda y: setattr(fs[2].scale, "data", torch.ones(width)),
        lambda y: setattr(fs[2], "scale", torch.ones(width)),
    ]
    for spoil in spoils:
        assert_right_or_raises(lambda: block(way, fs, gs)(*x), lambda: by_hand(*x, fs, gs), x, spoil)


@ways
@pytest.mark.parametrize("what", ["side", "side of a leaf", "in a namespace", "closure", "nested closure"])
def test_another_tensor_that_f_reads_written_between_forward_and_backward_raises(way: str, what: str) -> None:
    class Namespace:
        pass

    a = leaf(3, 4)
    scale = a if what == "side of a leaf" else a.exp()
    namespace = Namespace()
    namespace.scale = scale  # type: ignore[attr-defined]

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
        lambda: by_hand(*x, [f] * 3, [torch.sin] * 3, side),
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
        lambda: by_hand(*x, f, [torch.sin] * 3),
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
def test_an_input_written_in_place_before_the_backward_raises_or_does_not_matter(
    way: str, which: int
) -> None:
    x = [leaf(3, 4), leaf(3, 4)]
    f = [torch.sin] * 3
    expected = torch.autograd.grad(loss_of(by_hand(*x, f, f)), x)
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
    assert_like_by_hand(way, fs, gs, [leaf(3, 4), leaf(3, 4)])


# --- written by f -----------------------------------------------------------------------------------------------------
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
        loss_of(by_hand(*x, [f] * 2, [torch.sin] * 2)).backward()
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
    expected = torch.autograd.grad(loss_of(by_hand(*x, fs, [torch.sin] * 2)), [*x, *(f.weight for f in fs)])
    after = [f.weight.detach().clone() for f in fs]
    for f, w in zip(fs, weights, strict=True):
        f.weight.data.copy_(w)
    try:
        got = torch.autograd.grad(loss_of(block(way, fs, [torch.sin] * 2)(*x)), [*x, *(f.weight for f in fs)])
    except RevfxError:
        return
    assert relative_error(got, expected) < 1e-9
    assert all(torch.equal(f.weight, w) for f, w in zip(fs, after, strict=True))


# --- what a function may not do ---------------------------------------------------------------------------------------
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
        return (
            RevBlock(f, torch.sin, layers)(*x) if way == "RevBlock" else rev_block(*x, f, torch.sin, layers)
        )

    with pytest.raises(ValueError, match="num_layers.*-1"):
        call(torch.sin, -1)
    with pytest.raises(TypeError, match="`f`.*int"):
        call(3, 2)
    with pytest.raises(TypeError, match="`f`.*layer 1.*NoneType"):
        call([torch.sin, None], 2)


def test_a_factory_that_makes_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match="`g`.*Tensor"):
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
        assert all(torch.equal(a, b) for a, b in zip(call(x, x), by_hand(x, x, double, double), strict=True))
    weight = torch.randn(4, 4, dtype=torch.complex128).requires_grad_()
    linear: list[Any] = [lambda x: x @ weight] * 2
    with torch.no_grad():
        x = torch.ones(4, dtype=torch.complex128)
        assert torch.equal(block(way, linear, linear)(x, x)[0], by_hand(x, x, linear, linear)[0])


@ways
@pytest.mark.parametrize("layer", [0, 2])
def test_a_function_that_saves_other_tensors_when_run_again_raises(way: str, layer: int) -> None:
    calls: list[int] = []

    def moody(x: Tensor) -> Tensor:
        calls.append(1)
        return x.sin().cos() if len(calls) == 1 else x.sin().exp().cos()

    f: list[Any] = [torch.sin] * 3
    f[layer] = moody
    loss = loss_of(block(way, f, [torch.sin] * 3)(leaf(3, 4), leaf(3, 4)))
    with pytest.raises(RevfxError, match=f"`f of layer {layer}`.*run again"):
        loss.backward()


@ways
@pytest.mark.parametrize("rows", [1, 2])
def test_a_function_that_returns_another_shape_when_run_again_raises(way: str, rows: int) -> None:
    calls: list[int] = []

    def moody(x: Tensor) -> Tensor:
        calls.append(1)
        return x.sin()[: 3 if len(calls) == 1 else rows]

    loss = loss_of(block(way, [torch.sin, moody, torch.sin], [torch.sin] * 3)(leaf(3, 4), leaf(3, 4)))
    with pytest.raises(RevfxError, match="`f of layer 1`.*run again"):
        loss.backward()


@ways
def test_parameters_frozen_between_forward_and_backward_raise_or_do_not_matter(way: str) -> None:
    fs, gs = [Smooth() for _ in range(3)], [Smooth() for _ in range(3)]
    x = [leaf(3, 4), leaf(3, 4)]
    assert_right_or_raises(
        lambda: block(way, fs, gs)(*x),
        lambda: by_hand(*x, fs, gs),
        x,
        lambda y: both(fs, gs).requires_grad_(False),
    )


# --- exceptions -------------------------------------------------------------------------------------------------------
class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.inner = mlp()
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(self.norm(x), 0.3)
        if self.fails:
            raise KeyError("mine")
        return self.inner(x)


@ways
def test_an_exception_in_the_forward_comes_through_and_leaves_what_plain_code_leaves(way: str) -> None:
    fs, gs = [Failing() for _ in range(3)], [Failing() for _ in range(3)]
    fs[2].fails = True
    x = leaf(3, 4), leaf(3, 4)
    left: list[list[Tensor]] = []
    start = [b.clone() for b in both(fs, gs).buffers()]
    for call in (block(way, fs, gs), lambda *x: by_hand(*x, fs, gs)):
        for b, value in zip(both(fs, gs).buffers(), start, strict=True):
            b.copy_(value)
        torch.manual_seed(1)
        with pytest.raises(KeyError, match="mine"):
            call(*x)
        left.append([torch.get_rng_state(), *(b.clone() for b in both(fs, gs).buffers())])
    assert all(torch.equal(a, b) for a, b in zip(*left, strict=True))
    fs[2].fails = False
    assert_like_by_hand(way, fs, gs, [leaf(3, 4), leaf(3, 4)])


@ways
def test_an_exception_when_f_runs_again_leaves_random_state_and_buffers_as_they_were(way: str) -> None:
    fs, gs = [Failing() for _ in range(3)], [Failing() for _ in range(3)]
    loss = loss_of(block(way, fs, gs)(leaf(3, 4), leaf(3, 4)))
    fs[1].fails = True
    torch.manual_seed(2)
    random, buffers = torch.get_rng_state(), [(id(b), b.clone()) for b in both(fs, gs).buffers()]
    with pytest.raises(KeyError, match="mine"):
        loss.backward(retain_graph=True)
    assert torch.equal(torch.get_rng_state(), random)
    assert [id(b) for b in both(fs, gs).buffers()] == [i for i, _ in buffers]
    assert all(torch.equal(b, old) for b, (_, old) in zip(both(fs, gs).buffers(), buffers, strict=True))
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


# --- nothing stays behind ---------------------------------------------------------------------------------------------
class Remembers(nn.Module):
    """Leaves its last output as an attribute, as many models do for inspection."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.inner(x)
        return self.last


class Token:
    pass


def kept_by(call: Callable[..., Pair], backward: bool) -> list[Any]:
    """Weak references to what one call kept: its state, by a token among its arguments, and its outputs' storage."""
    token = Token()
    y = call(leaf(3, 4), leaf(3, 4), [token])
    refs = [weakref.ref(token), *(StorageWeakRef(t.untyped_storage()) for t in y)]
    if backward:
        loss_of(y).backward()
    return refs


def is_gone(ref: Any) -> bool:
    return ref.expired() if isinstance(ref, StorageWeakRef) else ref() is None


@ways
@pytest.mark.parametrize("backward", [True, False])
def test_state_is_freed_without_the_garbage_collector(way: str, backward: bool) -> None:
    modules = mlps(3)
    f = [lambda x, side, m=m: m(x) for m in modules]
    call = block(way, f, list(mlps(3)))
    gc.collect()
    gc.disable()
    try:
        assert all(is_gone(ref) for ref in kept_by(call, backward))
    finally:
        gc.enable()


@ways
@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_a_module_that_remembers_its_output_does_not_keep_the_state_of_older_calls(
    way: str, backward: bool, shared: bool
) -> None:
    class TakesSide(Remembers):
        def forward(self, x: Tensor, side: Any) -> Tensor:
            return super().forward(x)

    f = [TakesSide()] * 3 if shared else [TakesSide() for _ in range(3)]
    call = block(way, f, [torch.sin] * 3)
    refs = [kept_by(call, backward) for _ in range(3)]
    gc.collect()
    assert all(is_gone(ref) for older in refs[:2] for ref in older)
    for m in f:
        m.last = None
    gc.collect()
    assert all(is_gone(ref) for ref in refs[2])


@ways
def test_regenerated_values_are_freed_with_the_backward_that_asked_for_them(way: str) -> None:
    made: list[StorageWeakRef] = []

    def f(x: Tensor) -> Tensor:
        h = torch.tanh(x)
        made.append(StorageWeakRef(h.untyped_storage()))
        return h.exp()

    loss = loss_of(block(way, [f] * 4, [f] * 4)(leaf(3, 4), leaf(3, 4)))
    for _ in range(2):
        loss.backward(retain_graph=True)
        assert len(made) > 8 and all(ref.expired() for ref in made)

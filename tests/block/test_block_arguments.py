"""`rev_block` and `RevBlock` refuse arguments and functions that are no couplings, by name."""

# pyright: reportUnknownLambdaType=false
from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import WAYS, block, fp64 as fp64, leaf, lines, mlp

from revfx import RevBlock, rev_block
from revfx.modes import store_activations


ways = pytest.mark.parametrize("way", WAYS)


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

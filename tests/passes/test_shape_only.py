"""What reads no more than the shape of a stream is no use of its numbers, in eager mode and in compiled graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled import compiled, fresh as fresh
from helpers import deep_but, leaf, mlps, regions_of, relative_error
from torch import Tensor, nn

import revfx
from revfx.compiled.partitioner import reports
from revfx.passes.sizes import replace_shape_reader
from revfx.testing import assert_same_grads, measure_memory, store_activations


Make = Callable[[Tensor], Tensor]


def drop_path(x: Tensor) -> Tensor:
    """Ones and zeros by rows, as the timm library writes them."""
    return x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.7).div_(0.7)


def rounded(x: Tensor) -> Tensor:
    return (0.7 + torch.rand((x.shape[0], 1))).floor_()


MADE: dict[str, Make] = {
    "zeros_like": torch.zeros_like,
    "ones_like": torch.ones_like,
    "full_like": lambda a: torch.full_like(a, 0.5),
    "full_like by name": lambda a: torch.full_like(a, fill_value=0.5),
    "new_zeros": lambda a: a.new_zeros(a.shape),
    "new_ones": lambda a: a.new_ones(a.shape[-1]),
    "new_full": lambda a: a.new_full(a.shape, 0.5),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "another dtype": lambda a: torch.randn_like(a, dtype=torch.float32),
    "filled": lambda a: torch.empty_like(a).fill_(0.5),
    "emptied": lambda a: torch.empty_like(a).zero_(),
    "uniform": lambda a: torch.empty_like(a).uniform_(-1, 1),
    "normal": lambda a: torch.zeros_like(a).normal_(std=0.5),
    "exponential": lambda a: torch.empty_like(a).exponential_(2.0),
    "dropout": lambda a: nn.functional.dropout(torch.ones_like(a), 0.3),
    "drop path": drop_path,
    "rounded": rounded,
}


class Scaled(nn.Module):
    """Couplings with factors that are made of the shape of the stream which they are for."""

    def __init__(self, make: Make, depth: int = 4) -> None:
        super().__init__()
        self.f, self.g, self.make = mlps(depth), mlps(depth), make

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b) * self.make(a)
            b = b + g(a) * self.make(b)
        return torch.cat([a, b], -1)


@pytest.mark.parametrize("name", MADE)
def test_both_couplings_of_a_layer_are_found(name: str) -> None:
    model, x = Scaled(MADE[name]), leaf(8, 8)
    converted: Any = revfx.convert(copy.deepcopy(model))
    assert_same_grads(converted, model, [x])
    assert sum(s.is_inverted for r in regions_of(converted) for s in r.steps) >= 6


@pytest.mark.parametrize("name", deep_but(("randn_like", "drop path"), MADE))
def test_compiled_graphs_find_them_as_well(name: str) -> None:
    model, x = Scaled(MADE[name]), leaf(8, 8)
    run = compiled(copy.deepcopy(model), "aot_eager")
    with reports() as found:
        assert_same_grads(run, model, [x])
    assert sum(r.inverted for report in found for r in report.regions) >= 6


def test_nothing_is_kept_per_layer_for_constants() -> None:
    kept: dict[tuple[str, int], int] = {}
    for depth in (4, 8):
        model, x = Scaled(torch.ones_like, depth), leaf(512, 8)
        converted: Any = revfx.convert(model)
        kept["revfx", depth] = measure_memory(lambda call=converted, x=x: call(x).square().mean()).kept
        with store_activations():
            kept["plain", depth] = measure_memory(lambda call=model, x=x: call(x).square().mean()).kept
    assert kept["revfx", 8] - kept["revfx", 4] < 0.06 * (kept["plain", 8] - kept["plain", 4])


refused = pytest.mark.filterwarnings("ignore::revfx.errors.RevfxWarning")


@refused
@pytest.mark.parametrize("write", [lambda a: a.zero_(), lambda a: a.fill_(1.0), lambda a: a.bernoulli_(0.5)])
def test_streams_that_are_filled_and_read_elsewhere_are_left_alone(write: Make) -> None:
    class Written(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            a, b = (x * 1.0).chunk(2, -1)
            for f, g in zip(self.f, self.g, strict=True):
                a = a + f(b)
                b = b + g(a)
                h = a * 2.0
                part = h[:, :2]
                write(part)
                a = a + h
            return torch.cat([a, b], -1)

    model = Written(torch.ones_like)
    assert_same_grads(revfx.convert(copy.deepcopy(model)), model, [leaf(8, 8)])


@refused
@pytest.mark.parametrize("name", ["bernoulli_", "uniform_", "normal_", "exponential_", "fill_", "zero_"])
def test_what_has_a_gradient_is_filled_in_place(name: str) -> None:
    """Functional forms of some have no derivative."""

    class Filled(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            for f, g in zip(self.f, self.g, strict=True):
                a = a + getattr(f(b) * 2, name)(*([0.5] if name == "fill_" else []))
                b = b + g(a)
            return torch.cat([a, b], -1)

    model = Filled(torch.ones_like)
    assert_same_grads(revfx.convert(copy.deepcopy(model)), model, [leaf(8, 8)])


@refused
def test_probabilities_of_each_value_are_read() -> None:
    model = Scaled(lambda a: torch.empty_like(a).bernoulli_(torch.full_like(a, 0.5)))
    assert_same_grads(revfx.convert(copy.deepcopy(model)), model, [leaf(8, 8)])


# --- what is said
def test_only_what_can_be_made_again_of_its_shape() -> None:
    x = torch.randn(3, 4)
    like_x = {"dtype": x.dtype, "device": x.device}
    assert replace_shape_reader("randn_like", (x,), {}, x) == ("randn", ([3, 4],), like_x)
    assert replace_shape_reader("new_full", (x, [3, 4], 2), {}, x) == ("full", ([3, 4], 2), like_x)
    for name, args, kwargs, made in [
        ("relu", (x,), {}, x),
        ("randn_like", (x,), {"generator": torch.Generator()}, x),
        ("ones_like", (x,), {"requires_grad": True}, x),
        ("zeros_like", (x.T,), {}, x.T),  # its numbers would lie in another order
        ("full_like", (x, torch.tensor(2.0)), {}, x),
        ("zeros_like", (x.to_sparse(),), {}, x.to_sparse()),
    ]:
        assert replace_shape_reader(name, args, kwargs, made) is None


@refused
def test_numbers_drawn_for_another_layout_are_the_same() -> None:
    """Of a transposed stream `randn_like` draws in the order of its memory."""
    model, x = Scaled(lambda a: torch.randn_like(a.t()).t()), leaf(8, 8)
    assert_same_grads(revfx.convert(copy.deepcopy(model)), model, [x])


def test_under_other_modes() -> None:
    model, x = Scaled(torch.randn_like), leaf(8, 8)
    converted = revfx.convert(copy.deepcopy(model))
    for run in (lambda m: m(x), lambda m: torch.vmap(m, randomness="different")(x.unflatten(0, (2, -1))).flatten(0, 1)):
        got: list[Tensor] = []
        for m in (model, converted):
            torch.manual_seed(3)
            got += torch.autograd.grad(run(m).sin().sum(), x)
        assert relative_error([got[1]], [got[0]]) < 1e-9

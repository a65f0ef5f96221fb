"""Streams of data to which at first nothing is added, or what is made of data, when relu sees sums of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled import fresh as fresh
from helpers import deep_but
from test_kinks import by_backend
from torch import Tensor, nn
from torch.nn import functional as F

import revfx
from revfx.passes.numbers import come_back, magnitudes, shared_numbers, sizes, uniform
from revfx.testing import assert_same_grads


pytestmark = pytest.mark.filterwarnings("ignore::revfx.errors.RevfxWarning")
N, D = 8, 6
Layer = Callable[[Tensor], Tensor]
Add = Callable[[Tensor, Tensor, Layer, Tensor], Tensor]  # of streams b and c, the layer f, a parameter: what a gets
Use = Callable[[Tensor, Tensor, Tensor, Layer], Tensor]  # of streams a and c, what a was first, and a layer
Then = Callable[[Tensor, Tensor], Tensor]  # of a after that, and what a layer makes of b

ADDS: dict[str, Add] = {
    "a layer": lambda b, c, f, p: f(b),
    "data": lambda b, c, f, p: c,
    "other elements of data": lambda b, c, f, p: c.roll(1, -1),
    "half of data": lambda b, c, f, p: 0.5 * c,
    "products of data": lambda b, c, f, p: c * c,
    "whole numbers": lambda b, c, f, p: f(b).round(),
    "relu": lambda b, c, f, p: F.relu(f(b)),
    "a mean": lambda b, c, f, p: f(b).mean(0),
    "a mean, expanded": lambda b, c, f, p: f(b).mean(0).expand(N, D),
    "a parameter": lambda b, c, f, p: p,
    "a parameter and a layer": lambda b, c, f, p: p + f(b),
}
USES: dict[str, Use] = {
    "less its first value": lambda a, c, first, w: F.relu(w(a - first)),
    "less its first value, detached": lambda a, c, first, w: F.relu(w(a - first.detach())),
    "less data": lambda a, c, first, w: F.relu(a - c),
    "less twice other data": lambda a, c, first, w: F.relu(a - 2 * c.roll(2, 0)),
    "a batch norm": lambda a, c, first, w: F.relu(F.batch_norm(a, None, None, training=True)),
    "a batch norm and a layer": lambda a, c, first, w: F.relu(w(F.batch_norm(a, None, None, training=True))),
    "a layer norm": lambda a, c, first, w: F.relu(F.layer_norm(a, (D,))),
    "less other rows": lambda a, c, first, w: F.relu(w(a - a.roll(2, 0))),
    "means of rows": lambda a, c, first, w: F.relu(w(a.mean(-1, keepdim=True).expand_as(a))),
    "running sums": lambda a, c, first, w: F.relu(w(a.cumsum(0))),
    "sorted": lambda a, c, first, w: w(a.sort(0).values),
}
THEN: dict[str, Then] = {
    "rolled": lambda a, h: a.roll(1, 0),
    "turned": lambda a, h: a.t().contiguous().t(),
    "put together": lambda a, h: torch.cat([h, a], -1).flip(-1).chunk(2, -1)[0].flip(-1),
    "averaged": lambda a, h: torch.lerp(a, h, 0.3),
    "negated": lambda a, h: h.tanh() - a,
    "halved": lambda a, h: a * 0.5,
}


class Streams(nn.Module):
    """Couplings of three streams, one of which stays what it is; the first function gives zeros."""

    def __init__(self, add: Add, use: Use, depth: int = 4, then: Then = lambda a, h: a, at: int = 1) -> None:
        super().__init__()
        self.add, self.use, self.then, self.at, self.p = add, use, then, at, nn.Parameter(torch.randn(D))
        self.f, self.g, self.w = (nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(depth)) for _ in range(3))
        nn.init.zeros_(next(self.f.parameters()))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = x.chunk(3, -1)
        first = a
        for i, (f, g, w) in enumerate(zip(self.f, self.g, self.w, strict=True)):
            a = a + (self.add(b, c, f, self.p) if i == self.at else f(b))
            a = self.then(a, f(b))
            b = b + g(self.use(a, c, first, w) + a)
        return torch.cat([a, b, c], -1)


Off = Callable[
    ["TakenOff", int, Tensor, Tensor, Tensor], Tensor
]  # of the layer's number, a, b and f(b): what a becomes

OFF: dict[str, Off] = {
    "the same value": lambda m, i, a, b, h: h - a,
    "computed again": lambda m, i, a, b, h: m.f[i](b) - a,
    "by a copy": lambda m, i, a, b, h: m.copies[i](b) - a,
    "by a negated copy": lambda m, i, a, b, h: a + (-m.copies[i](b)),
    "by a function": lambda m, i, a, b, h: b @ next(m.copies[i].parameters()).t() - a,
    "of half of it, by a copy": lambda m, i, a, b, h: half_of(m.copies[i](b), a),
    "scaled, by a copy": lambda m, i, a, b, h: 0.7 * m.copies[i](b) - 0.7 * a,
    "in one row, by a copy": lambda m, i, a, b, h: torch.cat([m.copies[i](b)[:1], -m.copies[i](b)[1:]]) - a,
}


def half_of(h: Tensor, a: Tensor) -> Tensor:
    return torch.cat([h[:, : D // 2] - a[:, : D // 2], a[:, D // 2 :]], -1)


class TakenOff(nn.Module):
    """What was added to a stream is taken off again, so that numbers of the data come back."""

    def __init__(self, off: str, alike: bool = True) -> None:
        super().__init__()
        self.off = OFF[off]
        self.f, self.g = (nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(4)) for _ in range(2))
        self.copies = copy.deepcopy(self.f) if alike else nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for i, (f, g) in enumerate(zip(self.f, self.g, strict=True)):
            h = f(b)
            a = a + h
            a = self.off(self, i, a, b, h)
            b = b + g(F.relu(F.layer_norm(a, (D,))) + a)
        return torch.cat([a, b], -1)


def few() -> Tensor:
    return torch.randint(1, 4, (N, D)) / 255


def opposite() -> Tensor:
    """Pairs of columns, and of the rows below, that add up to zero."""
    t = (torch.randperm(N * D // 4) + 1).reshape(N // 2, D // 2) / 255
    t = torch.stack([t, -t], -1).reshape(N // 2, D)
    return torch.stack([t, -t], 1).reshape(N, D)


def many() -> Tensor:
    return (torch.randperm(N * D) + 1).reshape(N, D) / 255


def rows() -> Tensor:
    return ((torch.randperm(D) + 1) / 255).expand(N, D).clone()


DATA = [  # the first values of a, b, c
    (few, many, few),
    (many, rows, rows),
    (torch.zeros, many, few),
    (opposite, rows, few),
    (rows, torch.zeros, many),
]


def data(parts: tuple[Callable[..., Tensor], ...]) -> Tensor:
    return torch.cat([p(N, D) if p is torch.zeros else p() for p in parts], -1).requires_grad_()


def assert_same_of_all_data(model: nn.Module) -> None:
    converted = revfx.convert(copy.deepcopy(model))
    for parts in DATA:
        torch.manual_seed(1)  # by others an element may equal the mean of its column, and rounding decide its sign
        assert_same_grads(converted, model, [data(parts)])


@pytest.mark.parametrize("use", deep_but([*USES][::2], USES))
def test_gradients_of_streams_of_data(use: str) -> None:
    for add in ADDS.values():
        assert_same_of_all_data(Streams(add, USES[use]))


@pytest.mark.parametrize("then", deep_but([*THEN][::2], THEN))
def test_gradients_of_streams_of_data_that_are_moved_and_scaled(then: str) -> None:
    for use in ("less data", "a batch norm", "sorted"):
        assert_same_of_all_data(Streams(ADDS["a layer"], USES[use], then=THEN[then]))


@pytest.mark.parametrize("off", deep_but([*OFF][1::2], OFF))
def test_gradients_of_streams_of_data_that_come_back(off: str) -> None:
    for seed in range(8):  # in some an element equals the mean of its row
        torch.manual_seed(seed)
        model, x = TakenOff(off), torch.cat([few(), torch.randn(N, D)], -1).requires_grad_()
        assert_same_grads(revfx.convert(copy.deepcopy(model)), model, [x])


COPIES = [name for name in OFF if name.endswith("by a copy")]


@pytest.mark.parametrize("off", deep_but(("in one row, by a copy",), COPIES))
def test_compiled_streams_of_data_that_no_copy_takes_off(off: str) -> None:
    x = torch.cat([few(), torch.randn(N, D)], -1).requires_grad_()
    model = TakenOff(off, alike=False)
    assert_same_grads(by_backend(model), model, [x])


def test_what_no_copy_takes_off_is_inverted() -> None:
    converted: Any = revfx.convert(TakenOff("by a copy", alike=False))
    converted(torch.randn(32, 2 * D))
    assert converted.revfx.kept_cuts == 2  # the first and the last


MOVED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # a, to which a layer t of b is added
    "not": lambda a, t: a + t,
    "turned": lambda a, t: a.flip(-1) + t,
    "in another shape": lambda a, t: (a.reshape(N, 2, -1).transpose(0, 1) + t.reshape(2, N, -1)).reshape(N, D),
    "one half, as in a flow": lambda a, t: torch.cat([a[:, D // 2 :], a[:, : D // 2] + t[:, : D // 2]], -1),
}


class MovedStream(nn.Module):
    """relu sees what was added to a stream, in most rows nothing; then come couplings of it turned, or of parts."""

    def __init__(self, then: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.then = then
        layers = [nn.Linear(D, D, bias=i != 2) for i in range(7)]
        nn.init.constant_(layers[1].bias, -1.5)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        b, a = x.chunk(2, -1)
        a = a + torch.tanh(self.layers[0](b))
        first = a
        a = a + F.relu(self.layers[1](b))
        b = b + self.layers[3](F.relu(self.layers[2](a - first.detach())))
        for layer in self.layers[4:]:
            a = self.then(a, torch.tanh(layer(b)))
        return torch.cat([a, b], -1)


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("way", ["convert", "store"])
@pytest.mark.parametrize("moved", MOVED)
def test_streams_that_are_moved_before_more_is_added(moved: str, way: str) -> None:
    """What is kept of the stream and what is solved for differed: where nothing was added, so did what relu saw."""
    model, x = MovedStream(MOVED[moved]), torch.randn(N, 2 * D, requires_grad=True)
    ours = by_backend(model, unbounded="store") if way == "store" else revfx.convert(copy.deepcopy(model))
    assert_same_grads(ours, model, [x])


LAYERED: dict[str, Callable[[Tensor], Tensor]] = {
    "a norm": lambda a: F.layer_norm(a, (D,)),
    "noise": lambda a: a * 0 + torch.randn(N, D),
}


class LessALayer(nn.Module):
    """relu sees a stream less the layer in its middle that it was, to which zeros were added in most places."""

    def __init__(self, layer: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        layers = [nn.Linear(D, D) for _ in range(7)]
        nn.init.constant_(layers[1].bias, -1.5)
        self.layers, self.layer = nn.ModuleList(layers), layer

    def forward(self, x: Tensor) -> Tensor:
        b, a = x.chunk(2, -1)
        a = a + torch.tanh(self.layers[0](b))
        a = first = self.layers[2](a) if self.layer is None else self.layer(a)
        a = a + F.relu(self.layers[1](b))
        b = b + self.layers[3](F.relu(a - first.detach()))
        for layer in self.layers[4:]:
            a = a + torch.tanh(layer(b))
            b = b + torch.tanh(layer(a))
        return torch.cat([a, b], -1)


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("unbounded", ["assert", "store"])
@pytest.mark.parametrize("layer", deep_but(("a norm",), ["linear", *LAYERED]))
def test_compiled_streams_less_what_a_layer_made_them(layer: str, unbounded: str) -> None:
    """Numbers that follow no pattern are exactly themselves as well."""
    model, x = LessALayer(LAYERED.get(layer)), torch.randn(N, 2 * D, requires_grad=True)
    torch.compiler.reset()
    assert_same_grads(by_backend(model, unbounded=unbounded), model, [x])
    assert_same_grads(revfx.convert(copy.deepcopy(model)), model, [x])


class NormOfADifference(nn.Module):
    """relu sees a norm of a stream less what it was, in rows to which nothing was added; both were moved on alike."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(D, D) for _ in range(7)]
        nn.init.constant_(layers[1].bias, -2.5)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        b, a = x.chunk(2, -1)
        a = a + torch.tanh(self.layers[0](b))
        first = a.detach()
        a = a + F.relu(self.layers[1](b))
        a, first = a + b.sin(), first + b.sin()
        b = b + self.layers[3](F.relu(F.layer_norm(a - first, (D,))))
        for layer in self.layers[4:]:
            a = a + torch.tanh(layer(b))
        return torch.cat([a, b + torch.tanh(self.layers[2](a))], -1)


@pytest.mark.usefixtures("fp64")
def test_norms_of_what_cancels() -> None:
    model, x = NormOfADifference(), torch.randn(N, 2 * D, requires_grad=True)
    assert_same_grads(revfx.convert(copy.deepcopy(model)), model, [x])
    assert_same_grads(by_backend(model, unbounded="store"), model, [x])


def test_explain_of_streams_that_may_hold_numbers_of_the_data() -> None:
    x = torch.cat([few(), few(), many()], -1)
    assert revfx.explain(Streams(ADDS["a layer"], USES["less data"]), x).regions


def test_numbers_that_come_back() -> None:
    t = torch.randint(1, 256, (64, 33)) / 255
    for h in (torch.randn(64, 33), 100 * torch.randn(64, 33)):
        for dtype in (torch.float32, torch.float64):
            a, b = t.to(dtype), h.to(dtype)
            eps = torch.finfo(dtype).eps
            assert come_back(magnitudes(a), sizes(b - (a + b), a + b), eps)
            assert not come_back(magnitudes(a), sizes(b + (a + b), a + b), eps)
            assert not come_back(magnitudes(a), sizes(a, a), eps)  # they were there all the time
            assert not come_back(magnitudes(b), sizes(a + b, b), eps)


def test_numbers_that_come_back_scaled_or_in_few_places() -> None:
    a, b = torch.randint(1, 256, (64, 33)) / 255, torch.randn(64, 33)
    eps = torch.finfo(a.dtype).eps
    off = 0.7 * (a + b)
    assert come_back(magnitudes(a), sizes(0.7 * b - off, off), eps, 0.7)
    some = torch.where(torch.arange(64)[:, None] < 4, b, -b)
    assert come_back(magnitudes(a), sizes(some - (a + b), a + b), eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_few_numbers_come_back_by_chance(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    for size in (1, 7, 200, 1 << 16):
        a, b, c = (torch.randn(size).to(dtype) for _ in range(3))
        assert not come_back(magnitudes(a), sizes(a + b, a), eps)
        for tiny in (1e-3, 1e-6, 1e-7):  # two additions that hardly move a number
            moved = a + tiny * b
            assert not come_back(magnitudes(a), sizes(moved + tiny * c, moved), eps)


def test_gradients_of_data_of_few_levels_without_equal_neighbours() -> None:
    rows, columns = torch.arange(N)[:, None], torch.arange(D)
    x = torch.cat([((2 * rows + columns) % 5 + 1) / 255, many(), few()], -1).requires_grad_()
    for use in ("a batch norm", "less data"):
        model = Streams(ADDS["a mean"], USES[use])
        assert_same_grads(revfx.convert(copy.deepcopy(model)), model, [x])


@pytest.mark.parametrize("use", ["less data", "less twice other data"])
@pytest.mark.parametrize("add", deep_but(("a layer", "data"), ("a layer", "data", "half of data", "a mean")))
def test_compiled_streams_of_data(add: str, use: str) -> None:
    assert_compiled_streams_are_right(lambda: Streams(ADDS[add], USES[use], at=0))


@pytest.mark.parametrize("then", deep_but(("rolled", "halved"), THEN))
def test_compiled_streams_of_data_that_are_moved_and_scaled(then: str) -> None:
    assert_compiled_streams_are_right(lambda: Streams(ADDS["a layer"], USES["less data"], then=THEN[then]))


def assert_compiled_streams_are_right(make: Callable[[], nn.Module]) -> None:
    for parts in ((few, many, few), (many, torch.zeros, few)):
        torch.manual_seed(1)
        x, model = data(parts), make()
        assert_same_grads(by_backend(model), model, [x])


@pytest.mark.parametrize("use", USES)
def test_streams_to_which_layers_were_added_are_inverted(use: str) -> None:
    model = Streams(ADDS["a layer"], USES[use], depth=8)
    nn.init.normal_(next(model.f.parameters()))
    converted: Any = revfx.convert(model)
    converted(torch.randn(32, 3 * D))
    assert converted.revfx.kept_cuts <= 4  # of 17


class Leapfrog(nn.Module):
    """Positions, to which velocities are added, which start as data too."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.w = (nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        a, v = x.chunk(2, -1)
        for f, w in zip(self.f, self.w, strict=True):
            v = v + f(F.relu(w(a - a.roll(1, 0))))
            a = a + v
        return torch.cat([a, v], -1)


def test_streams_to_which_changed_streams_are_added_are_inverted() -> None:
    model = Leapfrog()
    converted: Any = revfx.convert(model)
    converted(torch.randn(32, 2 * D))
    assert converted.revfx.kept_cuts <= 4  # of 17
    assert_same_grads(revfx.convert(copy.deepcopy(model)), model, [data((few, few))])


class OneRow(nn.Module):
    """A stream of one row, which is added to every row of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = (nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(4)) for _ in range(2))

    def forward(self, a: Tensor, v: Tensor, b: Tensor) -> Tensor:
        for f, g in zip(self.f, self.g, strict=True):
            v = v + f(b).mean(0, keepdim=True)
            a = a + v
            b = b + g(F.relu(F.batch_norm(a, None, None, training=True)) + a)
        return torch.cat([a, b, v.expand_as(a)], -1)


def test_a_changed_stream_of_one_row_leaves_differences_between_rows_as_they_are() -> None:
    for seed in range(8):
        torch.manual_seed(seed)
        model, x = OneRow(), [few(), torch.randn(1, D), torch.randn(N, D)]
        assert_same_grads(revfx.convert(copy.deepcopy(model)), model, [t.requires_grad_() for t in x])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [200, 1 << 18])
def test_values_without_a_pattern_share_few_numbers(size: int, dtype: torch.dtype) -> None:
    for t in (torch.randn(size), torch.rand(size).square(), torch.randn(size).tanh(), torch.randn(size).float()):
        found, chance = shared_numbers(t.to(dtype))
        assert found <= chance


def test_shared_numbers_are_counted() -> None:
    found, chance = shared_numbers(torch.tensor([0.0, 0.3, 0.0, -0.7, 0.3, 0.1, 0.3, -0.7]))
    assert (int(found), chance < 3) == (3, True)
    image = torch.where(torch.rand(1 << 18) < 0.02, torch.randint(1, 256, (1 << 18,)) / 255, torch.randn(1 << 18))
    found, chance = shared_numbers(image.float())
    assert found > chance


def test_rows_and_channels_of_one_number() -> None:
    t = torch.randn(4, 3, 5)
    assert not uniform(t)
    assert not uniform(t[:, :, :1])
    t[1, :, 2] = 1.0  # along the second dimension: no row, and no whole channel
    assert not uniform(t)
    row, channel, last = t.clone(), t.clone(), t.clone()
    row[2, 1], channel[:, 1], last[:, :, 3] = 0.3, 0.3, 0.3
    assert uniform(row)
    assert uniform(channel)
    assert uniform(last)
    assert uniform(torch.ones(3))
    assert not uniform(torch.ones(1))
    assert not uniform(torch.ones(0, 4))


class Difference(nn.Module):
    """Functions of a stream less what it was at first, which is zero in rows to which nothing was added."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.w = (nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(3)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        first = a
        for f, g, w in zip(self.f, self.g, self.w, strict=True):
            a = a + f(b)
            b = b + g(F.relu(w(a - first)) + a)
        return torch.cat([a, b], -1)


@pytest.mark.parametrize("scale", [1.0, 1 / 255])
def test_rows_that_cancel_though_no_neighbours_are_equal(scale: float) -> None:
    x = torch.zeros(8, 2 * D)
    x[:, :D] = (torch.randperm(8 * D) + 1).reshape(8, D) * scale
    model, x = Difference(), x.requires_grad_()
    assert_same_grads(revfx.convert(copy.deepcopy(model)), model, [x])
    for unbounded in "assert", "store":
        torch.compiler.reset()
        assert_same_grads(by_backend(model, unbounded=unbounded), model, [x])

"""Gradients are plain autograd's, bit for bit, also where no inverse gives a stream back: lost numbers, zeros, NaN."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import mlp, mlps, regions_of
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import Additive, AffineExp, D, Momentum

import revfx
from revfx.codes import Code, Prediction, codec
from revfx.converted import conversion_of


ROWS, WIDTH = 64, 20
STEPS = 3  # codes are measured in the first two calls


def bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def steps(
    model: Callable[..., Any], parts: nn.Module, inputs: Sequence[Tensor], autocast: torch.dtype | None = None
) -> list[Tensor]:
    """Return losses and gradients of some steps with weights that move, and what is left in the buffers."""
    torch.manual_seed(1)
    found: list[Tensor] = []
    fresh = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    optimizer = torch.optim.SGD(parts.parameters(), 1e-3)
    for _ in range(STEPS):
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            out = model(*fresh)
            leaves = out if isinstance(out, tuple) else (out,)
            loss = sum((t.float().sin().mean() for t in leaves), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        found += [loss, *(p.grad for p in (*fresh, *parts.parameters()) if p.grad is not None)]
        found = [t.detach().clone() for t in found]
        optimizer.step()
    return [*found, *parts.buffers(), torch.rand(4)]


def assert_plain(
    model: nn.Module, *inputs: Tensor, autocast: torch.dtype | None = None, convert: Any = revfx.convert
) -> Any:
    """Compare some steps of a converted copy with those of `model`, and return the copy."""
    converted = convert(copy.deepcopy(model))
    ours = steps(converted, converted, inputs, autocast)
    plain = steps(model, model, inputs, autocast)
    assert len(ours) == len(plain)
    for got, want in zip(ours, plain, strict=True):
        same = (bits(got) == bits(want)) | (got.isnan() & want.isnan())
        assert got.dtype == want.dtype and same.all()
    return converted


def coded(converted: Any) -> int:
    """Return the bytes of the codes of the latest forward."""
    return conversion_of(converted).coded_bytes


class Scaled(nn.Module):
    """An elementwise function: what it makes of one element shows nowhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.w).tanh()


class Masked(nn.Module):
    """Couplings, between the first and the others of which a mask is added to one element of a stream."""

    mask: Tensor

    def __init__(self, value: float, make: Callable[[], nn.Module], depth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(2 * WIDTH, 2 * WIDTH)
        self.f, self.g = (nn.ModuleList(make() for _ in range(depth)) for _ in "fg")
        mask = torch.zeros(ROWS, WIDTH)
        mask[7, 2] = value
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.stem(x).chunk(2, -1)
        for i, (f, g) in enumerate(zip(self.f, self.g, strict=True)):
            a = a + f(b)
            b = b + g(a)
            if i == 0:
                a = a + self.mask
        return a, b


@pytest.mark.parametrize("make", [lambda: mlp(WIDTH), Scaled])
@pytest.mark.parametrize("value", [-1e9, 1e12, torch.finfo(torch.float32).min, -torch.inf])
def test_what_is_lost_beside_a_huge_addend(value: float, make: Any) -> None:
    converted = assert_plain(Masked(value, make), torch.randn(ROWS, 2 * WIDTH))
    if value != -torch.inf:  # which turns all that the next functions give into NaN
        assert 0 < coded(converted) < 8 * ROWS * WIDTH * 1.2


class Zeros(Additive):
    """Images that are zero in most places, straight into functions that begin with a relu or compare numbers."""

    def __init__(self, depth: int, first: Callable[[Tensor], Tensor]) -> None:
        super().__init__(depth)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(self.first(b))
            b = b + 0.5 * g(self.first(a))
        return torch.cat([a, b], -1)


FIRST: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "floor": lambda x: x.floor() + x,
    "equal to zero": lambda x: torch.where(x == 0, 1.0, x),
    "dropout": lambda x: F.dropout(x.relu(), 0.3),
    "the largest": lambda x: x.amax(-1, keepdim=True) + x,
}


@pytest.mark.parametrize("name", FIRST)
def test_zeros_and_whole_numbers_straight_into_what_tells_them_apart(name: str) -> None:
    x = torch.randint(0, 3, (64, 2 * D)) * torch.randint(0, 2, (64, 2 * D))
    assert_plain(Zeros(4, FIRST[name]), x.float())
    assert_plain(Zeros(4, FIRST[name]), x.float(), autocast=torch.bfloat16)


class Underflow(AffineExp):
    """Factors exp(s) of which some are exactly zero."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x * 300)


class Blend(nn.Module):
    """A midpoint method: `cur, prev = a*prev + (1 - a)*cur + 2h*f(cur), cur`."""

    def __init__(self, depth: int, a: float) -> None:
        super().__init__()
        self.f, self.a = nn.ModuleList(mlp(2 * D) for _ in range(depth)), a

    def forward(self, x: Tensor) -> Tensor:
        prev, cur = x, x + self.f[0](x)
        for f in self.f:
            prev, cur = cur, self.a * prev + (1 - self.a) * cur + 0.5 * f(cur)
        return cur + prev


STREAMS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", STREAMS)
@pytest.mark.parametrize("make", [Additive, AffineExp, Underflow, Momentum, lambda n: Blend(n, 0.5)])
def test_streams_of_every_precision(make: Any, dtype: torch.dtype) -> None:
    assert_plain(make(6).to(dtype), torch.randn(64, 2 * D).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    for make in (Additive, AffineExp, Momentum, lambda n: Blend(n, 0.95)):
        converted = assert_plain(make(6), torch.randn(64, 2 * D), autocast=dtype)
        assert coded(converted) > 0


def test_a_coupling_that_contracts_deep_down() -> None:
    """400 layers of momentum 0.9: an error at the end would have grown by 1e18 at the start."""
    assert_plain(Momentum(400), torch.randn(4, 2 * D))


class NotFinite(Additive):
    def forward(self, x: Tensor) -> Tensor:
        x = x.index_fill(1, torch.tensor([1]), torch.nan)
        return super().forward(x.index_fill(1, torch.tensor([3]), torch.inf))


def test_numbers_that_are_not_finite() -> None:
    assert_plain(NotFinite(3), torch.randn(8, 2 * D))


class Started(Additive):
    """Functions whose last layers start as zeros, on zeros of which some are negative."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        for f in [*self.f, *self.g]:
            for p in [*f.parameters()][-2:]:
                nn.init.zeros_(p)


def test_functions_that_start_as_zeros_on_zeros_of_either_sign() -> None:
    x = torch.randn(64, 2 * D).relu() * torch.tensor(-1.0)
    assert_plain(Started(4), x)


@pytest.mark.parametrize("shape", ["transposed", "odd", "channels last", "a part"])
def test_layouts(shape: str) -> None:
    x = torch.randn(64, 2 * D)
    inputs = {
        "transposed": x.t().contiguous().t(),
        "odd": torch.randn(63, 2 * D),
        "channels last": x.view(4, 16, 2 * D),
        "a part": torch.randn(64, 2 * D + 1)[:, 1:],
    }
    assert_plain(Additive(4), inputs[shape])


class Images(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        make = lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())  # noqa: E731
        self.f, self.g = (nn.ModuleList(make() for _ in range(depth)) for _ in "fg")

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            b = b + g(a)
        return torch.cat([a, b], 1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolutions_with_batch_norm(layout: torch.memory_format) -> None:
    model: Any = Images(3)
    assert_plain(model.to(memory_format=layout), torch.randn(2, 8, 7, 9).to(memory_format=layout))


class Chain(nn.Module):
    """A block that is written out, on parts of one tensor."""

    def __init__(self, depth: int, **wishes: Any) -> None:
        super().__init__()
        self.block = revfx.RevBlock(mlps(depth, WIDTH), mlps(depth, WIDTH), depth, **wishes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, -1)
        return self.block(a, b)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_blocks(autocast: torch.dtype | None) -> None:
    model, x = Chain(5), torch.randn(ROWS, 2 * WIDTH)
    ours = steps(model, copy.deepcopy(model), [x], autocast)
    with revfx.testing.store_activations():
        plain = steps(model, copy.deepcopy(model), [x], autocast)
    assert all(torch.equal(bits(got), bits(want)) for got, want in zip(ours, plain, strict=True))


def test_the_classical_way_has_no_codes_and_gradients_up_to_rounding() -> None:
    model, x = Additive(6), torch.randn(64, 2 * D)
    converted: Any = revfx.convert(copy.deepcopy(model), exact=False)
    ours, plain = steps(converted, converted, [x]), steps(model, model, [x])
    for got, want in zip(ours, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert not all(torch.equal(got, want) for got, want in zip(ours, plain, strict=True))
    assert coded(converted) == 0


class Through(nn.Module):
    """Streams that pass through a function of each element between couplings."""

    def __init__(self, through: Callable[[Tensor], Tensor], depth: int = 4) -> None:
        super().__init__()
        self.f, self.g, self.through = mlps(depth, D), mlps(depth, D), through

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = self.through(a + f(b))
            b = b + g(a)
        return torch.cat([a, b], -1)


THROUGH: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.1), 0.8),
    "elu": (F.elu, 1.2),
    "selu": (F.selu, 1.2),
    "tanh": (lambda x: x.tanh(), 1.3),
    "sigmoid": (torch.sigmoid, 1.6),
    "softplus": (F.softplus, 1.6),
    "exp and log": (lambda x: (x / 8).exp().log(), 1.6),
    "asinh": (torch.asinh, 1.2),
    "a factor without a bound": (lambda x: x * torch.linspace(-1.0, 1.0, D), 1.5),
}


@pytest.mark.parametrize("name", THROUGH)
def test_streams_through_functions_that_only_a_code_makes_invertible(name: str) -> None:
    """Bytes of codes stay below those of the activations: `most` an element and coupling, of 4."""
    through, most = THROUGH[name]
    converted = assert_plain(Through(through).float(), torch.randn(256, 2 * D))
    assert sum(step.is_inverted for region in regions_of(converted) for step in region.steps) >= 6
    assert coded(converted) / (2 * 4 * 256 * D) < most
    model, x = Through(through).float(), torch.randn(256, 2 * D, requires_grad=True)
    rounding: Any = revfx.convert(model, exact=False)
    for _ in range(STEPS):
        revfx.testing.assert_same_grads(rounding, model, [x], rtol=1e-4)
    assert 0 < coded(rounding) < coded(converted), "couplings that only add have none"


@pytest.mark.parametrize(
    ("step", "by"),
    [
        (lambda a, h: a + h, operator.sub),
        (lambda a, h: h + a, operator.sub),
        (lambda a, h: a - h, operator.add),
        (lambda a, h: h - a, None),
        (lambda a, h: torch.add(a, h, alpha=2), None),
    ],
    ids=["a + h", "h + a", "a - h", "h - a", "a + 2h"],
)
def test_sums_of_tensors_are_left_to_the_codec(
    step: Callable[[Tensor, Tensor], Tensor], by: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which computes the prediction in the same pass."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fs = mlps(4, D)

        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            for f in self.fs:
                a, b = b, step(a, f(b))
            return torch.cat((a, b), -1)

    seen: list[Any] = []
    encode = codec.encode

    def noted(x: Tensor, prediction: Prediction, *args: Any) -> Code:
        seen.append(prediction.by)
        return encode(x, prediction, *args)

    monkeypatch.setattr(codec, "encode", noted)
    model = Net()
    converted = revfx.convert(copy.deepcopy(model))
    inputs = [torch.randn(ROWS, 2 * D)]
    for got, want in zip(steps(converted, converted, inputs), steps(model, model, inputs), strict=True):
        assert torch.equal(bits(got), bits(want))
    assert len(seen) > 0 and set(seen) == {by}

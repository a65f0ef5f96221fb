"""Sums in which an operand disappears next to what is added to it: masks of -1e9, of the lowest number, of -inf."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import deep_but, fp64, mlp, mlps, relative_error
from torch import Tensor, nn
from zoo import ZOO, Additive, D

import revfx
from revfx.compiled.partitioner import reports
from revfx.testing import gradients, measure_memory


__all__ = ["fp64"]  # every test of this file runs in fp64

ROWS, WIDTH = 64, 20
LOWEST = torch.finfo(torch.float64).min
HUGE = [-1e9, 1e12, LOWEST, -torch.inf]


class Scaled(nn.Module):
    """An elementwise function: what it makes of one element shows nowhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.w).tanh()


class Masked(nn.Module):
    """Couplings, and a mask that is added to one element of a stream behind them."""

    mask: Tensor

    def __init__(self, value: float, make: Callable[[], nn.Module], depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(2 * WIDTH, 2 * WIDTH)
        self.f, self.g = (nn.ModuleList(make() for _ in range(depth)) for _ in "fg")
        mask = torch.zeros(ROWS, WIDTH)
        mask[7, 2] = value
        self.value = value
        self.register_buffer("mask", mask)

    def masked(self, a: Tensor) -> Tensor:
        return a + self.mask

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.stem(x).chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            b = b + g(a)
        return self.masked(a), b


class Filled(Masked):
    """The mask is made in the forward."""

    def masked(self, a: Tensor) -> Tensor:
        return a + torch.zeros_like(a).masked_fill(self.mask != 0, self.value)


class Early(Masked):
    """Masked before the last couplings: the number stays in the stream, and is lost once."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.stem(x).chunk(2, -1)
        for i, (f, g) in enumerate(zip(self.f, self.g, strict=True)):
            a = a + f(b)
            b = b + g(a)
            if i == 0:
                a = a + self.mask
        return a, b


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    a, b = x.chunk(2, -1)
    return a, b


def loss(out: tuple[Tensor, Tensor]) -> Tensor:
    """What sees the row of the mask much more than the others."""
    a, b = out
    return 0.01 * b.square().mean() + (b[7] - 1).square().sum() + a[7].softmax(-1).square().sum()


def error(got: nn.Module, model: nn.Module, x: Tensor) -> float:
    ours, plain = (gradients(m, [x], loss) for m in (got, model))
    return relative_error([*ours.values()], [*plain.values()])


@pytest.mark.parametrize("make", [lambda: mlp(WIDTH), Scaled])
@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize("kind", [Masked, Early])
def test_convert_keeps_what_a_mask_hides(kind: type[Masked], value: float, make: Any) -> None:
    if kind is Early and value == -torch.inf:
        return  # plain gradients are NaN
    model, x = kind(value, make, depth=6), torch.randn(ROWS, 2 * WIDTH, requires_grad=True)
    converted: Any = revfx.convert(copy.deepcopy(model))
    assert error(converted, model, x) < 1e-9
    assert converted.revfx.kept_cuts == 3, "one more: the cut before the mask"


class Added(nn.Module):
    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.inner = mlp(WIDTH)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.mask


class Blind(nn.Module):
    """A function that does not see the element of the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.cat([x[:, :2], x[:, 3:], x[:, :1]], -1)).tanh()


@pytest.mark.parametrize("value", HUGE)
def test_rev_block_keeps_what_a_function_hides(value: float) -> None:
    f: list[nn.Module] = [mlp(WIDTH) for _ in range(4)]
    f[2] = Added(Masked(value, Blind).mask)
    g = [*mlps(2, WIDTH), Blind(), Blind()]

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.all = nn.Linear(2 * WIDTH, 2 * WIDTH), nn.ModuleList([*f, *g])

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return revfx.rev_block(*halves(self.stem(x)), f, g, 4)

    model = Chain()
    x = torch.randn(ROWS, 2 * WIDTH, requires_grad=True)
    ours = gradients(model, [x], loss)
    with revfx.testing.store_activations():
        plain = gradients(model, [x], loss)
    assert relative_error([*ours.values()], [*plain.values()]) < 1e-9


@pytest.mark.parametrize("value", [-1e4, -1e9, -3e38])
def test_gradients_in_float32_are_those_of_plain_autograd(value: float) -> None:
    model, x = Masked(value, lambda: mlp(WIDTH)).float(), torch.randn(ROWS, 2 * WIDTH, dtype=torch.float32)
    assert error(revfx.convert(copy.deepcopy(model)), model, x.requires_grad_()) < 2e-5


def compiled(model: nn.Module) -> Any:
    torch.compiler.reset()
    return torch.compile(copy.deepcopy(model), backend="revfx", options={"inner": "aot_eager"})


@pytest.mark.parametrize(("kind", "value"), [(Masked, -1e9), (Masked, LOWEST), (Filled, -torch.inf), (Early, 1e12)])
def test_compiled_graphs_keep_what_masks_hide(kind: type[Masked], value: float) -> None:
    model, x = kind(value, Scaled), torch.randn(ROWS, 2 * WIDTH, requires_grad=True)
    with reports() as found:
        assert error(compiled(model), model, x) < 1e-9
    assert found[0].regions


class Asked(Masked):
    """The mask comes in with the data."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a, b = self.stem(x).chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            a = a if mask is None or f is not self.f[1] else a + mask
            b = b + g(a)
        return a, b


def test_compiled_graphs_are_right_for_masks_that_are_inputs() -> None:
    model, x = Asked(0.0, Scaled, depth=6), torch.randn(ROWS, 2 * WIDTH, requires_grad=True)
    mask = Masked(-1e9, Scaled).mask
    plain = gradients(model, [x, mask], loss)
    with reports() as found:
        ours = gradients(compiled(model), [x, mask], loss)
    assert relative_error([*ours.values()], [*plain.values()]) < 1e-9
    assert found[0].regions


COMPILED = ("additive", "leapfrog", "momentum", "masked by where", "side inputs", "transformer")


@pytest.mark.parametrize("name", deep_but(("masked by where", "transformer"), COMPILED))
def test_compiled_zoo_stores_nothing_for_it(name: str) -> None:
    make, inputs = ZOO[name]
    with reports() as found:
        compiled(make(3))(*(t.requires_grad_() if t.is_floating_point() else t for t in inputs(8)))
    assert [region.kept_cuts for r in found for region in r.regions] == [2]


# --- what is no loss keeps nothing
class Outliers(Additive):
    """A stream with a few huge elements from the start, as transformers have them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * torch.ones_like(x).index_fill(-1, torch.tensor([1, 20]), 1e5))


class Growing(Additive):
    """Some columns of what f gives are large, later ones more so."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        with torch.no_grad():
            for i, f in enumerate(self.f):
                [*f.parameters()][-1][3] += 20 * (i + 1)


class Pushed(nn.Module):
    """Velocities that start as zeros, or tiny."""

    def __init__(self, depth: int, start: float = 0.0) -> None:
        super().__init__()
        self.f, self.start = nn.ModuleList(mlp(2 * D) for _ in range(depth)), start

    def forward(self, x: Tensor) -> Tensor:
        v = self.start * torch.tanh(x)
        for f in self.f:
            v = v + f(x)
            x = x + 0.1 * v
        return x + v


class Started(Additive):
    """Functions whose last layers start as zeros, but for one."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        for f in [*self.f, *self.g][1:]:
            for p in [*f.parameters()][-2:]:
                nn.init.zeros_(p)


KEEP_NOTHING: dict[str, Callable[[int], nn.Module]] = {
    "outliers": Outliers,
    "growing": Growing,
    "zero velocity": Pushed,
    "tiny velocity": lambda depth: Pushed(depth, 1e-12),
    "zero branches": Started,
}


@pytest.mark.filterwarnings("ignore:.*couplings in a row")
@pytest.mark.parametrize("dtype", deep_but((torch.float32,), (torch.float64, torch.float32, torch.bfloat16)))
@pytest.mark.parametrize("name", KEEP_NOTHING)
def test_ordinary_streams_keep_as_many_cuts_at_any_depth(name: str, dtype: torch.dtype) -> None:
    kept: list[int] = []
    for depth in (4, 12):
        converted: Any = revfx.convert(KEEP_NOTHING[name](depth).to(dtype))
        converted(torch.randn(ROWS, 2 * D, dtype=dtype, requires_grad=True))
        kept.append(converted.revfx.kept_cuts)
    assert kept[0] == kept[1] <= 4


@pytest.mark.parametrize("name", [n for n in ZOO if n != "two stages"])
def test_the_zoo_keeps_its_first_and_last_cut(name: str) -> None:
    make, inputs = ZOO[name]

    def kept(seed: int) -> int:
        torch.manual_seed(seed)
        converted: Any = revfx.convert(make(12).float())
        converted(*(t.float().requires_grad_() if t.is_floating_point() else t for t in inputs(256)))
        return converted.revfx.kept_cuts

    assert any(kept(seed) == 2 for seed in range(3)), "one more is kept where a sum is exactly zero by chance"


def test_memory_does_not_grow_behind_a_mask() -> None:
    peaks: list[int] = []
    x = torch.randn(ROWS, 2 * WIDTH, requires_grad=True)
    for depth in (4, 12):
        model = Early(-torch.inf, Scaled, depth)
        converted = revfx.convert(model)
        weights = sum(p.nbytes for p in model.parameters())
        peaks.append(measure_memory(lambda call=converted: loss(call(x))).peak - weights)
    assert peaks[1] - peaks[0] < x.nbytes

"""Ties that nothing foresees are seen when functions run again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import loss_of
from torch import Tensor, nn

import revfx
from revfx.eager.branches import SIDES, BranchSamples
from revfx.errors import RegenerationError
from revfx.testing import store_activations


N, D = 32, 16
Compares = Callable[[Tensor], Tensor]


def _with(function: Callable[..., Tensor], other: object) -> Compares:
    return lambda x: function(x, other)


# What each operation compares, with the number at which it has a kink or a jump.
OPERATIONS: dict[str, tuple[Compares, float]] = {
    "relu": (torch.relu, 0.0),
    "relu_": (lambda x: x.clone().relu_(), 0.0),
    "leaky_relu": (F.leaky_relu, 0.0),
    "elu": (F.elu, 0.0),
    "_prelu_kernel": (lambda x: F.prelu(x, torch.ones(1)), 0.0),
    "abs": (torch.abs, 0.0),
    "sgn": (torch.sgn, 0.0),
    "sign": (torch.sign, 0.0),
    **{name: (_with(getattr(torch, name), 2.0), 2.0) for name in "eq ne lt le gt ge".split()},
    **{name: (_with(getattr(torch, name), torch.full((D,), 2.0)), 2.0) for name in "maximum minimum fmax fmin".split()},
    "remainder": (lambda x: x.remainder(2.0), 2.0),
    "fmod": (lambda x: x.fmod(2.0), 2.0),
    "floor_divide": (lambda x: x // 2.0, 2.0),
    "clamp": (lambda x: x.clamp(max=2.0), 2.0),
    "clamp of tensors": (lambda x: x.clamp(torch.zeros(D), torch.full((D,), 2.0)), 2.0),
    "clamp_min": (lambda x: x.clamp_min(2.0), 2.0),
    "clamp_max": (lambda x: x.clamp_max(torch.full((D,), 2.0)), 2.0),
    "hardswish": (F.hardswish, 3.0),
    "hardsigmoid": (F.hardsigmoid, -3.0),
    "softshrink": (lambda x: F.softshrink(x, 0.25), 0.25),
    "hardshrink": (F.hardshrink, -0.5),
    "hardtanh": (F.hardtanh, 1.0),
    "relu6": (F.relu6, 6.0),
    "threshold": (lambda x: F.threshold(x, 2.0, 0.0), 2.0),
    "floor": (torch.floor, 2.0),
    "ceil": (torch.ceil, 2.0),
    "round": (torch.round, 2.5),
    "round to a digit": (lambda x: torch.round(x, decimals=1), 2.25),
    "trunc": (torch.trunc, 2.0),
    "_to_copy": (Tensor.long, 2.0),
}


def test_every_operation_has_a_sample() -> None:
    assert SIDES.keys() <= OPERATIONS.keys()


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_that_stands_on_its_kink(name: str) -> None:
    compares, at = OPERATIONS[name]
    sides = BranchSamples(1, 1, [torch.float32], 0.0)
    ties = torch.where(torch.arange(N * D).view(N, D) % 3 == 0, at, 77.77)
    noise = 4e-7 * max(abs(at), 1.0) * torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    with sides.noted(0):
        compares(ties)
    with sides.compared(0, "`f`"):
        compares(ties)
    with pytest.raises(RegenerationError, match=r"^`f`: `\w+` compares numbers that rounding moves to its other side"):
        with sides.compared(0, "`f`"):
            compares(ties + noise)


@pytest.mark.parametrize("name", OPERATIONS)
def test_rounding_moves_nothing_across_a_kink_elsewhere(name: str) -> None:
    compares, _ = OPERATIONS[name]
    sides = BranchSamples(1, 1, [torch.float32], 0.0)
    x = 3 * torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    with sides.noted(0):
        compares(x)
    with sides.compared(0, "`f`"):
        compares(x * (1 + 1e-6))


@pytest.mark.parametrize(
    "compares",
    [
        lambda x: torch.complex(x, x) == x,
        lambda x: torch.complex(x, x).abs(),
        lambda x: torch.relu(x.relu().to_sparse()),
        lambda x: torch.nested.nested_tensor([*x]).relu(),
        lambda x: x.to(torch.float8_e4m3fn).float().to(torch.float8_e5m2).to(torch.float32),
        lambda x: torch.relu(x[:0]) + torch.relu(x.to("meta")).shape[0],
        lambda x: torch.relu(torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)),
        lambda x: torch.vmap(torch.relu)(x).clamp(None, x.amax()),
        lambda x: (x > 0) == (x.long() > 1),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantize.*")
def test_numbers_that_can_not_be_read_are_left_alone(compares: Compares) -> None:
    sides, x = BranchSamples(1, 1, [torch.float32], 0.0), torch.randn(N, D)
    with sides.noted(0):
        compares(x)
    with sides.compared(0, "`f`"):
        compares(x)


class TwoWays(nn.Module):
    """Compares a stream with what it was, by numbers that are computed in two ways; one layer adds zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.h = (nn.ModuleList(nn.Linear(D, D) for _ in range(5)) for _ in range(3))
        for p in self.f[2].parameters():
            nn.init.zeros_(p)

    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for f, g, h in zip(self.f, self.g, self.h, strict=True):
            before = a
            a = a + f(b).tanh()
            ways = a.std(-1, keepdim=True), before.var(-1, keepdim=True).sqrt()
            c = c + g(torch.maximum(*ways).expand_as(a))
            b = b + h(c).tanh()
        return a, b, c


def test_a_converted_model_that_compares_what_it_computed_in_two_ways() -> None:
    torch.manual_seed(0)
    converted = revfx.convert(TwoWays())
    x = [torch.randn(16 * N, D) for _ in range(3)]
    with pytest.raises(RegenerationError, match=r"`maximum` .*test_branches.py:\d+\): `maximum` compares"):
        loss_of(converted(*x)).backward()
    converted.zero_grad()
    with store_activations():
        loss_of(converted(*x)).backward()
    assert all(p.grad is not None for p in converted.parameters())


def test_numbers_of_the_data_in_a_rev_block() -> None:
    torch.manual_seed(0)
    linear, places = nn.Linear(D, D), (torch.arange(D) < D // 2).float()
    x1, x2 = (torch.randn(N, D, requires_grad=True) for _ in range(2))
    numbers = x1.detach()  # none that a stream is looked through for

    def adds_in_places(x: Tensor) -> Tensor:
        return linear(x).tanh() * places

    def compares(x: Tensor) -> Tensor:
        return linear(torch.relu(x - numbers))

    y1, y2 = revfx.rev_block(x1, x2, [adds_in_places, *[linear] * 3], [compares] * 4, 4)
    with pytest.raises(RegenerationError, match="`relu` compares numbers that rounding moves to its other side"):
        (y1.sum() + y2.sum()).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_ordinary_kinks_stand_where_they_stood(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    f, g = ([nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D)) for _ in range(6)] for _ in range(2))
    block = revfx.RevBlock(f, g, len(f)).to(dtype)
    for _ in range(3):
        x = [torch.randn(256, D, dtype=dtype, requires_grad=True) for _ in range(2)]
        loss_of(block(*x)).backward()
    assert all(p.grad is not None for p in block.parameters())


def watched_calls(blocks: Sequence[revfx.RevBlock], times: int) -> list[bool]:
    """Whether the functions of each call were looked into, of all blocks in turn."""
    watched: list[bool] = []
    made = revfx.eager.executor.RegionRun.__init__

    def noting(self: revfx.eager.executor.RegionRun, *args: Any) -> None:
        made(self, *args)
        watched.append(self.branches.watches(1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(revfx.eager.executor.RegionRun, "__init__", noting)
        for _ in range(times):
            for block in blocks:
                block(torch.randn(2, 3, requires_grad=True), torch.randn(2, 3))
    return watched


def test_the_first_calls_are_watched_and_then_fewer() -> None:
    block = revfx.RevBlock(lambda: nn.Linear(3, 3), torch.tanh, 3)
    assert watched_calls([block], 9) == [True, True, False, True, False, False, False, True, False]


def test_blocks_of_equal_shapes_are_watched_apart() -> None:
    blocks = [revfx.RevBlock(lambda: nn.Linear(3, 3), torch.tanh, 2) for _ in range(5)]
    assert watched_calls(blocks, 3) == [*[True] * 10, *[False] * 5]


def test_functions_that_are_made_anew_are_known_by_their_code() -> None:
    plain = [lambda x: x * 0.5 for _ in range(3)]
    found: list[bool] = []
    for f in plain:
        found += watched_calls([revfx.RevBlock([f], [f], 1)], 1)
    assert found == [True, True, False]


def test_of_many_steps_some_are_watched() -> None:
    found = [
        sum(map(BranchSamples(4, steps, [torch.float32], 0.0).watches, range(steps))) for steps in (6, 1024, 20_000)
    ]
    assert found == [6, 1024, 1053]

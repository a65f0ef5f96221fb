"""Converted models whose forward is another one in each call: attributes, arguments, random numbers, indices."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from helpers import kept_cuts, regions_of
from steps import STEPS, assert_same_bits, assert_steps_like_plain
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import Additive, D, Pairs, mlp

import revfx
from revfx.testing import assert_same_grads


def _x(n: int = 6) -> Tensor:
    return torch.randn(n, 2 * D, requires_grad=True)


class Options(Pairs):
    """Its Python code reads attributes, arguments and the training flag."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.use, self.scales = depth, [1.0] * depth

    def forward(
        self, x: Tensor, scale: float = 1.0, *, extra: dict[str, Tensor] | None = None, **more: Tensor
    ) -> dict[str, Any]:
        a, b = x.chunk(2, -1)
        for f, g, s in list(zip(self.f, self.g, self.scales, strict=True))[: self.use]:
            a = a + s * f(b)
            b = b + scale * g(a)
        if extra is not None:
            a = a + extra["bias"]
        for t in more.values():
            b = b + t
        return {"out": torch.cat([a, b], -1), "shape": (len(x), x.shape[-1]), "none": None}


def test_python_code_sees_changed_attributes_and_arguments(fp64: None) -> None:
    model = Options(4)
    converted: Any = revfx.convert(model)
    x, bias = _x(), torch.randn(D, requires_grad=True)

    def check(*args: Any, **kwargs: Any) -> None:
        for _ in range(STEPS):
            got, want = converted(*args, **kwargs), model(*args, **kwargs)
            assert got.keys() == want.keys() and got["shape"] == want["shape"] and got["none"] is None
            assert torch.equal(got["out"], want["out"])
            wanted = [x, *model.parameters()]
            mine = torch.autograd.grad(got["out"].sin().sum(), wanted, allow_unused=True)
            assert_same_bits(mine, torch.autograd.grad(want["out"].sin().sum(), wanted, allow_unused=True))

    check(x)
    check(x, 2.0)
    check(x, scale=3.0, extra={"bias": bias}, another=bias, third=bias * 2)
    model.use = converted.use = 3
    check(x)
    model.scales[1] = 0.5  # the list is shared
    check(x)
    assert len(converted.revfx.plans) == 3


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Additive(3), Additive(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x) if x.sum() > 0 else self.second(-x)


def test_root_that_depends_on_values(fp64: None) -> None:
    model = DataDependent()
    converted: Any = revfx.convert(model)
    copied: Any = copy.deepcopy(converted)
    for _ in range(2 * STEPS):
        x = _x()
        for m in (converted, copied):
            assert_same_grads(m, model, [x])
    assert converted.revfx.refusals == () and kept_cuts(converted) > 0
    assert list(converted.state_dict()) == list(model.state_dict())


class CountsCalls(Pairs):
    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            b = b + g(a)
        return torch.cat([a, b], -1)


def test_python_side_effects_of_the_root_are_never_lost(fp64: None) -> None:
    converted, _ = assert_steps_like_plain(lambda: CountsCalls(3), [_x()], state=lambda m: m.calls)
    assert converted.calls == STEPS and kept_cuts(converted) == 2


class SkipsAtRandom(Pairs):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            if random.random() < 0.5:
                a = a + f(b)
                b = b + g(a)
        return torch.cat([a, b], -1)


def test_draws_from_pythons_random_are_never_baked_in(fp64: None) -> None:
    def make() -> nn.Module:
        random.seed(4)
        return SkipsAtRandom(8)

    converted, _ = assert_steps_like_plain(make, [_x()], count=12)
    assert regions_of(converted)


OWN = torch.Generator()
DRAWS: dict[str, Callable[[], Any]] = {
    "Python's random": random.random,
    "NumPy": lambda: float(numpy.random.rand()),
    "a generator of its own": lambda: torch.rand((), generator=OWN),
}


class ScalesAtRandom(nn.Module):
    def __init__(self, draw: Callable[[], Any] | None) -> None:
        super().__init__()
        self.inner, self.draw, self.drawn = mlp(), draw, list[Any]()

    def forward(self, x: Tensor) -> Tensor:
        if self.draw is None:
            return self.inner(x)
        self.drawn.append(self.draw())
        return self.inner(x) * (0.5 + self.drawn[-1])


def _seed() -> None:
    random.seed(3)
    numpy.random.seed(3)
    OWN.manual_seed(3)


@pytest.mark.parametrize("generator", DRAWS)
def test_function_that_draws_from_another_generator(generator: str, fp64: None) -> None:
    def make() -> nn.Module:
        _seed()
        model = Additive(6)
        for number in range(6):
            model.f[number] = ScalesAtRandom(DRAWS[generator] if number == 3 else None)
        return model

    converted, _ = assert_steps_like_plain(make, [_x()], state=lambda m: m.f[3].drawn)
    (region,) = regions_of(converted)
    assert sum(s.is_inverted for s in region.steps) >= 10 and kept_cuts(converted) == 2


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 3


class Contexts(Pairs):
    """Grad mode, autocast, a custom function, noise and a detached branch in the root's own code."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            with torch.no_grad():
                c = torch.tanh(b)
            a = a + f(b) * 0.5 + c
            b = b + g(Straight.apply(a)) + 0.1 * F.dropout(a, 0.5) * torch.rand_like(a) + a.detach()
        return torch.cat([a, b], -1)


def test_contexts_custom_functions_and_noise_in_the_root(fp64: None) -> None:
    converted, _ = assert_steps_like_plain(lambda: Contexts(3), [_x()])
    assert regions_of(converted)


class ReadsAGlobal(Pairs):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b) * TABLE["scale"]
            b = b + g(a)
        return torch.cat([a, b], -1)


TABLE = {"scale": torch.tensor(2.0)}


def test_tensor_that_is_nowhere_registered(fp64: None) -> None:
    def make() -> nn.Module:
        TABLE["scale"] = torch.tensor(2.0)
        return ReadsAGlobal(3)

    def replace(*_: Any) -> None:
        TABLE["scale"] = TABLE["scale"] + 0.5

    converted, _ = assert_steps_like_plain(make, [_x()], replace)
    assert kept_cuts(converted) == 2


def test_permutation_that_changes_is_read_again(fp64: None) -> None:
    from zoo import ChannelShuffle

    model = ChannelShuffle(4)
    converted: Any = revfx.convert(model)

    def check() -> None:
        for _ in range(STEPS):
            assert_same_grads(converted, model, [_x()])

    check()
    assert kept_cuts(converted) == 2
    model.order.copy_(torch.randperm(2 * D))
    check()
    model.order[0] = model.order[1]
    check()
    assert len(converted.revfx.plans) == 1


class ReadsAnOrder(Pairs):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = (a + f(b))[:, ORDER[0]]
            b = b + g(a)
        return torch.cat([a, b], -1)


ORDER: list[Tensor] = []


def test_indices_are_checked_in_each_call(fp64: None) -> None:
    """Later tensors may lie where earlier ones did, and have their id."""
    model, ids = ReadsAnOrder(3), set[int]()
    converted: Any = revfx.convert(model)
    for number in range(60):
        ORDER.clear()
        is_permutation = number < 5 or number % 2 == 0
        ORDER.append(torch.randperm(D))
        for _ in range(0 if is_permutation else 50):
            ORDER[0] = torch.randint(D, (D,))
            if id(ORDER[0]) in ids:
                break
        ids.add(id(ORDER[0]))
        assert_same_grads(converted, model, [_x()])

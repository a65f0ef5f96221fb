"""Changes after a plan was made: inside of modules, of weights, of flags, by hooks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import kept_cuts
from torch import Tensor, nn
from torch.nn import functional as F
from training import assert_same_steps
from zoo import D, Pairs, mlp

import revfx
from revfx.errors import RevfxWarning
from revfx.world.values import GlobalReads


pytestmark = pytest.mark.usefixtures("fp64")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A refusal is as good as a plan here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RevfxWarning)
        yield


def x_() -> Tensor:
    return torch.randn(6, 2 * D, requires_grad=True)


class Written(nn.Module):
    """Couplings that write in place to what f returns."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Linear(2 * D, 2 * D)
        self.f, self.g = nn.ModuleList(make() for _ in range(3)), nn.ModuleList(mlp() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).chunk(2, -1)
        a, b = a * 1, b * 1
        for f, g in zip(self.f, self.g, strict=True):
            h = f(b)
            h.mul_(2.0)
            a = a + h
            b = b + g(a)
        return torch.cat([a, b], -1)


class Box(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def additive(make: Callable[[], nn.Module]) -> Any:
    model: Any = Pairs(3)
    model.f, model.g = (nn.ModuleList(make() for _ in range(3)) for _ in range(2))
    model.forward = lambda x: _additive(model, x)
    return model


def _additive(model: Any, x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    for f, g in zip(model.f, model.g, strict=True):
        a = a + f(b)
        b = b + g(a)
    return torch.cat([a, b], -1)


# --- modules inside of f
@pytest.mark.parametrize("make", [lambda: nn.Dropout(0.5), lambda: Box(nn.Dropout(0.5))])
def test_dropout_that_comes_to_return_its_argument_is_seen(make: Callable[[], nn.Module]) -> None:
    model = Written(make)
    dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    converted: Any = revfx.convert(model)
    x = x_()
    assert_same_steps(converted, model, [x])
    for m in dropouts:
        m.eval()
    assert_same_steps(converted, model, [x])
    for m in dropouts:
        m.train()
    assert_same_steps(converted, model, [x])


class Threshold(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.tensor(101 / 255))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x - self.t) + x.tanh()


def _f(inner: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.Sequential(inner)), nn.Linear(D, D), nn.Dropout(0.5))


def test_module_deep_inside_that_is_replaced_is_seen() -> None:
    model = additive(lambda: _f(nn.Tanh()))
    converted: Any = revfx.convert(model)
    x = (torch.tensor([97, 98, 101, 101, 101, 104])[torch.randint(0, 6, (40, 2 * D))] / 255.0).requires_grad_()
    assert_same_steps(converted, model, [x])
    for f in (*model.f, *model.g):
        f[0][0][0] = Threshold()
    assert_same_steps(converted, model, [x], steps=5)


def test_flag_deep_inside_that_is_flipped_is_seen() -> None:
    model = additive(lambda: Box(nn.Sequential(nn.ReLU(), nn.Linear(D, D))))
    converted: Any = revfx.convert(model)
    x = x_().detach() * 1
    assert_same_steps(converted, model, [x])
    for m in model.modules():
        if isinstance(m, nn.ReLU):
            m.inplace = True
    assert_same_steps(converted, model, [x], steps=5)


def _frozen(f: Any) -> None:
    f.inner[0].requires_grad_(False)


def _hooked(f: Any) -> None:
    f.inner[0].register_forward_hook(lambda *_: None)


def _gone(f: Any) -> None:
    del f.inner[0].rate


def _class(f: Any) -> None:
    f.inner[0].__class__ = type("Other", (Counted,), {})


class Counted(nn.Module):
    """Sets attributes as it runs; its `rate` may be changed at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls, self.rate, self.sizes, self.log = nn.Linear(D, D), 0, 0.5, [1, 2], list[int]()
        self.trainer = {"step": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(self.calls)
        self.last = self.linear(x)
        return self.last * getattr(self, "rate", 0.5) * len(self.sizes)


@pytest.mark.parametrize("change", [_frozen, _hooked, _gone, _class])
def test_change_inside_is_seen(change: Callable[[nn.Module], None]) -> None:
    converted, model = _counting()
    assert_same_steps(converted, model, [x_()])
    for m in (converted, model):
        change(m.f[1])
    assert_same_steps(converted, model, [x_()])
    assert kept_cuts(converted) == 2
    assert _counts(converted) == _counts(model)


def _counting() -> tuple[Any, Any]:
    """Return a converted model that counts, and the same plain."""
    models: list[Any] = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(additive(lambda: Box(Counted())))
    return revfx.convert(models[0]), models[1]


def _counts(model: Any) -> list[tuple[int, list[int]]]:
    return [(f.inner[0].calls, f.inner[0].log) for f in (*model.f, *model.g)]


def test_rates_that_change_and_attributes_that_a_module_sets_itself_cost_no_region() -> None:
    converted, model = _counting()
    for step in range(6):
        for m in (converted, model):
            for f in m.f:
                f.inner[0].rate = 0.0 if step == 4 else 0.1 + step / 8
                f.inner[0].trainer["step"] = step
        assert_same_steps(converted, model, [x_()], steps=(step,))
    assert len(converted.revfx.plans) == 1 and kept_cuts(converted) == 2
    assert _counts(converted) == _counts(model)


# --- hooks
@pytest.mark.parametrize("make", [mlp, lambda: Box(mlp())])
def test_hook_that_returns_the_argument_which_the_root_writes_to(make: Callable[[], nn.Module]) -> None:
    model: Any = Written(make)
    hooked = model.f[1].inner[0] if isinstance(model.f[1], Box) else model.f[1]
    hooked.register_forward_hook(lambda m, args, out: args[0])
    assert_same_steps(revfx.convert(model), model, [x_()])


def test_hooks_that_look_on_and_writes_to_new_tensors_leave_the_plan() -> None:
    def forward(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(model.f, model.g, strict=True):
            a = a + f(b).mul(2.0).mul_(0.5)
            b = b + g(a)
        return torch.cat([a, b], -1)

    model = additive(mlp)
    model.forward = forward
    seen: list[int] = []
    model.f[1].register_forward_hook(lambda *_: seen.append(1))
    converted: Any = revfx.convert(model)
    assert_same_steps(converted, model, [x_()])
    assert len(seen) == 6, "once in each forward of either model"
    assert kept_cuts(converted) == 2


def test_a_variable_that_is_not_assigned_yet_does_not_shift_the_ones_after_it() -> None:
    def forward() -> tuple[float, float]:
        return early, scale

    scale = 2.0
    reads = GlobalReads([forward])
    early, scale = 1.0, 3.0
    reads.put_back()
    assert forward() == (1.0, 2.0)

"""Settings of the whole process that differ between the forward and the backward."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from compiled import QUIET
from helpers import WAYS, block, both, fp64 as fp64, leaf, lines, loss_of, mlp, relative_error
from steps import STEPS, assert_same_bits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from revfx import _torch, ambient
from revfx.engine import dispatch
from revfx.testing import measure_memory


def settings() -> Any:
    functions: Any = torch.overrides
    return _torch.kernel_settings(), dispatch.has_modes(), functions._get_current_function_mode_stack()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.qkv(x)[:, None].chunk(3, -1))[:, 0]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * torch.tensor([0.1] * 4)


@contextmanager
def single() -> Generator[None]:
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float64)


class InFunctions(TorchFunctionMode):
    """Simulates a layer of low precision."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out + (out.detach().bfloat16().to(out.dtype) - out.detach()) if func is F.linear else out


class InOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out.bfloat16().to(out.dtype) if func is torch.ops.aten.addmm.default else out


class Products(nn.Module):
    """Few operations, which are layout and arithmetic but for one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(0, 1)).view(x.shape) * 0.5


SETTINGS = {
    "sdpa": (Attention, lambda: sdpa_kernel(SDPBackend.MATH)),
    "dtype": (Scaled, single),
    "function mode": (Products, InFunctions),
    "dispatch mode": (Products, InOperators),
    "both": (Products, lambda: both_of(InFunctions(), InOperators())),
}


@contextmanager
def both_of(*modes: Any) -> Generator[None]:
    with modes[0], modes[1]:
        yield


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("make", "around"), SETTINGS.values(), ids=SETTINGS)
def test_settings_around_the_forward_or_the_backward(
    way: str, make: Callable[[], nn.Module], around: Callable[[], Any], fp64: None
) -> None:
    fs, gs = (nn.ModuleList(make() for _ in range(3)) for _ in range(2))
    x = [leaf(2, 5, 4), leaf(2, 5, 4)]
    wanted = [*x, *both(fs, gs).parameters()]

    def step(call: Callable[..., Any], inside: bool) -> Any:
        if inside:
            with around():
                loss = loss_of(call(*x))
            return torch.autograd.grad(loss, wanted)
        loss = loss_of(call(*x))
        before = settings()
        with around():
            there = settings()
            found = torch.autograd.grad(loss, wanted)
            assert settings() == there != before, "they are put back"
        return found

    plain, call = lines(fs, gs), block(way, fs, gs)
    assert relative_error(step(plain, True), step(plain, False)) > 1e-9 or make is Attention
    for inside in (True, False, True):
        for _ in range(STEPS):
            assert_same_bits(step(call, inside), step(plain, inside))


@QUIET
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("half", [False, True], ids=["no autocast", "autocast"])
@pytest.mark.parametrize("way", WAYS)
def test_functions_compiled_by_themselves_are_compiled_once(way: str, half: bool, cached: bool) -> None:
    torch.compiler.reset()
    x, functions, counters = leaf(2, 5, 4, dtype=torch.float32), [Products().float() for _ in "fg"], [0, 0]

    def counting(number: int) -> Callable[..., Any]:
        def backend(gm: Any, _: Any) -> Any:
            counters[number] += 1
            return gm.forward

        return backend

    def step(call: Callable[..., Any]) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=cached):
            loss = loss_of(call(x, x))
        return torch.autograd.grad(loss, [x, *(p for f in functions for p in f.parameters())])

    fs, gs = functions[:1] * 3, functions[1:] * 3
    expected = step(lines(fs, gs))
    for number, f in enumerate(functions):
        f.compile(backend=counting(number))
    call = block(way, fs, gs)
    for _ in range(STEPS):
        assert_same_bits(step(call), expected)
    assert counters == [1, 1]


def test_autocast_is_noted_for_the_accelerator_that_torch_was_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(ambient, "device_types", ambient.device_types.__wrapped__)
    off = ambient.ambient_state()
    with torch.autocast("xpu", torch.bfloat16):
        assert ambient.ambient_state() != off
    assert ambient.ambient_state() == off


@pytest.mark.parametrize("inside", [True, False])
def test_casts_of_streams_are_let_go_after_each_replay(inside: bool) -> None:
    torch.set_default_dtype(torch.float32)  # fp64 is not cast
    x, f, g = leaf(256, 64, dtype=torch.float32), *(nn.Linear(64, 64) for _ in "fg")
    for p in (*f.parameters(), *g.parameters()):
        nn.init.normal_(p, std=1e-3)

    def peak(depth: int) -> int:
        def step() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return loss_of(block("rev_block", [f] * depth, [g] * depth)(x, x))

        with torch.autocast("cpu", torch.bfloat16) if inside else nullcontext():
            for _ in range(STEPS):  # the second call finds weights in autocast's cache, so it is learnt again
                step().backward()
            return measure_memory(step).peak

    codes = 24 * x.nbytes / 4 * 0.45
    assert peak(16) == pytest.approx(peak(4) + codes / 2, abs=codes / 2 + x.nbytes / 4)


class Counts(TorchDispatchMode):
    """Counts from zero each time that it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __enter__(self) -> Any:
        self.products = 0
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
        return func(*args, **(kwargs or {}))


def products(call: Callable[..., Any], mode: Callable[[], Any], x: list[Tensor]) -> list[Any]:
    """Return the products, or their costs, that modes count around a forward, around a backward, and around both."""
    with mode() as forward:
        call(*x)
    loss = loss_of(call(*x))
    with mode() as backward:
        loss.backward()
    with mode() as around:
        loss_of(call(*x)).backward()
    return [m.products if isinstance(m, Counts) else m.get_total_flops() for m in (forward, backward, around)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", [Counts, lambda: FlopCounterMode(display=False)], ids=["a user's", "torch's"])
def test_modes_count_a_forward_as_plain_and_each_replay_once(way: str, mode: Callable[[], Any], fp64: None) -> None:
    fs, gs = (nn.ModuleList(mlp() for _ in range(3)) for _ in range(2))
    x, call = [leaf(5, 4), leaf(5, 4)], block(way, fs, gs)
    plain = products(lines(fs, gs), mode, x)
    for _ in range(STEPS):
        loss_of(call(*x)).backward()
    forward, backward, around = products(call, mode, x)
    assert (forward, around) == (plain[0], plain[2]), "a forward under a mode runs as it is"
    assert plain[1] <= backward <= plain[0] + plain[1]
    assert not dispatch.has_modes()

"""Situations of ordinary scripts: numbers that change from step to step, large buffers, modes that look on, threads."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers import fp64 as fp64, kept_cuts, leaf, loss_of, mlp, mlps
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from training import assert_same_steps, twins
from ways import BUILD

import revfx
from revfx import _torch
from revfx.ambient import set_variable
from revfx.engine.call import UnitCall
from revfx.engine.observe import Observer, observer
from revfx.errors import RevfxWarning
from revfx.plan import model
from revfx.testing import WARM_UPS, measure_memory


pytestmark = pytest.mark.usefixtures("fp64")
step = 0  # such as a training loop leaves behind


class Stepped(nn.Module):
    """Couplings that read a number of theirs, by a name that stands for something else in the script."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = (nn.ModuleList(mlp() for _ in range(3)) for _ in "fg")
        self.step, self.temperature = 2.0, 1.0

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b) * self.step
            b = b + g(a) / self.temperature
        return torch.cat([a, b], -1)


@pytest.fixture
def learnt(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call that learns."""
    times, find = list[int](), model.find_couplings

    def counted(*args: Any) -> Any:
        times.append(1)
        return find(*args)

    monkeypatch.setattr(model, "find_couplings", counted)
    return times


# --- numbers
def test_a_global_with_the_name_of_an_attribute_is_none_of_the_models(learnt: list[int]) -> None:
    global step
    plain = Stepped()
    converted: Any = revfx.convert(plain)
    for step in range(5):  # noqa: B007
        assert_same_steps(converted, plain, [leaf(5, 8)], steps=1)
    assert len(learnt) == 1 and kept_cuts(converted) == 2


def test_an_annealed_attribute_is_a_number_of_the_call(learnt: list[int]) -> None:
    plain, x = Stepped().float(), torch.randn(64, 8, dtype=torch.float32, requires_grad=True)
    converted: Any = revfx.convert(plain)
    for k in range(8):
        plain.temperature = 0.9**k
        assert_same_steps(converted, plain, [x], steps=1)
    assert len(learnt) == 1 and kept_cuts(converted) == 2


class Powers(Stepped):
    """Reads its number where a tensor would not do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) ** max(1.0, self.temperature)


def test_an_annealed_attribute_never_switches_couplings_off(learnt: list[int]) -> None:
    plain, x = Powers(), leaf(64, 8)
    converted: Any = revfx.convert(plain)
    kept = measure_memory(lambda: converted(x).square().mean()).kept
    for k in range(36):
        plain.temperature = 2 - 0.9**k
        assert_same_steps(converted, plain, [x], steps=1)
    assert measure_memory(lambda: converted(x).square().mean()).kept <= 1.1 * kept
    assert len(learnt) == 1 and kept_cuts(converted) == 2


class Nested(nn.Module):
    """A root that asks for a value, with parts of which one holds couplings."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.couplings = nn.Sequential(mlp(8), nn.Sequential(mlp(8))), Stepped()

    def forward(self, x: Tensor) -> Tensor:
        return self.couplings(self.plain(x * float(x.sum() > 0)))


def test_parts_of_a_root_that_asks_for_a_value_are_left_as_they_were() -> None:
    plain = Nested()
    converted: Any = revfx.convert(plain)
    for sign in (1.0, 1.0, 1.0, -1.0, 1.0, -1.0):
        x = (sign * leaf(5, 8).detach().abs()).requires_grad_()
        assert_same_steps(converted, plain, [x], steps=1)
        assert kept_cuts(converted) == 2 or not converted.revfx.regions[0].kept_cuts
    assert type(converted.plain) is nn.Sequential and converted.plain[1] is plain.plain[1]


def test_a_model_in_which_nothing_is_reversible_learns_no_more_than_twice(learnt: list[int]) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.calls = nn.ModuleList(mlp(8) for _ in range(4)), 0

        def forward(self, x: Tensor) -> Tensor:
            for f in self.layers:
                x = x + f(x)
            return x

    converted: Any = revfx.convert(Residual())
    with pytest.warns(RevfxWarning, match="nothing reversible was found"):
        converted(leaf(5, 8))
    for _ in range(200):
        converted.calls += 1
        converted(leaf(5, 8))
    assert len(learnt) <= 2


# --- buffers
class Masked(nn.Module):
    """Reads a large buffer, and counts its calls in a small one."""

    def __init__(self, size: int = 256) -> None:
        super().__init__()
        self.inner, self.mask = mlp(), nn.Buffer(torch.randn(size, size))
        self.calls = nn.Buffer(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x) * self.mask[:4, 0] * self.calls


@pytest.mark.parametrize("way", ["convert", "rev_block"])
def test_buffers_that_a_call_does_not_write_are_copied_by_none_but_the_first(way: str) -> None:
    fs, gs = (nn.ModuleList(Masked() for _ in range(4)) for _ in "fg")
    model, x = BUILD[way](fs, gs), leaf(5, 8)
    loss_of(model(x)).backward()
    mask = 256 * 256 * 8
    memory = measure_memory(lambda: loss_of(model(x)))
    grads = sum(p.numel() for p in model.parameters()) * 8
    assert memory.peak - grads < mask, "eight of them would be eight times as much"
    counted: list[Any] = [*fs, *gs]
    assert all(int(f.calls) == 2 + WARM_UPS for f in counted)


class Warms(nn.Module):
    """Begins to write to a buffer in its fourth call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.mean = mlp(), nn.Buffer(torch.zeros(1, 4))
        self.calls = nn.Buffer(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.inner(x)
        if self.calls > 3:
            self.mean.lerp_(h.detach().mean(0, True), 0.1)
        return h - self.mean


@pytest.mark.parametrize("way", ["convert", "rev_block"])
def test_a_buffer_that_is_written_late_is_right(way: str) -> None:
    torch.manual_seed(0)
    fs, gs = nn.ModuleList(Warms() for _ in range(3)), mlps(3)
    plain = BUILD["plain"](*copy.deepcopy((fs, gs)))
    assert_same_steps(BUILD[way](fs, gs), plain, [leaf(5, 8)], steps=8)


# --- threads
@pytest.mark.parametrize("way", ["convert", "rev_block"])
def test_functions_with_buffers_of_their_own_run_at_the_same_time(way: str) -> None:
    meeting, waits = threading.Barrier(2, timeout=20), list[bool]()

    class Waits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

        def forward(self, x: Tensor) -> Tensor:
            if waits:
                meeting.wait()  # breaks unless both models are here
            return self.inner(x)

    models = [BUILD[way](nn.ModuleList([mlp(), Waits(), mlp()]), nn.ModuleList(mlps(3))) for _ in "ab"]
    for m in models:
        loss_of(m(leaf(5, 8))).backward()
    waits.append(True)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            runs = [pool.submit(lambda m=m: loss_of(m(leaf(5, 8))).backward()) for m in models]
            for run in runs:
                run.result()


# --- modes and settings
class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", ["convert", "rev_block", "RevBlock"])
def test_a_mode_of_the_users_sees_the_operations_of_the_model_alone(way: str) -> None:
    fs, gs, x = [mlp() for _ in range(3)], [mlp() for _ in range(3)], leaf(5, 8)
    seen: dict[str, list[int]] = {"plain": [], way: []}
    for name, counts in seen.items():
        model = BUILD[name](nn.ModuleList(fs), nn.ModuleList(gs))
        for _ in range(4):
            with Counting() as mode:
                model(x)
            counts.append(mode.seen)
    assert seen[way] == seen["plain"]


CONTEXTS: dict[str, Callable[[], Any]] = {
    "sdpa": lambda: sdpa_kernel(SDPBackend.MATH),
    "oneDNN": lambda: torch.backends.mkldnn.flags(enabled=False),
}


class Within(nn.Module):
    """Couplings in a context that decides which kernels run."""

    def __init__(self, context: str, depth: int = 3) -> None:
        super().__init__()
        self.qkv, self.conv = (nn.ModuleList(k(8, n) for _ in range(depth)) for k, n in ((nn.Linear, 24), (conv, 8)))
        self.context = context

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        with CONTEXTS[self.context]():
            for qkv, convolve in zip(self.qkv, self.conv, strict=True):
                q, k, v = qkv(b)[:, None].chunk(3, -1)
                a = a + F.scaled_dot_product_attention(q, k, v)[:, 0]
                b = b + convolve(a.mT).mT
        return torch.cat([a, b], -1)


def conv(i: int, o: int) -> nn.Module:
    return nn.Conv1d(i, o, 3, padding=1)


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")  # torch's own, of these flags
@pytest.mark.parametrize("context", CONTEXTS)
def test_contexts_in_a_forward_hold_in_the_replays(context: str) -> None:
    converted, plain = twins(Within(context).float())
    before = _torch.kernel_settings()
    assert_same_steps(converted, plain, [torch.randn(2, 33, 16, dtype=torch.float32, requires_grad=True)], steps=4)
    assert len(converted.revfx.plans) == 1 and _torch.kernel_settings() == before


class Threads(Observer):
    """Notes with how many threads replays run."""

    def __init__(self) -> None:
        self.seen = set[int]()

    def replayed(self, call: UnitCall, slot: int, tensor: Tensor) -> None:
        self.seen.add(torch.get_num_threads())


def test_the_number_of_threads_of_the_forward_holds_in_the_replays() -> None:
    f, g = mlp(), mlp()
    for steps in range(4):
        noted = Threads()
        torch.set_num_threads(2)
        with set_variable(observer, noted):
            loss = loss_of(revfx.rev_block(leaf(5, 4), leaf(5, 4), f, g, 2))
        torch.set_num_threads(1)
        loss.backward()
        assert torch.get_num_threads() == 1
        assert noted.seen == ({2} if steps else set()), "the first step learns"


# --- who is told

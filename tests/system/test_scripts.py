"""What ordinary scripts ran into: numbers that change from step to step, large buffers, modes that look on, threads."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers import fp64 as fp64, leaf, loss_of, mlp, mlps
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from ways import BUILD

import revfx
from revfx import _torch
from revfx.capture import search
from revfx.conversion import MOST_PLANS
from revfx.eager.state import Random
from revfx.errors import RegenerationError, RevfxWarning
from revfx.testing import assert_same_grads, measure_memory


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
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that a forward is recorded."""
    times, capture = list[int](), search.capture

    def counted(*args: Any) -> Any:
        times.append(1)
        return capture(*args)

    monkeypatch.setattr(search, "capture", counted)
    return times


# --- plans
def test_a_global_with_the_name_of_an_attribute_is_none_of_the_models(recorded: list[int]) -> None:
    global step
    model, x = Stepped(), leaf(5, 8)
    converted: Any = revfx.convert(model)
    converted(x)
    once = len(recorded)
    for step in range(5):  # noqa: B007
        loss_of(converted(x)).backward()
    assert len(recorded) == once and len(converted.revfx.plans) == 1


def test_an_annealed_attribute_is_an_input_of_the_plan(recorded: list[int]) -> None:
    model, x = Stepped().float(), torch.randn(64, 8, dtype=torch.float32, requires_grad=True)
    converted: Any = revfx.convert(model)
    for k in range(8):
        model.temperature = 0.9**k
        if k == 2:
            once = len(recorded)
        y, expected = converted(x), model(x)
        assert torch.equal(y, expected)
        got, want = (torch.autograd.grad(t.sin().sum(), [x, *model.parameters()]) for t in (y, expected))
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)
    assert len(recorded) == once and len(converted.revfx.plans) == 2  # pyright: ignore[reportPossiblyUnboundVariable]


class Powers(Stepped):
    """Reads its number where a tensor would not do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) ** max(1.0, self.temperature)


def test_an_annealed_attribute_never_switches_couplings_off() -> None:
    model, x = Powers(), leaf(64, 8)
    converted: Any = revfx.convert(model)
    kept = measure_memory(lambda: converted(x).square().mean()).kept
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for k in range(MOST_PLANS + 4):
            model.temperature = 0.9**k
            assert torch.equal(converted(x), model(x))
    assert measure_memory(lambda: converted(x).square().mean()).kept <= 1.1 * kept
    assert len(converted.revfx.plans) == MOST_PLANS, "the newest ones"
    told = [str(w.message) for w in said if issubclass(w.category, RevfxWarning)]
    assert len(told) == 1 and "recorded again and again, now as Powers.temperature changed" in told[0]
    assert_same_grads(converted, model, [x])


class Nested(nn.Module):
    """A root that can't be recorded, with parts of which one holds couplings."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.couplings = nn.Sequential(mlp(8), nn.Sequential(mlp(8))), Stepped()

    def forward(self, x: Tensor) -> Tensor:
        return self.couplings(self.plain(x * float(x.sum() > 0)))


def test_parts_that_hold_no_region_are_left_as_they_were() -> None:
    model, x = Nested(), leaf(5, 8)
    with pytest.warns(RevfxWarning, match="its sub-modules are converted"):
        converted: Any = revfx.convert(model)
        converted(x)
    assert type(converted.plain) is nn.Sequential and converted.plain[1] is model.plain[1]
    assert len(converted.couplings.revfx.plans) == 1
    assert_same_grads(converted, model, [x])


def test_a_model_in_which_nothing_is_reversible_is_recorded_once(recorded: list[int]) -> None:
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
    once = len(recorded)
    for _ in range(200):
        converted.calls += 1
        converted(leaf(5, 8))
    assert len(recorded) == once


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
    assert all(int(f.calls) == 3 for f in counted)


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


def test_a_buffer_that_is_written_late_is_named_once_and_copied_then() -> None:
    f, g = Warms(), mlp()

    def step() -> None:
        loss_of(revfx.rev_block(leaf(5, 4), leaf(5, 4), f, g, 1)).backward()

    for _ in range(3):
        step()
    with pytest.raises(RegenerationError, match=r"`mean` of `f of layer 0` was modified.*or by `f of layer 0` itself"):
        step()
    for _ in range(3):
        step()


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
    seen = dict[str, int]()
    for name in ("plain", way):
        model = BUILD[name](nn.ModuleList(fs), nn.ModuleList(gs))
        model(x)  # records
        with Counting() as mode:
            model(x)
        seen[name] = mode.seen
    assert 0 < seen[way] <= seen["plain"]


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
def test_contexts_in_a_recorded_forward_hold_for_the_operations_inside(context: str) -> None:
    model = Within(context).float()
    converted: Any = revfx.convert(model)
    x = torch.randn(2, 33, 16, dtype=torch.float32, requires_grad=True)
    found: dict[str, list[Tensor]] = {}
    before = _torch.kernel_settings()
    for name, call in ("plain", model), ("converted", converted):
        y = call(x)
        found[name] = [y.detach(), *torch.autograd.grad(y.sin().sum(), [x, *model.parameters()])]
    assert len(converted.revfx.plans) == 1 and _torch.kernel_settings() == before
    assert torch.equal(found["converted"][0], found["plain"][0])
    for got, want in zip(found["converted"], found["plain"], strict=True):
        torch.testing.assert_close(got, want)


def test_the_number_of_threads_of_the_forward_holds_in_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[int]()

    class Threads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.get_num_threads())
            return self.inner(x)

    torch.set_num_threads(2)
    loss = loss_of(revfx.rev_block(leaf(5, 4), leaf(5, 4), Threads(), mlp(), 2))
    torch.set_num_threads(1)
    loss.backward()
    assert seen == [2, 2, 2, 2] and torch.get_num_threads() == 1


# --- who is told
def test_the_random_state_of_every_accelerator_of_the_inputs_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {0: torch.zeros(4), 1: torch.zeros(4)}

    class Module:
        @staticmethod
        def get_rng_state(device: torch.device) -> Tensor:
            return states[device.index].clone()

        @staticmethod
        def set_rng_state(state: Tensor, device: torch.device) -> None:
            states[device.index].copy_(state)

    monkeypatch.setattr(torch, "get_device_module", lambda _: Module)
    before = Random([torch.device("cuda", 0), torch.device("cuda", 1)])
    states[1] += 1
    assert not before.same(Random([torch.device("cuda", 0), torch.device("cuda", 1)]))
    before.restore()
    assert torch.equal(states[1], torch.zeros(4))

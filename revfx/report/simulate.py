"""The memory and the FLOPs of a training step, predicted on fake tensors, or measured.

Fake tensors have shapes but no data. The step runs as it is: the user's Python code, autograd and the engine. A ledger
above all operations counts the bytes of each result until it is freed. Nothing is computed or allocated, so a step that
would not fit is counted as well. The workspace of kernels is counted if it is known. Real steps are measured by the
events of the allocator for memory, and in turn for time.
"""

from __future__ import annotations

import math
import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from revfx import _fake, _torch
from revfx.ambient import set_variable
from revfx.engine.call import UnitCall
from revfx.engine.match import Match
from revfx.engine.observe import Observer, observer
from revfx.modes import allow_fakes
from revfx.passes._torch import is_random
from revfx.passes.sizes import mute_logger, tensors_of
from revfx.report.data import Usage
from revfx.testing import measure_memory
from revfx.world.fake import FakeWorld
from revfx.world.left import purge_fakes_after


aten: Any = torch.ops.aten
TIMED_STEPS = 5  # of each model
Loss = Callable[[Any], Tensor]  # from a model's output to a scalar


class Ledger(TorchDispatchMode):
    """Counts the live bytes of all results, and the FLOPs to compute them."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}  # by storage: its bytes
        self.live_bytes: int = 0
        self.flops: int = 0
        self.live: list[int] = []  # after each operation

    def add(self, t: Tensor, is_counted: bool = True) -> None:
        """Add the storage of `t`, until it is freed; its bytes are 0 if it is not counted."""
        if t.layout != torch.strided:  # fakes of other layouts have no storage
            return
        storage = t.untyped_storage()
        key = _torch.storage_key(t)
        if key not in self.held:
            nbytes = storage.nbytes() if is_counted else 0
            self.live_bytes += nbytes
            self.held[key] = nbytes, weakref.ref(storage, lambda _: self._remove(key))

    def _remove(self, key: int) -> None:
        self.live_bytes -= self.held.pop(key)[0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for t in tensors_of(out):
            self.add(t)
        if is_random(func, args, kwargs):
            torch.rand(())  # so that the generator's state changes, as in a real step
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        self.live.append(self.live_bytes + scratch(func, args, out))
        return out


class CodeCounter(Observer):
    """Counts the random states of unit calls, which no operator makes, and the bytes of their codes.

    Args:
        ledger: counts the random states.
        nbytes: receives the bytes of codes, by the position of their unit in the sequence of units.
    """

    def __init__(self, ledger: Ledger, nbytes: dict[int, int]) -> None:
        self._ledger, self._nbytes = ledger, nbytes

    def completed(self, call: UnitCall, match: Match) -> None:
        """Count the random states, and the codes."""
        for _, state in call.states:
            self._ledger.add(state)
        self._nbytes[call.site] = sum(code.nbytes for code in call.codes if code is not None)


def simulate_step(world: FakeWorld, run: Callable[..., Any], loss: Loss, codes: dict[int, int] | None = None) -> Usage:
    """Count `loss(run(*args, **kwargs))` and its backward.

    Args:
        world: the model and its arguments.
        run: the model's forward, plain or planned.
        loss: from the output to a scalar.
        codes: for a planned forward, receives the bytes of codes by the position of their unit. The forward runs once
            before it is counted.

    Raises:
        Exception: torch's own error if code asks for elements, and any error of the model.
    """
    way = "plain" if codes is None else "revfx"
    ledger = Ledger()
    code_counter = CodeCounter(ledger, {} if codes is None else codes)

    def count() -> Usage:
        quiet = mute_logger(_fake.FAKE_LOGGER)  # it prints a traceback besides raising
        with quiet, _torch.pause_collector(), world.entered() as (args, kwargs), allow_fakes(), torch.enable_grad():
            if codes is not None:
                run(*args, **kwargs)
            for _, fake in world.fakes.values():
                ledger.add(fake, is_counted=False)
                if fake.grad is not None:
                    ledger.add(fake.grad, is_counted=False)
            with set_variable(observer, code_counter), ledger:
                value = loss(run(*args, **kwargs))
                kept, backward = ledger.live_bytes, len(ledger.live)
                value.backward()
        peak = max(ledger.live, default=0)
        return Usage(way, kept, peak, ledger.flops, live=tuple(ledger.live), backward=backward)

    with purge_fakes_after(world.mode):
        try:
            return count()
        finally:
            torch.clear_autocast_cache()  # of casts of fake parameters
            world.fakes.clear()


# --- workspace of some CPU kernels, seen in torch 2.13's memory events
# oneDNN's convolutions copy their operands into blocks of channels, one block for each vector register. BatchNorm's
# backward makes one more tensor of its input's size. Other workspaces are unknown, and count as 0 bytes.
def scratch(func: Any, args: Any, out: Any) -> int:
    """Return the largest known workspace of an operator in bytes, beyond its operands and results."""
    workspace = WORKSPACES.get(func.overloadpacket)
    first = next((a for a in args if isinstance(a, Tensor)), None)
    if workspace is None or first is None or first.device.type != "cpu":
        return 0
    return workspace(args, out)


def _blocked_bytes(t: Tensor) -> int:
    """Return the bytes of a tensor (N, C, ...) in blocks of channels; 0 for images, which have too few channels."""
    channels = t.shape[1]
    if channels < 4 or not torch.backends.mkldnn.is_available():
        return 0
    block = 8 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 16  # registers of 256 bits, or of 512
    return t.numel() // channels * math.ceil(channels / block) * block * t.element_size()


WORKSPACES: Mapping[Any, Callable[[Any, Any], int]] = {
    aten.convolution: lambda args, out: _blocked_bytes(out),
    aten.convolution_backward: lambda args, out: _blocked_bytes(args[0]) + _blocked_bytes(args[1]),
    aten.native_batch_norm_backward: lambda args, out: args[1].numel() * args[1].element_size(),
}


# --- on real tensors
def _time_step(step: Callable[[], Tensor], device: str) -> float:
    """Return the seconds of a step on a device: the forward with its loss, and the backward."""
    start = time.perf_counter()
    step().backward()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure_steps(
    models: Mapping[str, Callable[..., Any]], args: Any, kwargs: Any, loss: Loss, ways: Sequence[Usage] = ()
) -> tuple[Usage, ...]:
    """Measure the bytes and the median seconds of `loss(model(*args, **kwargs))` and its backward.

    Args:
        models: a model for each way of running the step; "plain" is the model itself, with the device of all.
        args, kwargs: arguments of the models.
        loss: from a model's output to a scalar.
        ways: predicted usages, which the measured ones complete.
    """
    plain: Any = models["plain"]
    device = str(next((p.device for p in plain.parameters()), "cpu"))
    predicted = {u.way: u for u in ways}
    steps = {name: lambda model=model: loss(model(*args, **kwargs)) for name, model in models.items()}
    memory = {name: measure_memory(step, device=device) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(TIMED_STEPS):
        for name, step in steps.items():
            seconds[name].append(_time_step(step, device))
    found: list[Usage] = []
    for name, m in memory.items():
        usage, median = predicted.get(name, Usage(name)), statistics.median(seconds[name])
        found.append(replace(usage, measured_kept=m.kept, measured_peak=m.peak, seconds=median))
    return tuple(found)

"""A training step on fake tensors, which have shapes but no data: its memory and its computation.

The step runs as it is: the user's Python code, autograd and the engine. A ledger above all operations notes the bytes
of each result, and when it is freed. Nothing is computed or allocated, so a step that would not fit is counted as well.
The workspace of kernels is counted if it is known. The module also measures real steps: memory by the allocator's
events, and time in turns.
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
from revfx.ambient import given
from revfx.engine.call import UnitCall
from revfx.engine.match import Match
from revfx.engine.observe import Observer, observer
from revfx.modes import simulating
from revfx.passes._torch import draws
from revfx.passes.sizes import muted, tensors_of
from revfx.report.data import Usage
from revfx.testing import measure_memory
from revfx.world.fake import World
from revfx.world.left import none_left


aten = torch.ops.aten
TIMED_STEPS = 5  # of each way
Loss = Callable[[Any], Tensor]  # from a model's output to a scalar


class Ledger(TorchDispatchMode):
    """Notes the memory of every result, and the FLOPs to compute it."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}
        self.now = self.flops = 0
        self.live: list[int] = []

    def enter(self, t: Tensor, counted: bool = True) -> None:
        """Note the memory of `t`; if it is `counted`, it is held until it is freed."""
        if t.layout != torch.strided:  # fakes of other layouts have none
            return
        storage = t.untyped_storage()
        key = _torch.storage_key(t)
        if key not in self.held:
            size = storage.nbytes() if counted else 0
            self.now += size
            self.held[key] = size, weakref.ref(storage, lambda _: self._leave(key))

    def _leave(self, key: int) -> None:
        self.now -= self.held.pop(key)[0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for t in tensors_of(out):
            self.enter(t)
        if draws(func, args, kwargs):
            torch.rand(())  # so that the generator's state changes, as it would
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        self.live.append(self.now + scratch(func, args, out))
        return out


class Codes(Observer):
    """Notes tensors of unit calls that no operator makes, and the bytes of their codes.

    Args:
        ledger: counts the random states.
        nbytes: is given the bytes of codes, by the position of their unit in the sequence of units.
    """

    def __init__(self, ledger: Ledger, nbytes: dict[int, int]) -> None:
        self._ledger, self._nbytes = ledger, nbytes

    def completed(self, call: UnitCall, match: Match) -> None:
        """Count the random states, and the codes."""
        for _, state in call.states:
            self._ledger.enter(state)
        self._nbytes[call.site] = sum(code.nbytes for code in call.codes if code is not None)


def simulate_step(world: World, run: Callable[..., Any], loss: Loss, codes: dict[int, int] | None = None) -> Usage:
    """Count `loss(run(*args, **kwargs))` and its backward.

    Args:
        world: the model and its arguments.
        run: the model's forward, plain or planned.
        loss: from the output to a scalar.
        codes: of a planned forward, which runs once before it is counted: is given the bytes of codes by the position
            of their unit.

    Raises:
        Exception: torch's own error where code asks for values, and any error of the model.
    """
    way = "plain" if codes is None else "revfx"
    ledger = Ledger()
    look = Codes(ledger, {} if codes is None else codes)

    def count() -> Usage:
        quiet = muted(_fake.FAKE_LOGGER)  # which prints a traceback besides raising
        with quiet, _torch.uncollected(), world.entered() as (args, kwargs), simulating(), torch.enable_grad():
            if codes is not None:
                run(*args, **kwargs)
            for _, fake in world.fakes.values():
                ledger.enter(fake, counted=False)
                if fake.grad is not None:
                    ledger.enter(fake.grad, counted=False)
            with given(observer, look), ledger:
                value = loss(run(*args, **kwargs))
                kept, backward = ledger.now, len(ledger.live)
                value.backward()
        peak = max(ledger.live, default=0)
        return Usage(way, kept, peak, ledger.flops, live=tuple(ledger.live), backward=backward)

    with none_left(world.mode):
        try:
            return count()
        finally:
            torch.clear_autocast_cache()  # of casts of fake parameters
            world.fakes.clear()


# --- workspace of some CPU kernels, seen in torch 2.13's memory events
# oneDNN's convolutions copy their operands into blocks of as many channels as a register holds numbers, and BatchNorm's
# backward makes one more tensor of its input's size. Elsewhere nothing is known, which counts as nothing.
def scratch(func: Any, args: Any, out: Any) -> int:
    """Return the bytes beyond operands and results that running an operator takes at most, as far as known."""
    count = KNOWN.get(func.overloadpacket)
    first = next((a for a in args if isinstance(a, Tensor)), None)
    return count(args, out) if count is not None and first is not None and first.device.type == "cpu" else 0


def _blocked(t: Tensor) -> int:
    """Return the bytes of a tensor (N, C, ...) in blocks of channels; images, of few channels, are used as they are."""
    channels = t.shape[1]
    if channels < 4 or not torch.backends.mkldnn.is_available():
        return 0
    block = 8 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 16  # registers of 256 bits, or of 512
    return t.numel() // channels * math.ceil(channels / block) * block * t.element_size()


KNOWN: Mapping[Any, Callable[[Any, Any], int]] = {
    aten.convolution: lambda args, out: _blocked(out),
    aten.convolution_backward: lambda args, out: _blocked(args[0]) + _blocked(args[1]),
    aten.native_batch_norm_backward: lambda args, out: args[1].numel() * args[1].element_size(),
}


# --- on real tensors
def seconds_of(step: Callable[[], Tensor], device: str) -> float:
    """Return the seconds of a step on a device: the forward with its loss, and the backward."""
    start = time.perf_counter()
    step().backward()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measured(
    models: Mapping[str, Callable[..., Any]], args: Any, kwargs: Any, loss: Loss, ways: Sequence[Usage] = ()
) -> tuple[Usage, ...]:
    """Measure, by way, the bytes and the median seconds that `loss(model(*args, **kwargs))` and its backward take.

    Args:
        models: the model of each way; "plain" is the model itself. All run on the device of its first parameter.
        args, kwargs: arguments of the models.
        loss: from a model's output to a scalar.
        ways: the predicted usage of some ways, to which the measured one is added.
    """
    plain: Any = models["plain"]
    device = str(next((p.device for p in plain.parameters()), "cpu"))
    predicted = {u.way: u for u in ways}
    steps = {name: lambda model=model: loss(model(*args, **kwargs)) for name, model in models.items()}
    memory = {name: measure_memory(step, device=device) for name, step in steps.items()}
    rounds = [[seconds_of(step, device) for step in steps.values()] for _ in range(TIMED_STEPS)]
    found: list[Usage] = []
    for (name, m), *seconds in zip(memory.items(), *rounds, strict=True):
        usage = predicted.get(name, Usage(name))
        median = statistics.median(seconds)
        found.append(replace(usage, measured_kept=m.kept, measured_peak=m.peak, seconds=median))
    return tuple(found)

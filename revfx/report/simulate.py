"""A training step on fake tensors, which have shapes but no data: what it would hold in memory and compute.

The step runs as it is, the user's Python code, autograd and the executor of regions included; a ledger above all
operations notes what each result takes and when it is let go. Nothing is computed and nothing allocated, so a step that
would not fit is counted as well. What kernels allocate within themselves is counted where it is known. Beside it stands
what real steps take: memory from the allocator's events, and time in turns.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from revfx import _fake, _torch
from revfx.capture.effects import none_left
from revfx.eager.modes import simulating
from revfx.eager.regeneration import Regeneration
from revfx.eager.region_plan import Watch
from revfx.inspection import watched
from revfx.passes._torch import draws
from revfx.passes.closure import Derivation
from revfx.passes.sizes import muted, tensors_of
from revfx.report.data import Timeline, Usage
from revfx.testing import measure_memory
from revfx.world import World


aten = torch.ops.aten
REPEATS = 5  # steps of each way that are timed
Loss = Callable[[Any], Tensor]  # from a model's output to a scalar


class Ledger(TorchDispatchMode):
    """Notes the memory of every result, and what it takes to compute it."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}
        self.now = self.flops = 0
        self.live: list[int] = []
        self.marks: list[tuple[int, str]] = []

    def enter(self, t: Tensor, counted: bool = True) -> None:
        """Add the memory of `t` to what is known; if it is `counted`, it is held until it is let go."""
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


class Simulation(World):
    """A model and its arguments in a world without data, where steps are counted."""

    def step(self, run: Callable[..., Any], loss: Loss, seen: Callable[[Regeneration], None] | None = None) -> Timeline:
        """Return what `loss(run(*args, **kwargs))` and its backward hold; `seen` is called with the regions that ran,
        while they are there, and then their steps are marked. Code that asks for values raises torch's own error.
        """
        ledger, runs = Ledger(), list[Regeneration]()

        def watch(run: Regeneration) -> Watch:
            runs.append(run)
            return Marks(ledger, len(runs) - 1)

        def count() -> Timeline:
            quiet = muted(_fake.FAKE_LOGGER)  # which prints a traceback besides raising
            with quiet, _torch.uncollected(), self.entered() as (args, kwargs), simulating(), torch.enable_grad():
                for _, fake in self.fakes.values():
                    ledger.enter(fake, counted=False)
                    if fake.grad is not None:
                        ledger.enter(fake.grad, counted=False)
                with watched(watch) if seen else contextlib.nullcontext(), ledger:
                    value = loss(run(*args, **kwargs))
                    kept, backward = ledger.now, len(ledger.live)
                    value.backward()
                if seen is not None:
                    for region in runs:
                        seen(region)
            return Timeline(tuple(ledger.live), backward, kept, ledger.flops, tuple(ledger.marks))

        with none_left(self.mode):
            try:
                return count()
            finally:
                runs.clear()
                self.fakes.clear()


class Marks(Watch):
    """Notes where on the way of a simulated step each step of a region begins, in both directions."""

    def __init__(self, ledger: Ledger, region: int) -> None:
        self.ledger, self.region = ledger, region
        self.at: tuple[str, int] | None = None

    def made(self, run: Regeneration, value: int, tensor: Tensor) -> None:
        """Record the step in which the forward made a value."""
        self.ledger.enter(run.random.cpu)  # the generator's state, which no operation makes
        self._come(run, run.program.made_at[value], "forward")

    def regenerated(self, run: Regeneration, derivation: Derivation, value: int, tensor: Tensor) -> None:
        """Record the step in which the backward made a value again."""
        self._come(run, derivation.op, "backward")

    def _come(self, run: Regeneration, op: int, direction: str) -> None:
        at = direction, run.plan.step_of.get(op, -1)
        if at != self.at and at[1] >= 0:
            self.at = at
            self.ledger.marks.append((len(self.ledger.live), f"{direction} {self.region} {at[1]}"))


# --- what some CPU kernels allocate within themselves, seen in torch 2.13's memory events
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
    """Return the seconds that a step takes on a device: what gives its loss, and the backward."""
    start = time.perf_counter()
    step().backward()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measured(ways: Mapping[str, Callable[..., Any]], args: Any, kwargs: Any, loss: Loss) -> tuple[Usage, ...]:
    """Measure, by way, the bytes and the median seconds that `loss(way(*args, **kwargs))` and its backward take.

    "plain" is the model itself; all run on the device of its first parameter.
    """
    plain: Any = ways["plain"]
    device = str(next((p.device for p in plain.parameters()), "cpu"))
    steps = {name: lambda way=way: loss(way(*args, **kwargs)) for name, way in ways.items()}
    memory = {name: measure_memory(step, device=device) for name, step in steps.items()}
    rounds = [[seconds_of(step, device) for step in steps.values()] for _ in range(REPEATS)]
    return tuple(
        Usage(name, measured_kept=m.kept, measured_peak=m.peak, seconds=statistics.median(seconds))
        for (name, m), *seconds in zip(memory.items(), *rounds, strict=True)
    )

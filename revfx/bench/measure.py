"""Measuring the contenders of `revfx bench` on one model: memory, gradients, and the time of steps taken in turn."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from revfx.bench.models import BenchModel, Chain
from revfx.bench.results import Row
from revfx.bench.ways import WAYS, Inputs, Way, why_not
from revfx.errors import RevfxWarning
from revfx.report.simulate import seconds_of
from revfx.testing import measure_memory, relative_error


Step = Callable[[], Tensor]
SUSPECT = 1e-3  # the least error of a gradient in fp32 that is looked into, and ...
TIMES_PLAIN = 30.0  # ... how many times plain autograd's own it must be
WRONG = 1e-6  # the least error in fp64 that is more than rounding


@dataclass(frozen=True)
class Setting:
    """A model at one size, on a device of torch."""

    bench: BenchModel
    depth: int
    batch: int
    device: str = "cpu"

    def make(self, dtype: torch.dtype = torch.float32) -> tuple[Chain, Inputs]:
        """Return the model and its arguments, the same each time."""
        given = (t.to(self.device, dtype if t.is_floating_point() else t.dtype) for t in self.bench.inputs(self.batch))
        return self.bench.make(self.depth).to(self.device, dtype), tuple(given)

    def step_of(self, way: Way, model: Chain, inputs: Inputs) -> Step:
        """Return a step of training that way, from its start to the loss; no buffer or gradient is left changed."""
        before = _buffers(model)
        call = way.build(self.bench, model, inputs)
        for name, b in model.named_buffers():
            b.copy_(before[name])
        model.zero_grad()
        return lambda: self.bench.loss(call(*inputs))


@dataclass
class Candidate:
    """A way, and what is known of it so far; `step` is None where it can't train, or not any longer."""

    way: Way
    model: nn.Module
    row: Row
    step: Step | None = None
    seconds: list[float] = field(default_factory=list[float])


@dataclass(frozen=True)
class Reference:
    """What one step of plain autograd gives: gradients in fp64, its own error in fp32, and the buffers after it."""

    gradients: dict[str, Tensor]
    error: float
    buffers: dict[str, Tensor]


def measure_steps(setting: Setting, ways: Sequence[Way], rounds: int, tick: Callable[[str], None]) -> list[Row]:
    """Measure memory, gradients and times of training steps, by way, in the given order.

    Each way takes its step in turn, once more than there are `rounds`: the first is not timed. "plain" must be among
    them, if times are to be compared with its. `tick` is called with a few words before each thing that is done.
    """
    reference = reference_of(setting)
    candidates: list[Candidate] = []
    for way in ways:
        tick(f"{setting.bench.name}, {way.name}")
        candidates.append(prepare(setting, way, reference))
    for _ in range(rounds + 1):
        tick(f"{setting.bench.name}, steps")
        for c in candidates:
            if c.step is None:
                continue
            try:
                c.model.zero_grad()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    c.seconds.append(seconds_of(c.step, setting.device))
            except Exception as e:
                c.row, c.step = _failed(c.row, e), None
    plain = next((c.seconds[1:] for c in candidates if c.way.name == "plain"), [])
    return [c.row if c.step is None else _with_times(c.row, c.seconds[1:], plain) for c in candidates]


def prepare(setting: Setting, way: Way, reference: Reference | None = None) -> Candidate:
    """Return a candidate with its memory and, given a reference, its error, or with why there is none."""
    row = Row(setting.bench.name, way.name, setting.depth, setting.batch)
    model, inputs = setting.make()
    if (reason := why_not(way, setting.bench)) is not None:
        return Candidate(way, model, replace(row, notes=(reason,)))
    row = replace(row, gradients=sum(p.numel() * p.element_size() for p in model.parameters()))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("ignore")  # other libraries use what torch has deprecated
        warnings.simplefilter("always", RevfxWarning)
        try:
            start = time.perf_counter()
            step = setting.step_of(way, model, inputs)
            seconds_of(step, setting.device)
            row = replace(row, first=time.perf_counter() - start)
            if reference is not None:
                row = _compared(row, setting, way, model, reference)
            row = _with_memory(row, way, step, setting.device)
        except Exception as e:  # whatever a contender raises is a result of its own
            return Candidate(way, model, _failed(row, e))
    said = dict.fromkeys(_first_line(str(w.message)) for w in warned)
    return Candidate(way, model, replace(row, notes=(*row.notes, *said)), step)


def reference_of(setting: Setting) -> Reference:
    """Return what plain autograd gives."""
    plain, double = setting.make(), setting.make(torch.float64)
    for model, inputs in (plain, double):
        setting.step_of(WAYS["plain"], model, inputs)().backward()
    gradients = {name: p.grad for name, p in double[0].named_parameters() if p.grad is not None}
    return Reference(gradients, _error(plain[0], gradients), _buffers(plain[0]))


def _with_memory(row: Row, way: Way, step: Step, device: str) -> Row:
    """Return the row with its bytes; there are gradients already, so those of the step are added to them and freed.

    But a compiled backward holds all the new ones until it ends: they are subtracted. Its peak may have been before it
    had them all, so that what was kept for it is the least that it can be.
    """
    found = measure_memory(step, device=device, warm_up=False)
    held = (row.gradients or 0) if way.compiled else 0
    return replace(row, kept=found.kept, peak=max(found.kept, found.peak - held))


def _compared(row: Row, setting: Setting, way: Way, model: nn.Module, reference: Reference) -> Row:
    """Return the row with its error, NaN where a gradient is missing, and with notes about buffers and gradients.

    An error that is large may be rounding: then there is none in fp64.
    """
    after = _buffers(model)
    other = [n for n, t in reference.buffers.items() if not torch.allclose(after[n], t, rtol=1e-3, atol=1e-5)]
    notes = [f"a step changes {len(other)} buffers otherwise than plain's (`{other[0]}`)"] if other else []
    row = replace(row, error=_error(model, reference.gradients), notes=(*row.notes, *notes))
    if row.error is not None and row.error <= max(SUSPECT, TIMES_PLAIN * reference.error):
        return row
    double, inputs = setting.make(torch.float64)
    setting.step_of(way, double, inputs)().backward()
    error = _error(double, reference.gradients)
    if error <= WRONG:
        return replace(row, notes=(*row.notes, f"gradients are off by rounding: in fp64 by {error:.0e}"))
    what = "one is missing or NaN" if math.isnan(error) else f"in fp64 off by {error:.0e}"
    return replace(row, failed=True, notes=(*row.notes, f"WRONG gradients: {what}"))


def _error(model: nn.Module, gradients: dict[str, Tensor]) -> float:
    """Return the worst relative error of a gradient, NaN if one is missing or has a NaN."""
    pairs = ((model.get_parameter(name).grad, want) for name, want in gradients.items())
    errors = (math.nan if got is None else relative_error(got, want) for got, want in pairs)
    return max(errors, key=lambda e: (math.isnan(e), e), default=0.0)


def _with_times(row: Row, seconds: Sequence[float], plain: Sequence[float]) -> Row:
    row = replace(row, seconds=statistics.median(seconds))
    if len(plain) != len(seconds):
        return row
    ratios = [s / p for s, p in zip(seconds, plain, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return replace(row, ratio=statistics.median(ratios), ratio_low=low, ratio_high=high)


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers()}


def _failed(row: Row, e: Exception) -> Row:
    return replace(row, failed=True, notes=(*row.notes, raised(e)))


def raised(e: Exception) -> str:
    """Return what is noted of a way that raised."""
    return f"raises {type(e).__name__}: {_first_line(str(e))}"


def _first_line(text: str, most: int = 120) -> str:
    line = (text.strip().splitlines() or [""])[0]
    return line if len(line) <= most else f"{line[: most - 3]}..."

"""Measuring the contenders of `revfx bench` on one model: memory, gradients, and the time of steps taken in turn."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from revfx.bench.models import BenchModel
from revfx.bench.results import Row
from revfx.bench.ways import Inputs, Way, why_not
from revfx.errors import RevfxWarning
from revfx.inspection import doubled
from revfx.testing import measure_memory, relative_error


Step = Callable[[], Tensor]
Tick = Callable[[str], None]
SUSPECT = 1e-3  # the least error of a gradient in fp32 that is looked into, and ...
TIMES_PLAIN = 30.0  # ... how many times plain autograd's own it must be
WRONG = 1e-6  # the least error in fp64 that is more than rounding


@dataclass(frozen=True)
class Candidate:
    """A way that is ready to train, and what is known of it so far."""

    way: Way
    model: nn.Module
    step: Step
    row: Row


@dataclass(frozen=True)
class Reference:
    """What one step of plain autograd gives: gradients in fp64, its own error in fp32, and the buffers after it."""

    gradients: dict[str, Tensor]
    error: float
    buffers: dict[str, Tensor]


def measure_steps(
    bench: BenchModel, ways: Sequence[Way], depth: int, batch: int, rounds: int, device: str, tick: Tick
) -> list[Row]:
    """Measure memory, gradients and times of training steps of one model, by way, in the given order.

    Args:
        bench: the model.
        ways: the contenders; "plain" must be among them, if times are to be compared with its.
        depth, batch: the sizes.
        rounds: how often each way takes its step in turn; one more goes before them.
        device: a device of torch.
        tick: called with a few words before each thing that is done.
    """
    reference = reference_of(bench, depth, batch, device)
    rows: dict[str, Row] = {}
    ready: list[Candidate] = []
    for way in ways:
        tick(f"{bench.name}, {way.name}")
        found = prepare(bench, way, depth, batch, device, reference)
        if isinstance(found, Row):
            rows[way.name] = found
        else:
            ready.append(found)
    times: dict[str, list[float]] = {c.way.name: [] for c in ready}
    for _ in range(rounds + 1):
        tick(f"{bench.name}, steps")
        for c in [c for c in ready if c.way.name not in rows]:
            try:
                times[c.way.name].append(_timed(c, device))
            except Exception as e:
                rows[c.way.name] = replace(c.row, failed=True, notes=(*c.row.notes, _raised(e)))
    plain = times.get("plain", [])
    for c in ready:
        if c.way.name not in rows:
            rows[c.way.name] = _with_times(c.row, times[c.way.name][1:], plain[1:])
    return [rows[way.name] for way in ways]


def measure_size(bench: BenchModel, way: Way, depth: int, batch: int, device: str) -> Row:
    """Measure the memory of one way at one size, without times and gradients."""
    found = prepare(bench, way, depth, batch, device)
    return found if isinstance(found, Row) else found.row


def prepare(
    bench: BenchModel, way: Way, depth: int, batch: int, device: str, reference: Reference | None = None
) -> Candidate | Row:
    """Return a candidate with its memory and, given a reference, its error, or a row that says why there is none."""
    row = Row(bench.name, way.name, depth, batch)
    reason = why_not(way, bench)
    if reason is not None:
        return replace(row, notes=(reason,))
    model, inputs = bench.make(depth).to(device), _inputs(bench, batch, device)
    row = replace(row, gradients=sum(p.numel() * p.element_size() for p in model.parameters()))
    before = _buffers(model)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("ignore")  # other libraries use what torch has deprecated
        warnings.simplefilter("always", RevfxWarning)
        try:
            start = time.perf_counter()
            built = way.build(bench, model, inputs)
            _set_buffers(model, before)
            model.zero_grad()

            def step() -> Tensor:
                return bench.loss(built.call(*inputs))

            step().backward()
            _wait(device)
            row = replace(row, first=time.perf_counter() - start, notes=built.notes)
            if reference is not None:
                row = _compared(row, model, reference)
                row = _judged(row, bench, way, device, reference)
            row = _with_memory(row, way, step, device)
        except Exception as e:  # whatever a contender raises is a result of its own
            return replace(row, failed=True, notes=(*row.notes, _raised(e)))
    said = tuple(dict.fromkeys(_first_line(str(w.message)) for w in warned))
    return Candidate(way, model, step, replace(row, notes=(*row.notes, *said)))


def reference_of(bench: BenchModel, depth: int, batch: int, device: str) -> Reference:
    """Return what plain autograd gives at these sizes."""
    model, inputs = bench.make(depth).to(device), _inputs(bench, batch, device)
    bench.loss(model(*inputs)).backward()
    double = bench.make(depth).to(device, torch.float64)
    bench.loss(double(*doubled(inputs))).backward()
    gradients = {name: p.grad for name, p in double.named_parameters() if p.grad is not None}
    reference = Reference(gradients, 0.0, _buffers(model))
    return replace(reference, error=_error(model, reference))


def _with_memory(row: Row, way: Way, step: Step, device: str) -> Row:
    """Return the row with its bytes; there are gradients already, so those of the step are added to them and freed.

    But a compiled backward holds all the new ones until it ends: they are subtracted. Its peak may have been before it
    had them all, so that what was kept for it is the least that it can be.
    """
    found = measure_memory(step, device=device, warm_up=False)
    held = (row.gradients or 0) if way.compiled else 0
    return replace(row, kept=found.kept, peak=max(found.kept, found.peak - held))


def _compared(row: Row, model: nn.Module, reference: Reference) -> Row:
    """Return the row with its error, NaN where a gradient is missing, and with notes about buffers."""
    after = _buffers(model)
    other = [n for n, t in reference.buffers.items() if not torch.allclose(after[n], t, rtol=1e-3, atol=1e-5)]
    notes = [f"a step changes {len(other)} buffers otherwise than plain's (`{other[0]}`)"] if other else []
    return replace(row, error=_error(model, reference), notes=(*row.notes, *notes))


def _judged(row: Row, bench: BenchModel, way: Way, device: str, reference: Reference) -> Row:
    """Return the row and, where its error is large, whether that is rounding: then there is none in fp64."""
    if row.error is not None and row.error <= max(SUSPECT, TIMES_PLAIN * reference.error):
        return row
    model, inputs = bench.make(row.depth).to(device, torch.float64), doubled(_inputs(bench, row.batch, device))
    built = way.build(bench, model, inputs)
    model.zero_grad()
    bench.loss(built.call(*inputs)).backward()
    error = _error(model, reference)
    if error <= WRONG:
        return replace(row, notes=(*row.notes, f"gradients are off by rounding: in fp64 by {error:.0e}"))
    what = f"in fp64 off by {error:.0e}" if error == error else "one is missing or NaN"
    return replace(row, failed=True, notes=(*row.notes, f"WRONG gradients: {what}"))


def _error(model: nn.Module, reference: Reference) -> float:
    """Return the worst relative error of a gradient, NaN if one is missing or has a NaN."""
    parameters = dict(model.named_parameters())
    worst = 0.0
    for name, want in reference.gradients.items():
        got = parameters[name].grad
        error = float("nan") if got is None else relative_error(got, want)
        if error != error:
            return error
        worst = max(worst, error)
    return worst


def _timed(c: Candidate, device: str) -> float:
    """Return the seconds that one step takes."""
    c.model.zero_grad()
    _wait(device)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        c.step().backward()
    _wait(device)
    return time.perf_counter() - start


def _with_times(row: Row, seconds: Sequence[float], plain: Sequence[float]) -> Row:
    row = replace(row, seconds=statistics.median(seconds))
    if len(plain) != len(seconds):
        return row
    ratios = [s / p for s, p in zip(seconds, plain, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return replace(row, ratio=statistics.median(ratios), ratio_low=low, ratio_high=high)


def _inputs(bench: BenchModel, batch: int, device: str) -> Inputs:
    return tuple(t.to(device) for t in bench.inputs(batch))


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers()}


def _set_buffers(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, b in model.named_buffers():
        b.copy_(values[name])


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def _raised(e: Exception) -> str:
    return f"raises {type(e).__name__}: {_first_line(str(e))}"


def _first_line(text: str, most: int = 120) -> str:
    line = (text.strip().splitlines() or [""])[0]
    return line if len(line) <= most else f"{line[: most - 3]}..."

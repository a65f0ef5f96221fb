"""Measuring the ways to train one model: memory, gradients, and the time of steps taken in turn."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.count import Counts
from bench.models import BenchModel, Task
from bench.ways import Way
from revfx.errors import BudgetError, RevfxWarning
from revfx.testing import measure_memory


STEPS = 3  # whose memory and gradients are measured
BUFFER_TOLERANCE = {"rtol": 1e-3, "atol": 1e-5}  # for statistics that differ by rounding


@dataclass(frozen=True)
class Sizes:
    """How a model is built for every way; None stands for its default."""

    depth: int | None = None
    batch: int | None = None
    device: str = "cpu"
    is_bf16: bool = False
    is_compiled: bool = False

    def make(self, model: BenchModel) -> Task:
        """Build a task."""
        task = model.make(self.depth, self.batch)
        task.to(self.device)
        task.is_bf16, task.is_compiled = self.is_bf16, self.is_compiled
        return task


@dataclass
class Row:
    """The figures of one way to train one model; None where there are none.

    Attributes:
        model, way, setting: names, and the setting of the way.
        title: of the way, with its setting.
        kept, peak: bytes after the forward and at the peak of a step, beyond those before it, with gradients of
            parameters there already.
        share: of plain's peak.
        seconds: the median of the steps.
        ratio: quartiles of the times divided by plain's in the same round.
        first: seconds of building and of the first step, with plans and compilations.
        is_bitwise: losses, gradients and buffers are plain's, bit for bit.
        error: the largest relative error of a gradient or loss; NaN if one is missing.
        buffers: the number of buffers that differ by more than rounding.
        counts: the kernels of a step.
        notes: warnings, errors, or the reason why there are no figures.
        is_failed: one of revfx's own ways raised, has wrong gradients or exceeds its budget.
    """

    model: str
    way: str
    setting: float | str | None
    title: str
    kept: int | None = None
    peak: int | None = None
    share: float | None = None
    seconds: float | None = None
    ratio: tuple[float, float, float] | None = None
    first: float | None = None
    is_bitwise: bool | None = None
    error: float | None = None
    buffers: int = 0
    counts: Counts | None = None
    notes: list[str] = field(default_factory=list[str])
    is_failed: bool = False


@dataclass
class State:
    """The losses, gradients and buffers of a few steps, and whether these drew random numbers."""

    values: dict[str, Tensor]
    buffers: dict[str, Tensor]
    is_random: bool


class Contender:
    """One way with a task of its own."""

    def __init__(self, model: BenchModel, way: Way, setting: float | str | None, sizes: Sizes) -> None:
        self.way, self.task = way, sizes.make(model)
        self.row = Row(model.name, way.name, setting, _title(way, setting))
        self.seconds: list[float] = []
        self.is_running = False
        if sizes.is_compiled and not way.compiles_blocks:
            reason = "not with `--compile`"
        else:
            reason = way.refusal(self.task)
        if reason:
            self.row.notes.append(reason)

    def prepare(self, plain: Contender) -> None:
        """Build the way, measure its first steps and compare with `plain`; an error becomes a note of the row."""
        if self.row.notes:
            return
        plain_peak = plain.row.peak or 1
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", RevfxWarning)
            try:
                self._first_step()
                self.state = self._measure()
                self.is_running = True
            except BudgetError as e:
                self.row.first = self.row.kept = self.row.peak = None  # the first steps may have run
                self.row.notes.append(f"infeasible: the least budget is {e.least / plain_peak:.1%} of plain's peak")
            except Exception as e:
                self._fail(e)
        for message in dict.fromkeys(_first_line(str(w.message)) for w in warned):
            self.row.notes.append(message)
        if self.is_running and plain.is_running:
            self._compare(plain.state)
            self._check_peak(plain.row.peak or 1)
        if self is not plain:
            self.state = State({}, {}, is_random=False)  # gradients of many ways would fill the memory

    def step(self) -> None:
        """Run a training step and note its time."""
        if not self.is_running:
            return
        self.task.model.zero_grad(set_to_none=False)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.seconds.append(self._timed(lambda: self.loss().backward()))
        except Exception as e:
            self.is_running = False
            self._fail(e)

    def loss(self) -> Tensor:
        """Run a forward and return its loss."""
        return self.task.loss_of(self.call)

    def _first_step(self) -> None:
        def first_step() -> None:
            self.call = self.way.build(self.task, self.row.setting)
            self.loss().backward()

        torch.manual_seed(0)
        self.row.first = self._timed(first_step)

    def _measure(self) -> State:
        """Measure the memory of a few steps, and collect their losses and gradients."""
        parameters = dict(self.task.model.named_parameters())
        held = 0
        if self.way.compiles == "model":
            held = sum(p.numel() * p.element_size() for p in parameters.values() if p.requires_grad)
        losses: list[Tensor] = []

        def step() -> Tensor:
            loss = self.loss()
            losses.append(loss.detach())
            return loss

        state = State({}, {}, is_random=False)
        self.row.kept = self.row.peak = 0
        for seed in range(STEPS):
            self.task.model.zero_grad(set_to_none=False)
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            memory = measure_memory(step, device=self.task.device, warm_up=False)
            state.is_random |= not torch.equal(before, torch.get_rng_state())
            if seed > 0:  # in the one before, after the first step, `convert` proves its plan
                # A compiled backward's peak may come before it holds all gradients, so kept bytes are a lower bound.
                self.row.kept = max(self.row.kept, memory.kept)
                self.row.peak = max(self.row.peak, memory.kept, memory.peak - held)
            state.values[f"loss {seed}"] = losses[-1].clone()
            for name, p in parameters.items():
                if p.grad is not None:
                    state.values[f"{name} {seed}"] = p.grad.clone()
        for name, buffer in self.task.model.named_buffers():
            state.buffers[name] = buffer.clone()
        return state

    def _compare(self, want: State) -> None:
        """Compare losses, gradients and buffers with plain's."""
        row, got = self.row, self.state
        row.is_bitwise = _is_equal(got.values, want.values) and _is_equal(got.buffers, want.buffers)
        row.error = max((_error(got.values.get(name), value) for name, value in want.values.items()), key=_nan_last)
        for name, buffer in want.buffers.items():
            if not torch.allclose(got.buffers[name].double(), buffer.double(), **BUFFER_TOLERANCE):
                row.buffers += 1
        if row.buffers:
            row.notes.append(f"{row.buffers} buffers differ from plain's after {STEPS + 1} steps")
        if self.way.limit is None:
            return
        if self.way.limit == 0:
            is_right = row.is_bitwise
        else:
            # Inductor draws other random numbers, so gradients can't be compared then.
            is_right = want.is_random or row.error <= self.way.limit
        if not is_right:
            row.is_failed = True
            row.notes.append("WRONG gradients, losses or buffers")

    def _check_peak(self, plain_peak: int) -> None:
        """Compare the peak with plain's and with the budget."""
        row, peak = self.row, self.row.peak or 0
        row.share = peak / plain_peak
        budget = self.task.budget_bytes
        if self.way.name == "memory" and isinstance(row.setting, (int, float)):
            budget = int(plain_peak * row.setting / 100)
        if budget is not None and peak > budget:
            row.is_failed = True
            row.notes.append(f"EXCEEDS its budget of {budget:,} bytes: {peak:,}")

    def _timed(self, run: Callable[[], None]) -> float:
        _synchronize(self.task.device)
        start = time.perf_counter()
        run()
        _synchronize(self.task.device)
        return time.perf_counter() - start

    def _fail(self, error: Exception) -> None:
        self.row.notes.append(f"raises {type(error).__name__}: {_first_line(str(error))}")
        self.row.is_failed = self.way.limit is not None
        self.row.first = None


def measure(
    model: BenchModel, ways: Sequence[Way], rounds: int, sizes: Sizes, tick: Callable[[str], None]
) -> list[Row]:
    """Measure training steps of all ways and settings, in order; the first way must be plain.

    In each round every way takes one step. One more round at the beginning is not timed. `tick` is called with a few
    words before each part of the work.
    """
    contenders: list[Contender] = []
    for way in ways:
        for setting in way.settings:
            contender = Contender(model, way, setting, sizes)
            tick(f"{model.name}, {contender.row.title}")
            contenders.append(contender)
            contender.prepare(contenders[0])
    for _ in range(rounds + 1):
        tick(f"{model.name}, steps")
        for contender in contenders:
            contender.step()
    plain = contenders[0].seconds[1:]
    for contender in contenders:
        seconds = contender.seconds[1:]
        if not contender.is_running:
            continue
        contender.row.seconds = statistics.median(seconds)
        ratios = [s / p for s, p in zip(seconds, plain, strict=True)]
        low, middle, high = ratios * 3 if len(ratios) == 1 else statistics.quantiles(ratios, method="inclusive")
        contender.row.ratio = low, middle, high
    torch._dynamo.reset()
    return [contender.row for contender in contenders]


def _title(way: Way, setting: float | str | None) -> str:
    is_percentage = way.name == "memory" and isinstance(setting, (int, float))
    return way.title.format(f"{setting:g}%" if is_percentage else setting)


def _is_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return list(got) == list(want) and all(torch.equal(tensor, want[name]) for name, tensor in got.items())


def _error(got: Tensor | None, want: Tensor) -> float:
    """Return the norm of the difference divided by the norm of `want`, or NaN if there is no `got`."""
    if got is None:
        return math.nan
    difference = float((got.double() - want.double()).norm())
    return difference and difference / max(float(want.double().norm()), torch.finfo(torch.float32).tiny)


def _nan_last(error: float) -> tuple[bool, float]:
    return math.isnan(error), error


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def _first_line(text: str, most: int = 120) -> str:
    line = (text.strip().splitlines() or [""])[0]
    return line if len(line) <= most else f"{line[: most - 3]}..."

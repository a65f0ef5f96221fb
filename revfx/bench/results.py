"""What `revfx bench` finds out, as frozen data."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Machine:
    """Where the figures were taken."""

    processor: str
    cores: int
    threads: int
    torch: str
    python: str

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        return f"{self.processor}, {self.cores} cores, {threads}; torch {self.torch}, Python {self.python}"


@dataclass(frozen=True)
class Row:
    """One way of training one model at one size; None stands for what was not measured.

    Args:
        model, way: their names.
        depth: blocks.
        batch: samples.
        gradients: bytes of the parameters' gradients, which are not part of `peak`.
        kept: bytes that are held after the forward, beyond what was there before.
        peak: bytes that a step takes at its peak, beyond what was there before.
        seconds: of a step, the median.
        ratio, ratio_low, ratio_high: the step's time over plain's in the same round: median and quartiles.
        first: seconds of preparing the model and its first step, in which plans and compilations are made.
        error: the worst relative error of a parameter's gradient against plain autograd's in fp64.
        notes: what else there is to say; why it was not measured.
        failed: it raised, or its gradients are wrong.
    """

    model: str
    way: str
    depth: int
    batch: int
    gradients: int | None = None
    kept: int | None = None
    peak: int | None = None
    seconds: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    first: float | None = None
    error: float | None = None
    notes: tuple[str, ...] = ()
    failed: bool = False


@dataclass(frozen=True)
class Fit:
    """The largest size at which one way trains one model in some memory.

    Args:
        model, way: their names.
        sweep: "depth" or "batch": what was made larger.
        other: the size of the one that was not.
        memory: bytes, of parameters, gradients and all else.
        largest: what fitted; 0 if nothing did, None if it was not looked for.
        over: the smallest size that was found not to fit; None where the search ended before there was one.
        notes: what else there is to say; why it was not looked for.
        failed: it raised something that has nothing to do with memory.
    """

    model: str
    way: str
    sweep: str
    other: int
    memory: int
    largest: int | None = None
    over: int | None = None
    notes: tuple[str, ...] = ()
    failed: bool = False


@dataclass(frozen=True)
class Report:
    """All that one run found: steps, or a sweep (then `sweep` says of what), or fits."""

    command: str
    machine: Machine
    rows: tuple[Row, ...] = ()
    fits: tuple[Fit, ...] = ()
    sweep: str | None = None

    @property
    def found(self) -> tuple[Row, ...] | tuple[Fit, ...]:
        """Rows or fits, whichever there are."""
        return self.fits or self.rows


def this_machine(device: str) -> Machine:
    """Return the machine that this runs on."""
    processor = torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu()
    return Machine(
        processor, os.cpu_count() or 1, torch.get_num_threads(), torch.__version__, platform.python_version()
    )


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.*?)\s*$", info.read_text() if info.exists() else "", re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()

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
    """One way of training one model at one size, in blocks and samples; None stands for what was not measured.

    `kept` after the forward and the `peak` of a step are bytes beyond what was there before, without the `gradients` of
    parameters; `seconds` are the median of its steps, `ratio` that of their times over plain's in the same round, with
    its quartiles. `first`: seconds of preparing the model and its first step, in which plans and compilations are made.
    `error`: the worst relative error of a parameter's gradient against plain autograd's in fp64. `notes` say what else
    there is to say, or why it was not measured. `failed`: it raised, or its gradients are wrong.
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
    """The largest size at which one way trains one model in some memory: bytes, of parameters, gradients and all else.

    `sweep` is "depth" or "batch", what was made larger, and `other` the size of the one that was not. `largest` is what
    fitted: 0 if nothing did, None if it was not looked for; `over` the smallest size that was found not to fit, None
    where the search ended before there was one. `failed`: it raised something that has nothing to do with memory.
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

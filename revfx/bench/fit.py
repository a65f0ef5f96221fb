"""`revfx bench --memory`: the largest model, or batch, that one way trains in so much memory.

Each question is put to a child process with a limit on its data segment, in which an allocation that has no room left
raises; on CUDA the limit is the caching allocator's. The child tells what fitted as it goes on, so that one that the
system, or a library that can't cope, ends has answered as well: what it was trying does not fit.
"""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from revfx.bench.measure import Setting, raised
from revfx.bench.models import MODELS
from revfx.bench.results import Fit
from revfx.bench.ways import WAYS, why_not
from revfx.errors import RevfxError
from revfx.report.fit import search
from revfx.report.simulate import seconds_of


WANTS = ("memory", "alloc", "could not create a primitive")  # what errors say that come of it; the last is oneDNN's
DEATHS = 12  # of child processes, until the rest of the search is given up


@dataclass(frozen=True)
class Question:
    """How large can it be? `other` is the size that stays: of the batch where `sweep` is "depth", and vice versa."""

    model: str
    way: str
    sweep: str
    other: int
    memory: int
    device: str
    threads: int
    seconds: float


def largest(question: Question) -> Fit:
    """Return the answer of a child process, or of several one after the other, where they die."""
    q = question
    fit = Fit(q.model, q.way, q.sweep, q.other, q.memory, largest=0)
    if (reason := why_not(WAYS[q.way], MODELS[q.model])) is not None:
        return replace(fit, largest=None, notes=(reason,))
    for _ in range(DEATHS):
        said = ask(q, fit.largest or 0, fit.over)
        fit = replace(fit, largest=said.low, over=said.high)
        if said.ended:
            return replace(fit, notes=(*fit.notes, said.raised), failed=True) if said.raised else fit
        if said.trying is None:
            return replace(fit, notes=(*fit.notes, "a process died before it tried anything"), failed=True)
        fit = replace(fit, over=said.trying, notes=("a process that tried more died",))
        if said.trying <= 1:
            return fit
    return fit


@dataclass(frozen=True)
class Said:
    """What a child process told last: a size that fits and one that does not, what it was trying, how it ended."""

    low: int
    high: int | None
    trying: int | None = None
    ended: bool = False
    raised: str = ""


def ask(question: Question, low: int, high: int | None) -> Said:
    """Ask a child process, which looks between a size that fits and one that does not."""
    command = [sys.executable, "-m", "revfx.bench.fit", json.dumps([asdict(question), low, high])]
    # every large block is a mapping of its own, which goes back to the system when it is freed
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "KINETO_LOG_LEVEL": "99"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    lines = done.stdout.splitlines()
    return Said(**json.loads(lines[-1])) if lines else Said(low, high)


# --- in the child
def _answer(question: Question, low: int, high: int | None) -> None:
    """Print what is known before and after each size that is tried, a line each."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(question.threads)
    said = Said(low, high)

    def tell(**news: Any) -> None:
        nonlocal said
        said = replace(said, **news)
        print(json.dumps(asdict(said)), flush=True)

    def fits(size: int) -> bool:
        tell(trying=size)
        _limit(question.memory, question.device)  # anew, as kernels made for one size are held at the next
        fitted = True
        try:
            _train(question, **{"depth": question.other, "batch": question.other, question.sweep: size})
        except Exception as e:
            if not of_memory(e):
                raise
            fitted = False
        gc.collect()
        tell(trying=None, **{"low" if fitted else "high": size})
        return fitted

    try:
        _train(question, 1, MODELS[question.model].batch)  # what kernels hold for good is there before the limit
        end = time.monotonic() + question.seconds
        search(fits, low, high, lambda: time.monotonic() > end)
        tell(ended=True)
    except Exception as e:
        tell(ended=True, raised=raised(e))


def _train(question: Question, depth: int, batch: int) -> None:
    """Train one step at that size."""
    setting = Setting(MODELS[question.model], depth, batch, question.device)
    seconds_of(setting.step_of(WAYS[question.way], *setting.make()), question.device)


def of_memory(e: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, is a want of memory."""
    while e is not None:
        if isinstance(e, MemoryError | torch.OutOfMemoryError) or any(word in str(e).lower() for word in WANTS):
            return True
        e = e.__cause__ or e.__context__
    return False


def _limit(memory: int, device: str) -> None:
    """Limit this process to so many bytes more than it has now."""
    if device != "cpu":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.empty_cache()
        share = (torch.cuda.memory_reserved(device) + memory) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
        return
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + memory, most))


def data_bytes() -> int:
    """Return the bytes of this process that a limit on its data segment counts: the heap, and private mappings."""
    status = Path("/proc/self/status")
    found = re.search(r"^VmData:\s*(\d+)", status.read_text() if status.exists() else "", re.MULTILINE)
    if found is None:
        raise RevfxError("`--memory` on a CPU needs Linux, where a process can be given a limit on its data segment.")
    return int(found[1]) * 1024


if __name__ == "__main__":
    _question, _low, _high = json.loads(sys.argv[1])
    _answer(Question(**_question), _low, _high)

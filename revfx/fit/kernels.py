"""Running single operators on made-up operands: what they allocate, what they give, and how long they take."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from revfx import _torch
from revfx.fit.tape import Op, Spot, Tape


REPEATS = 3  # runs of each for its time, of which the fastest counts; one if it takes longer than ...
LONG = 0.05  # seconds


@dataclass(frozen=True)
class Cost:
    """Seconds, bytes that are there while it runs besides operands and results, and dtypes, shapes and strides of
    these.
    """

    seconds: float = 0.0
    scratch: int = 0
    results: tuple[Any, ...] = ()


def operands(tape: Tape, op: Op) -> tuple[Any, Any]:
    """Return arguments like those of `op`: random numbers, and zeros of whole ones, which are valid as indices."""
    blocks: dict[int, Tensor] = {}

    def made(leaf: Any) -> Any:
        if not isinstance(leaf, Spot):
            return leaf
        memory = tape.memory_of[leaf.value]
        if memory not in blocks:
            size, device = tape.memories[memory].size, tape.memories[memory].device
            n = -(-size // leaf.dtype.itemsize)
            draw = leaf.dtype.is_floating_point and leaf.dtype.itemsize > 1
            blocks[memory] = (torch.rand if draw else torch.zeros)(n, dtype=leaf.dtype, device=device)
        whole = blocks[memory]
        typed = whole if whole.dtype == leaf.dtype else whole.view(torch.uint8).view(leaf.dtype)
        return typed.as_strided(leaf.shape, leaf.stride, leaf.offset)

    return pytree.tree_map_only(Spot, made, (op.args, op.kwargs))


def _geometry(out: Any) -> tuple[Any, ...]:
    return tuple(
        [(t.dtype, tuple(t.shape), t.stride()) if isinstance(t, Tensor) else None for t in pytree.tree_leaves(out)]
    )


def device_of(tape: Tape, op: Op) -> torch.device:
    spots = (*op.reads, *(s for s in op.outs if s is not None))
    return next((tape.memories[tape.memory_of[s.value]].device for s in spots), torch.device("cpu"))


def seconds(op: Op, args: Any, kwargs: Any, device: torch.device) -> float:
    fastest = float("inf")
    for _ in range(REPEATS):
        if device.type != "cpu":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        op.func(*args, **kwargs)
        if device.type != "cpu":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
        if fastest > LONG:
            break
    return fastest


def on_cpu(tape: Tape, ops: Sequence[Op]) -> list[Cost]:
    if _torch.is_profiling():
        return _in_a_child(tape, ops)
    from torch.profiler import ProfilerActivity, profile, record_function

    results: list[tuple[Any, ...]] = [()] * len(ops)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        for number, op in enumerate(ops):
            with contextlib.suppress(Exception):
                args, kwargs = operands(tape, op)
                with record_function(f"revfx::{number}"):
                    out = op.func(*args, **kwargs)
                results[number] = _geometry(out)
                del out
    recorded: Any = prof.profiler
    events = [(e.name(), e.start_ns(), e) for e in recorded.kineto_results.events()]
    spans = {int(n[7:]): (s, s + e.duration_ns()) for n, s, e in events if n.startswith("revfx::")}
    changes = sorted((s, e.nbytes()) for n, s, e in events if n == "[memory]")
    found, at = [0] * len(ops), 0
    for number, (start, end) in sorted(spans.items()):
        now = most = 0
        while at < len(changes) and changes[at][0] < start:
            at += 1
        while at < len(changes) and changes[at][0] <= end:
            now += changes[at][1]
            most, at = max(most, now), at + 1
        found[number] = most - max(now, 0)
    return [Cost(scratch=b, results=r) for b, r in zip(found, results, strict=True)]


def on_cuda(tape: Tape, ops: Sequence[Op]) -> list[Cost]:
    found = [Cost()] * len(ops)
    for number, op in enumerate(ops):
        with contextlib.suppress(Exception):
            args, kwargs = operands(tape, op)
            device = device_of(tape, op)
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            out = op.func(*args, **kwargs)
            most = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
            found[number] = Cost(scratch=most, results=_geometry(out))
            del out
    return found


# --- in a process of its own
def _in_a_child(tape: Tape, ops: Sequence[Op]) -> list[Cost]:
    """Return what `on_cpu` does, measured in another process; nothing where that fails."""
    named = [replace(op, func=str(op.func)) for op in ops]
    given = pickle.dumps((torch.get_num_threads(), replace(tape, ops=[], packs=[], returned=[]), named))
    code = f"from {__name__} import child; child()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "KINETO_LOG_LEVEL": "99"}
    ran = subprocess.run([sys.executable, "-c", code], input=given, capture_output=True, env=environment)
    return pickle.loads(ran.stdout) if ran.returncode == 0 else [Cost()] * len(ops)


def child() -> None:
    """Measure what is read from the standard input, and write it to the standard output."""
    threads, tape, named = pickle.loads(sys.stdin.buffer.read())
    torch.set_num_threads(threads)
    out = os.dup(1)
    os.dup2(2, 1)  # what the profiler prints is no part of it
    with torch.enable_grad(), _torch.below_autograd():
        costs = on_cpu(tape, [replace(op, func=_found(op.func)) for op in named])
    with os.fdopen(out, "wb") as stream:
        stream.write(pickle.dumps(costs))


def _found(name: str) -> Any:
    found: Any = torch.ops
    with contextlib.suppress(AttributeError):
        for part in name.split("."):
            found = getattr(found, part)
    return found

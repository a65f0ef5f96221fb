"""What all the examples measure, and how they print it: a model's memory, time and gradients."""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import revfx
from revfx.testing import Memory, measure_memory, relative_error


os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would report its start and stop on stderr

Loss = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Comparison:
    """One training step plain and converted: bytes, seconds, and how far apart the gradients are."""

    plain: Memory
    revfx: Memory
    plain_time: float
    revfx_time: float
    first_call: float
    difference: float
    same_rng: bool

    @property
    def saving(self) -> float:
        """Plain's peak over the converted model's."""
        return self.plain.peak / self.revfx.peak


def compare(model: nn.Module, loss: Loss, *, repeats: int = 7, seed: int = 0) -> Comparison:
    """What `loss(model)` and its backward take for a copy of `model` and for the same copy converted.

    Both draw their random numbers from `seed`. Times are medians over `repeats` steps of each, taken in turn.
    """
    plain = copy.deepcopy(model)
    converted = revfx.convert(plain)
    start = time.perf_counter()
    got, got_rng = _gradients(converted, loss, seed)
    first_call = time.perf_counter() - start
    want, want_rng = _gradients(plain, loss, seed)
    difference = max(relative_error(g, w) for g, w in zip(got, want, strict=True))
    memory = measure_memory(lambda: loss(plain)), measure_memory(lambda: loss(converted))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for m, spent in zip((plain, converted), times, strict=True):
            start = time.perf_counter()
            loss(m).backward()
            spent.append(time.perf_counter() - start)
    spent_plain, spent_revfx = (statistics.median(t) for t in times)
    same_rng = torch.equal(got_rng, want_rng)
    return Comparison(*memory, spent_plain, spent_revfx, first_call, difference, same_rng)


def _gradients(model: nn.Module, loss: Loss, seed: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """The gradients of all parameters, and the state of the random number generator after the step."""
    torch.manual_seed(seed)
    return torch.autograd.grad(loss(model), list(model.parameters())), torch.get_rng_state()


def print_comparison(c: Comparison) -> None:
    """Print a comparison as a small table."""
    print(f"{'':24}{'plain':>12}{'revfx':>12}")
    print(f"{'peak memory of a step':24}{mb(c.plain.peak):>12}{mb(c.revfx.peak):>12}   {c.saving:.1f} x less")
    print(f"{'kept after the forward':24}{mb(c.plain.kept):>12}{mb(c.revfx.kept):>12}")
    ratio = c.revfx_time / c.plain_time
    print(f"{'time of a step':24}{ms(c.plain_time):>12}{ms(c.revfx_time):>12}   {ratio:.2f} x as long")
    print(f"gradients differ from plain autograd by {c.difference:.1e} (relative, the worst parameter)")


def mb(nbytes: int) -> str:
    """Bytes as text in MB."""
    return f"{nbytes / 1e6:.2f} MB"


def ms(seconds: float) -> str:
    """Seconds as text in ms."""
    return f"{seconds * 1e3:.1f} ms"


def require(holds: bool, claim: str) -> None:
    """End the program with exit status 1 unless the claim holds."""
    if not holds:
        raise SystemExit(f"FAILED: {claim}")

"""Prints figures that no test decides on: `python tests/support/measure.py planning`, or `step`.

`step`: one interleaved run of a 12-layer MLP coupling (128 wide streams, 2048 rows), medians of training steps as
ratios to plain autograd and to `torch.utils.checkpoint` per layer; RevLib and MemCNN run along where they are
installed. Large blocks go back to the system between steps by default, which slows whatever allocates most; to compare
the work itself set MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=4000000000.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import revfx
from revfx.converted import conversion_of


class Couplings(nn.Module):
    """Additive couplings; `inline` ones compute f and g in ten operations of the root's own code."""

    def __init__(self, depth: int, d: int, hidden: int, inline: bool = False) -> None:
        super().__init__()
        made = [nn.Sequential(nn.Linear(d, hidden), nn.Tanh(), nn.Linear(hidden, d)) for _ in range(2 * depth)]
        self.f, self.g, self.inline = nn.ModuleList(made[::2]), nn.ModuleList(made[1::2]), inline
        self.weights = nn.ParameterList(torch.randn(d, d) for _ in range(2 * depth if inline else 0))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for i, (f, g) in enumerate(zip(self.f, self.g, strict=True)):
            a = a + (self.ten(b, self.weights[2 * i]) if self.inline else f(b))
            b = b + (self.ten(a, self.weights[2 * i + 1]) if self.inline else g(a))
        return torch.cat([a, b], -1)

    def ten(self, x: Tensor, w: Tensor) -> Tensor:
        h = torch.sin(torch.tanh(x @ w) * 2)
        h = torch.tanh(h @ w) + 1
        return (h * h) @ w + x


class Residual(Couplings):
    """The same operations in residual blocks, which can't be inverted."""

    def forward(self, x: Tensor) -> Tensor:
        for i in range(len(self.f)):
            x = x + self.ten(x, self.weights[i])
        return x


def planning() -> None:
    """Print the seconds of a first call."""
    cases: list[tuple[str, Callable[[int], nn.Module], int]] = [
        ("couplings of three operators", lambda n: Couplings(n, 8, 8), 16),
        ("couplings of ten operators", lambda n: Couplings(n, 8, 8, inline=True), 16),
        ("irreversible residual blocks", lambda n: Residual(n, 8, 8, inline=True), 8),
    ]
    for name, make, width in cases:
        for n in (1000, 2000):
            converted = revfx.convert(make(n))
            start = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                converted(torch.randn(4, width))
            seconds = time.perf_counter() - start
            found = conversion_of(converted).couplings
            nodes = len(found[0].lowered.program.ops) if found else 0
            print(f"{n} {name}: {seconds:.2f} s" + (f", {nodes} operations" if nodes else ", nothing found"))


def contenders(model: Couplings) -> dict[str, Callable[[Tensor], Tensor]]:
    """The ways of running the same couplings, by name."""

    def layer(f: nn.Module, g: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a = a + f(b)
        return a, b + g(a)

    def checkpointed(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(model.f, model.g, strict=True):
            a, b = checkpoint(layer, f, g, a, b, use_reentrant=False)
        return torch.cat([a, b], -1)

    def whole_layers(x: Tensor) -> Tensor:
        with set_checkpoint_early_stop(False):
            return checkpointed(x)

    def block(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat(revfx.rev_block(a, b, model.f, model.g, len(model.f)), -1)

    found: dict[str, Callable[[Tensor], Tensor]] = {
        "plain": model,
        "checkpoint": checkpointed,
        "checkpoint, no early stop": whole_layers,
        "convert": revfx.convert(model),
        "rev_block": block,
    }
    for name in ("revlib", "memcnn"):
        try:
            found[name] = PEERS[name](importlib.import_module(name), model)
        except ImportError:
            print(f"{name} is not installed")
    return found


def _revlib(revlib: Any, model: Couplings) -> Callable[[Tensor], Tensor]:
    return revlib.ReversibleSequential(*[m for pair in zip(model.f, model.g, strict=True) for m in pair], split_dim=1)


def _memcnn(memcnn: Any, model: Couplings) -> Callable[[Tensor], Tensor]:
    couplings = [memcnn.AdditiveCoupling(f, g) for f, g in zip(model.f, model.g, strict=True)]
    blocks = [memcnn.InvertibleModuleWrapper(c, keep_input=False, keep_input_inverse=False) for c in couplings]

    def run(x: Tensor) -> Tensor:
        x = x.clone()
        for b in blocks:
            x = b(x)
        return x

    return run


PEERS: dict[str, Callable[[Any, Couplings], Callable[[Tensor], Tensor]]] = {"revlib": _revlib, "memcnn": _memcnn}


def step(repeats: int = 25) -> None:
    """Print the median step time of each way, in one interleaved run."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Couplings(12, 128, 512)
    x = torch.randn(2048, 256, requires_grad=True)
    ways = contenders(model)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            for t in (x, *model.parameters()):
                t.grad = None
            start = time.perf_counter()
            way(x).square().mean().backward()
            times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(t[3:]) for name, t in times.items()}
    for name, seconds in median.items():
        print(
            f"{name:<26}{1e3 * seconds:8.1f} ms   {seconds / median['plain']:.3f} of plain"
            f"   {seconds / median['checkpoint']:.3f} of checkpoint"
        )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    {"planning": planning, "step": step}[sys.argv[1]]()

"""Prints figures of `exact` that no test decides on: `python tests/support/measure_grid.py drift|bitwise|digits|step`.

`drift`: the relative error of the first regenerated cut, by depth, dtype, and what was asked of `convert`.
`bitwise`: how many outputs and gradients are equal to those of stored activations, by model, depth and precision.
`digits`: three epochs of examples/revnet_digits.py with `grid=14`, regenerated and stored, from one seed.
`step`: a training step with `grid=14` to one without, medians of one interleaved run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from grids import Affine, WithDropout, gradients
from measure import Couplings
from torch import Tensor, nn
from zoo import Additive, D, Momentum, tokens, vectors

import revfx
from revfx.testing import drift as drift_of, store_activations


class TanhCouplings(nn.Module):
    """Additive couplings of tanh(linear), affine ones with factors in [1/e, e], or a momentum of 0.9."""

    def __init__(self, kind: str, depth: int, half: bool) -> None:
        super().__init__()
        self.kind, self.narrow = kind, half
        self.f = nn.ModuleList(nn.Linear(D, D) for _ in range(depth))
        self.g = nn.ModuleList(nn.Linear(D, D) for _ in range(depth))
        for m in (*self.f, *self.g) if half else ():
            m.bfloat16()

    def read(self, f: nn.Module, t: Tensor) -> Tensor:
        return torch.tanh(f(t.bfloat16()) if self.narrow else f(t)) / len(self.f) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            if self.kind == "momentum":
                b = 0.9 * b + self.read(f, a)
                a = a + b * 0.1
            elif self.kind == "affine":
                a = a * torch.exp(torch.tanh(self.read(f, b))) + self.read(g, b)
                a, b = b, a
            else:
                a = a + self.read(f, b)
                b = b + self.read(g, a)
        return torch.cat([a, b], -1)


ASKED: dict[str, dict[str, Any]] = {"default": {}, "anchor_every=20": {"anchor_every": 20}, "grid=12": {"grid": 12}}
STREAMS = {"fp32": (torch.float32, False), "fp32, f in bf16": (torch.float32, True), "bf16": (torch.bfloat16, True)}


def drift() -> None:
    """None; prints a table in Markdown, of three depths in each cell."""
    depths = (10, 100, 1000)
    print("| couplings | streams | " + " | ".join(ASKED) + " |\n|---|---|" + "---|" * len(ASKED))
    for kind in ("additive", "affine", "momentum"):
        for streams, (dtype, half) in STREAMS.items():
            cells = [" / ".join(f"{_worst(kind, d, dtype, half, o):.0e}" for d in depths) for o in ASKED.values()]
            print(f"| {kind} | {streams} | " + " | ".join(cells) + " |", flush=True)


def _worst(kind: str, depth: int, dtype: torch.dtype, half: bool, options: dict[str, Any]) -> float:
    torch.manual_seed(0)
    model = TanhCouplings(kind, depth, half).to(dtype if dtype == torch.bfloat16 else None)
    return drift_of(revfx.convert(model, **options), torch.randn(64, 2 * D, dtype=dtype)).worst


def bitwise() -> None:
    """None; prints how many tensors are equal."""
    models: dict[str, tuple[Callable[[int], nn.Module], Callable[[int], tuple[Tensor, ...]]]] = {
        "additive": (Additive, vectors), "affine": (Affine, vectors), "momentum": (Momentum, vectors),
        "transformer with dropout": (WithDropout, tokens),
    }  # fmt: skip
    for name, (make, inputs) in models.items():
        for depth in (10, 100, 1000):
            for autocast in (False, True):
                torch.manual_seed(0)
                model, x = revfx.convert(make(depth), grid=14), inputs(4)
                _report(f"convert, {name}, {depth} layers", model, x, autocast)
    for depth in (10, 100, 1000):
        for autocast in (False, True):
            torch.manual_seed(0)
            block: Any = revfx.RevBlock(_dropout, _tanh, depth, grid=14)
            x = tuple(torch.randn(4, D) for _ in range(2))
            _report(f"RevBlock, {depth} layers", block, x, autocast)
            f, g = block.f, block.g
            run = lambda a, b, f=f, g=g, n=depth: revfx.rev_block(a, b, f, g, n, grid=14)  # noqa: E731
            _report(f"rev_block, {depth} layers", run, x, autocast)


def _dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(D, D), nn.Dropout(0.1), nn.Tanh())


def _tanh() -> nn.Module:
    return nn.Sequential(nn.Linear(D, D), nn.Tanh())


def _report(name: str, model: Any, inputs: tuple[Tensor, ...], autocast: bool) -> None:
    start = time.perf_counter()
    got, want = (gradients(model, inputs, store=store, autocast=autocast) for store in (False, True))
    equal = sum(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    precision = "bf16 autocast" if autocast else "fp32"
    print(f"{name}, {precision}: {equal} of {len(want)} equal, {time.perf_counter() - start:.1f} s", flush=True)


def digits(epochs: int = 3) -> None:
    """None; prints losses, accuracies, and whether the weights at the end are the same."""
    path = Path(__file__).parent.parent.parent / "examples" / "revnet_digits.py"
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location("revnet_digits", path)
    assert spec is not None and spec.loader is not None
    example: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    x, y, x_test, y_test = example.digits()
    steps = epochs * (len(x) // example.BATCH)
    ways: dict[str, dict[str, Any]] = {
        "unrounded": {},
        "exact, regenerated": {"grid": 14},
        "exact, stored": {"grid": 14},
    }
    ends: dict[str, list[Tensor]] = {}
    for name, options in ways.items():
        torch.manual_seed(0)
        run = example.Run(revfx.convert(example.RevNet(24, 6), **options), steps)
        order = torch.Generator().manual_seed(0)
        with store_activations() if name.endswith("stored") else contextlib.nullcontext():
            for _ in range(epochs):
                for b in torch.randperm(len(x), generator=order)[: steps // epochs * example.BATCH].view(
                    -1, example.BATCH
                ):
                    run.step(x[b], y[b])
            print(f"{name}: last loss {run.losses[-1]:.6f}, test {run.accuracy(x_test, y_test):.2%}", flush=True)
        ends[name] = list(run.model.state_dict().values())
    pairs = zip(ends["exact, regenerated"], ends["exact, stored"], strict=True)
    print(f"{sum(torch.equal(a, b) for a, b in pairs)} of {len(ends['unrounded'])} weights and buffers equal")


def step(repeats: int = 25) -> None:
    """None; prints the ratio of medians."""
    torch.manual_seed(0)
    model, x = Couplings(12, 128, 512), torch.randn(2048, 256, requires_grad=True)
    blocks = {e: revfx.RevBlock(model.f, model.g, 12, grid=e) for e in (None, 14)}
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "convert": revfx.convert(model),
        "convert, exact": revfx.convert(model, grid=14),
        "RevBlock": lambda t: torch.cat(blocks[False](*t.chunk(2, -1)), -1),
        "RevBlock, exact": lambda t: torch.cat(blocks[True](*t.chunk(2, -1)), -1),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way(x).square().mean().backward()
            times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(t[3:]) for name, t in times.items()}
    for name in ("convert", "RevBlock"):
        print(f"{name}: exact takes {median[name + ', exact'] / median[name]:.3f} of the time without")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    {"drift": drift, "bitwise": bitwise, "digits": digits, "step": step}[sys.argv[1]]()

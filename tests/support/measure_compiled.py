"""Prints figures of the compiled path that no test decides on.

`python tests/support/measure_compiled.py budgets`: peak memory and step time of `backend="revfx"` against torch's own
compiler at every `activation_memory_budget` in 0, .1, ..., 1, on a 12-layer coupling MLP and a 12-layer reversible
transformer. Times are medians of one interleaved run, as ratios; for them set MALLOC_MMAP_THRESHOLD_=1000000000
MALLOC_TRIM_THRESHOLD_=4000000000, lest page faults be compared.

`python tests/support/measure_compiled.py compiling`: what the rewrite takes of a whole compilation, and at 200 layers.
"""

from __future__ import annotations

import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from measure import Couplings
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from zoo import Transformer

from revfx.compiled import _inductor, partitioner
from revfx.testing import measure_memory


BUDGETS = [i / 10 for i in range(11)]
Step = Callable[[], Tensor]


def models() -> Mapping[str, tuple[nn.Module, Tensor]]:
    """The two models with their inputs."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 256, (16, 64))
    return {
        "12-layer coupling MLP": (Couplings(12, 128, 512), torch.randn(2048, 256, requires_grad=True)),
        "12-layer reversible transformer": (Transformer(12, 128, 256, 64), tokens),
    }


def compiled(model: nn.Module, x: Tensor, budget: float | None, **door: Any) -> Step:
    """A training step of `model`, compiled by one door, under a budget of torch's partitioner."""
    torch.compiler.reset()
    run = torch.compile(model, **door)

    def step() -> Tensor:
        return run(x).square().mean()

    with functorch_config.patch(activation_memory_budget=1.0 if budget is None else budget):
        step().backward()
    return step


def peak_of(model: nn.Module, step: Step) -> float:
    """MB at the peak of a step, less those of the parameters' gradients."""
    model.zero_grad()
    return (measure_memory(step).peak - sum(p.numel() * p.element_size() for p in model.parameters())) / 1e6


def interleaved(model: nn.Module, ways: Mapping[str, Step], repeats: int = 25) -> dict[str, float]:
    """The median seconds of each way's steps, all in one run."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, step in ways.items():
            model.zero_grad()
            start = time.perf_counter()
            step().backward()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[3:]) for name, seconds in times.items()}


def budgets() -> None:
    """Print the table of peaks and times."""
    for name, (model, x) in models().items():
        print(name)
        peaks = {b: peak_of(model, compiled(model, x, b)) for b in BUDGETS}
        for budget, peak in peaks.items():
            print(f"  inductor, activation_memory_budget {budget:.1f}: peak {peak:7.2f} MB")
        lowest = min(peaks, key=lambda b: (peaks[b], -b))
        doors: dict[str, tuple[float | None, dict[str, Any]]] = {
            "inductor": (None, {}),
            f"inductor, budget {lowest}": (lowest, {}),
            "revfx": (None, {"backend": "revfx"}),
            "revfx, aot_eager": (None, {"backend": "revfx", "options": {"inner": "aot_eager"}}),
        }
        # a copy of the function for each: torch.compiler.reset() would take the others' code away
        ways = {way: _kept(model, x, budget, door) for way, (budget, door) in doors.items()}
        seconds = interleaved(model, ways)
        for way, step in ways.items():
            ratios = f"{seconds[way] / seconds['inductor']:.3f} of inductor"
            theirs = seconds[f"inductor, budget {lowest}"]
            peak = peak_of(model, step)
            print(
                f"  {way:<24} peak {peak:7.2f} MB ({peak / peaks[lowest]:.2f} of the lowest)   "
                f"step {1e3 * seconds[way]:7.1f} ms   {ratios}   {seconds[way] / theirs:.3f} of budget {lowest}"
            )


def _kept(model: nn.Module, x: Tensor, budget: float | None, door: Mapping[str, Any]) -> Step:
    """As `compiled`, without forgetting what was compiled before."""

    def forward(x: Tensor) -> Tensor:
        return model(x)

    code = forward.__code__.replace(co_name=f"forward_{len(_names)}")
    _names.append(code.co_name)
    run = torch.compile(types.FunctionType(code, globals(), None, None, forward.__closure__), **door)

    def step() -> Tensor:
        return run(x).square().mean()

    with functorch_config.patch(activation_memory_budget=1.0 if budget is None else budget):
        step().backward()
    return step


_names: list[str] = []


def compiling() -> None:
    """Print the seconds that the rewrite takes, beside those of the whole compilation."""
    seconds: list[float] = []
    rewrite = partitioner.rewrite

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        report = rewrite(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return report

    partitioner.rewrite = timed
    tokens = torch.randint(0, 256, (4, 32))
    model = Transformer(12, 64, 256, 32)
    with inductor_config.patch(force_disable_caches=True):
        start = time.perf_counter()
        torch.compile(model, backend="revfx")(tokens).sum().backward()
        whole = time.perf_counter() - start
    print(f"12 layers: rewrite {seconds[-1]:.2f} s of {whole:.1f} s: {seconds[-1] / whole:.1%}")
    for layers in (12, 50, 100, 200):
        torch.compiler.reset()
        nodes: list[int] = []
        rewriter = partitioner.ReversiblePartitioner()

        def split(gm: Any, inputs: Any, rewriter: Any = rewriter, nodes: list[int] = nodes, **kwargs: Any) -> Any:
            nodes.append(len(gm.graph.nodes))
            return rewriter(gm, inputs, **kwargs)

        backend = aot_autograd(
            fw_compiler=boxed_nop, partition_fn=split, decompositions=_inductor.select_decomp_table()
        )
        run = torch.compile(Transformer(layers, 64, 256, 32), backend=backend)
        run(tokens)
        print(f"{layers} layers: rewrite {seconds[-1]:.2f} s, {nodes[0]} nodes")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    {"budgets": budgets, "compiling": compiling}[sys.argv[1]]()

"""What the processes of the compiled distributed tests run: gradients, and what became of each compiled graph.

In a module of its own, which the spawned processes can import.
"""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from compiled import BOTH, INNERS
from compiled_distributed_models import STEPS, inputs, update
from compiled_distributed_placing import CASES, COLLECTIVES, Case, Options
from helpers import DEEP, loss_of
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from revfx.compiled.partitioner import reports


BY_INDUCTOR = (
    "DDP, then compiled, default buckets",
    *(("blocks sharded, all compiled", "between chains") if DEEP else ()),
)
FIRST_BUCKET = "_DEFAULT_FIRST_BUCKET_BYTES"  # DDP's optimizer takes no bucket smaller than that
STOCK = "stock"  # the way that is not revfx's, but torch's own "aot_eager"
WARNINGS = (  # torch's own, whatever the backend
    ".*NumPy.*",
    ".*Profiler clears events.*",
    ".*torch.jit.*",
    ".*should not be instantiated.*",
    "The .grad attribute of a Tensor that is not a leaf",  # dynamo looks for it in a graph's inputs
    "Guards may run slower on Python 3.13.0.*",
)
KERNELS: dict[str, Any] = {"compile_threads": 1, "cpp.simdlen": 1}  # what compiles soonest


@dataclass
class Result:
    """Of one case in one process: gradients by step, regions by graph in the order of compilation, what the log said.

    `inverted` is how many of their steps are computed back. `graphs` is dynamo's count: DDP's optimizer splits what it
    counts as one. `collectives` is how many all-reduces the graphs asked for in one step, where that is looked at.
    """

    gradients: list[list[Tensor | None]] = field(default_factory=list[list[Tensor | None]])
    regions: list[int] = field(default_factory=list[int])
    inverted: int = 0
    log: list[str] = field(default_factory=list[str])
    graphs: int = 0
    collectives: int = 0
    error: str = ""


# --- training
def train(model: nn.Module, rank: int, accumulate: bool) -> Iterator[list[Tensor | None]]:
    """The gradients of each step; some accumulate first, without communication."""
    for step in range(STEPS):
        if accumulate:
            (ddp,) = (m for m in model.modules() if isinstance(m, DistributedDataParallel))
            with ddp.no_sync():
                loss_of(model(inputs(rank, step + 50))).backward()
        loss_of(model(inputs(rank, step))).backward()
        yield update(model)


def reference(world: int, case: Case) -> list[list[Tensor | None]]:
    """Per step the plain model's gradients, averaged over the ranks' inputs, in one process."""
    model, world = case.build(), 1 if case.alike else world
    found: list[list[Tensor | None]] = []
    for step in range(STEPS):
        for rank in range(world):
            for k in (step + 50, step) if case.accumulate else (step,):
                (loss_of(model(inputs(rank, k))) / world).backward()
        found.append(update(model))
    return found


def inners(name: str) -> tuple[str, ...]:
    """The inner compilers that a case runs with."""
    return BOTH if name in BY_INDUCTOR else INNERS


def ways(kind: str, name: str) -> tuple[str, ...]:
    """The inner compilers; torch's own backend, too, where it tells what torch gives up to sharding or collectives."""
    return inners(name) if kind == "DDP" else (*inners(name), STOCK)


def run(case: Case, way: str, rank: int) -> Result:
    """What comes of a case in this process."""
    torch.compiler.reset()
    counters.clear()
    setattr(dist, FIRST_BUCKET, case.bucket)
    options: Options = {"backend": "revfx", "options": {"inner": way}} if way != STOCK else {"backend": "aot_eager"}
    result = Result()
    logger, handler = logging.getLogger("revfx"), Lines(result.log)
    logger.addHandler(handler)
    try:
        with reports() as found, dynamo_config.patch(optimize_ddp=case.optimize_ddp):
            model = case.place(case.build(), options)
            result.gradients = list(train(model, 0 if case.alike else rank, case.accumulate))
            if case in COLLECTIVES.values():
                result.collectives = collectives_of(model, rank)
        result.regions = [len(report.regions) for report in found]
        result.inverted = sum(region.inverted for report in found for region in report.regions)
        result.graphs = counters["stats"]["unique_graphs"]
    except Exception:
        result.error = traceback.format_exc()
    logger.removeHandler(handler)
    return result


def collectives_of(model: nn.Module, rank: int) -> int:
    """How many all-reduces the graphs ask for in one forward and backward."""
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        loss_of(model(inputs(rank, 0))).backward()
    return sum(event.name.startswith("_c10d_functional::all_reduce") for event in prof.events() or ())


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.INFO)
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def work(rank: int, world: int, folder: str) -> None:
    """Runs every case and saves {(kind, case, way): Result}."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("error")
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("revfx").setLevel(logging.INFO)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    results: dict[tuple[str, str, str], Result] = {}
    # whole functions come out of no cache, so that every graph is partitioned, and reported
    with functorch_config.patch(enable_autograd_cache=False), inductor_config.patch(KERNELS):
        if rank == 0:
            torch.compile(torch.sin)(torch.ones(2))  # compiles the header of all kernels, for all processes
        dist.barrier()
        for kind, cases in CASES.items():
            for name, case in cases.items():
                for way in ways(kind, name):
                    results[kind, name, way] = run(case, way, rank)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()

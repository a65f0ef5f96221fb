"""What the processes of the distributed tests run: each case's gradients are kept for the test to compare.

In a module of its own, which the spawned processes can import.
"""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import loss_of, mlps
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from ways import BUILD, WAYS, Build, Plain, functions_of

from revfx import block, convert, planning
from revfx.calls import Call
from revfx.executor import RegionPlan, run_region


DEPTH, ROWS, STEPS = 3, 6, 3


@dataclass
class Result:
    """Of one case in one process: per step the gradients, and how many regions ran; or the error that came up."""

    gradients: list[list[Tensor | None]] = field(default_factory=list[list[Tensor | None]])
    buffers: list[Tensor] = field(default_factory=list[Tensor])
    regions: int = 0
    error: str = ""


class WithUnused(nn.Module):
    """A chain between two layers, and a layer that is not used."""

    def __init__(self, chain: nn.Module) -> None:
        super().__init__()
        self.stem, self.chain, self.head = nn.Linear(8, 8), chain, nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.chain(self.stem(x)))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4))


def chain(build: Build) -> nn.Module:
    """The same weights every time."""
    torch.manual_seed(0)
    return build([normed(), *mlps(DEPTH - 1)], mlps(DEPTH))


def inputs(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(ROWS, 8, generator=generator)


def train(model: nn.Module, rank: int, accumulate: bool = False) -> Result:
    """Several steps, with an update between them."""
    result = Result()
    for step in range(STEPS):
        if accumulate:
            with model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext():
                loss_of(model(inputs(rank, step + 50))).backward()
        loss_of(model(inputs(rank, step))).backward()
        result.gradients.append([_whole(p.grad) for p in model.parameters()])
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p.sub_(p.grad, alpha=0.01)
                    p.grad = None
    result.buffers = [b.clone() for b in model.buffers()]
    return result


def _whole(grad: Any) -> Tensor | None:
    if grad is None:
        return None
    return (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).detach().clone()


def reference(world: int, unused: bool, accumulate: bool) -> list[list[Tensor | None]]:
    """Per step the plain model's gradients, averaged over the ranks' inputs, in one process."""
    torch.set_default_dtype(torch.float64)
    model = WithUnused(chain(Plain)) if unused else chain(Plain)
    out: list[list[Tensor | None]] = []
    for step in range(STEPS):
        for rank in range(world):
            for k in (step + 50, step) if accumulate else (step,):
                (loss_of(model(inputs(rank, k))) / world).backward()
        out.append([_whole(p.grad) for p in model.parameters()])
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p.sub_(p.grad, alpha=0.01)
                    p.grad = None
    return out


# --- cases
Case = Callable[[Build, int, int], Result]


def _ddp(unused: bool = False, accumulate: bool = False, **options: Any) -> Case:
    def run(build: Build, rank: int, world: int) -> Result:
        inner = WithUnused(chain(build)) if unused else chain(build)
        return train(DistributedDataParallel(inner, **options), rank, accumulate)

    return run


def sharded(model: nn.Module, each: bool, **options: Any) -> nn.Module:
    """The model itself, after FSDP2 was applied to it, and before that to each f and g."""
    for m in functions_of(model) if each else ():
        fully_shard(m, **options)
    fully_shard(model)
    return model


def _fsdp(each: bool, **options: Any) -> Case:
    def run(build: Build, rank: int, world: int) -> Result:
        return train(sharded(chain(build), each, **options), rank)

    return run


def shard_then_convert(build: Build, rank: int, world: int) -> Result:
    return train(convert(sharded(chain(build), each=True)), rank)


DDP: dict[str, tuple[Case, bool, bool]] = {
    "plain options": (_ddp(), False, False),
    "gradients as views of buckets": (_ddp(gradient_as_bucket_view=True), False, False),
    "unused parameters": (_ddp(unused=True, find_unused_parameters=True), True, False),
    "static graph": (_ddp(static_graph=True), False, False),
    "accumulation": (_ddp(accumulate=True), False, True),
}
FSDP: dict[str, Case] = {
    "whole": _fsdp(each=False),
    "f and g each": _fsdp(each=True),
    "f and g each, kept unsharded": _fsdp(each=True, reshard_after_forward=False),
}


def work(rank: int, world: int, folder: str) -> None:
    """Runs every case and saves {(kind, case, way): Result}."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".*NumPy.*")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    runs = [0]

    def counted(plan: RegionPlan, calls: list[Call], env: dict[int, Tensor]) -> None:
        runs[0] += 1
        run_region(plan, calls, env)

    for module in (block, planning):
        vars(module)["run_region"] = counted
    cases = {("DDP", name): case for name, (case, _, _) in DDP.items()}
    if world > 1:
        cases |= {("FSDP", name): case for name, case in FSDP.items()}
    results: dict[tuple[str, str, str], Result] = {}
    for (kind, name), case in cases.items():
        for way in ("plain", *WAYS):
            results[kind, name, way] = _result(case, BUILD[way], rank, world, runs)
    if world > 1:
        results["FSDP", "converted last", "convert"] = _result(shard_then_convert, Plain, rank, world, runs)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def _result(case: Case, build: Build, rank: int, world: int, runs: list[int]) -> Result:
    runs[0] = 0
    try:
        result = case(build, rank, world)
    except Exception:
        result = Result(error=traceback.format_exc())
    result.regions = runs[0]
    return result

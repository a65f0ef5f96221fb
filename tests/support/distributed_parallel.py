"""Tensor parallel and pipelined models of the distributed tests.

In a module of its own, which the spawned processes can import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from distributed_models import STEPS, Gradients, Result, chain_of, inputs, train, update
from helpers import loss_of, quick_but
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import ScheduleInterleavedZeroBubble
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from ways import Build, Plain, functions_of


Place = Callable[[nn.Module], nn.Module]


def unwaited() -> int:
    """How many collectives this process has started and nobody has waited for: torch holds what they write to."""
    return torch._C._distributed_c10d._get_work_registry_size()  # pyright: ignore


# --- tensor parallel: the two layers of each f and g are cut in columns and rows
def mesh_of_all() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def parallel(model: nn.Module, mesh: DeviceMesh, columns: dict[str, Any], rows: dict[str, Any]) -> nn.Module:
    for m in functions_of(model):
        parallelize_module(m, mesh, {"0": ColwiseParallel(**columns), "2": RowwiseParallel(**rows)})
    return model


class Spread(nn.Module):
    """A model whose input is made a DTensor, and whose output is put together."""

    def __init__(self, model: nn.Module, mesh: DeviceMesh, placement: Any) -> None:
        super().__init__()
        self.model, self.mesh, self.placement = model, mesh, placement

    def forward(self, x: Tensor) -> Tensor:
        return self.model(distribute_tensor(x, self.mesh, [self.placement])).full_tensor()


class Tokens(Spread):
    """As `Spread`, of three dimensions: the last stream comes back as a part of what is kept, with its strides."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unflatten(0, (2, -1))).flatten(0, 1)


class Rows(nn.Module):
    """A model that is given some rows in each process, and whose output is put together."""

    def __init__(self, model: nn.Module, mesh: DeviceMesh) -> None:
        super().__init__()
        self.model, self.mesh = model, mesh

    def forward(self, x: Tensor) -> Tensor:
        part = self.model(x.chunk(self.mesh.size())[self.mesh.get_local_rank()])
        return DTensor.from_local(part, self.mesh, [Shard(0)]).full_tensor()


def in_rows_and_columns(model: nn.Module) -> nn.Module:
    return parallel(model, mesh_of_all(), {}, {})


def in_sequence(model: nn.Module) -> nn.Module:
    """Streams are cut in rows: each process has its own, and the functions put them together."""
    mesh = mesh_of_all()
    return Rows(parallel(model, mesh, {"input_layouts": Shard(0)}, {"output_layouts": Shard(0)}), mesh)


def with_whole_dtensors(model: nn.Module) -> nn.Module:
    mesh, kept = mesh_of_all(), {"use_local_output": False}
    return Spread(parallel(model, mesh, kept, kept), mesh, Replicate())


def with_sharded_dtensors(model: nn.Module) -> nn.Module:
    mesh = mesh_of_all()
    return Spread(distribute_module(model, mesh), mesh, Shard(0))


def with_tokens(placement: Any) -> Place:
    def place(model: nn.Module) -> nn.Module:
        mesh = mesh_of_all()
        return Tokens(distribute_module(model, mesh), mesh, placement)

    return place


TENSOR: dict[str, Place] = quick_but(
    ("streams of whole DTensors", "three dimensions, whole"),
    {
        "rows and columns": in_rows_and_columns,
        "streams in sequence": in_sequence,
        "streams of whole DTensors": with_whole_dtensors,
        "streams of sharded DTensors": with_sharded_dtensors,
        "three dimensions, whole": with_tokens(Replicate()),
        "three dimensions, sharded": with_tokens(Shard(0)),
    },
)


def tensor_and_data(build: Build, rank: int, world: int) -> Result:
    """Each f and g is cut among two processes, and each of the pieces sharded among the others."""
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
    model = parallel(chain_of(build), mesh["tensor"], {}, {})
    for m in functions_of(model):
        fully_shard(m, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    return train(model, mesh["data"].get_local_rank())


# --- pipelines
MICROBATCHES = 4
PIPELINES: dict[str, Any] = quick_but(
    ("GPipe", "interleaved 1F1B"),
    {
        "GPipe": ScheduleGPipe,
        "1F1B": Schedule1F1B,
        "interleaved 1F1B": ScheduleInterleaved1F1B,
        "interleaved, without bubbles": ScheduleInterleavedZeroBubble,  # gradients of inputs, and later of weights
    },
)


def stages_of(schedule: str, rank: int, world: int) -> list[int]:
    """The stages that a process has."""
    return [rank, rank + world] if "interleaved" in schedule else [rank]


def batch() -> Tensor:
    return torch.cat([inputs(0, step) for step in range(MICROBATCHES)])


def pipelined(schedule: Any) -> Callable[[Build, int, int], Result]:
    """A model of several chains, each in a stage of its own; its gradients are those of each step."""
    (name,) = (n for n, s in PIPELINES.items() if s is schedule)

    def run(build: Build, rank: int, world: int) -> Result:
        mine = stages_of(name, rank, world)
        count = world * len(mine)
        models = [chain_of(build, seed=stage) for stage in mine]
        stages = [PipelineStage(m, i, count, torch.device("cpu")) for m, i in zip(models, mine, strict=True)]
        given: Any = stages if len(stages) > 1 else stages[0]
        made = schedule(given, MICROBATCHES, loss_fn=lambda y, _: loss_of(y))
        result, x = Result(), batch()
        for _ in range(STEPS):
            made.step(*([x] if rank == 0 else []), **({"target": x} if rank == world - 1 else {}))
            result.gradients.append([g for m in models for g in update(m)])
        return result

    return run


def pipeline_reference(stages: int) -> list[list[Gradients]]:
    """Per step and stage the gradients, in one process."""
    model = nn.Sequential(*(chain_of(Plain, seed=seed) for seed in range(stages)))
    found: list[list[Gradients]] = []
    for _ in range(STEPS):
        for part in batch().chunk(MICROBATCHES):
            (loss_of(model(part)) / MICROBATCHES).backward()
        found.append([update(stage) for stage in model])
    return found

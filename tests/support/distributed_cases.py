"""What the processes of the distributed tests run: each case's gradients are kept for the test to compare.

In a module of its own, which the spawned processes can import.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_models import STEPS, Result, Task, blocks, chain, chain_of, inputs, model_of, train
from distributed_parallel import PIPELINES, TENSOR, pipelined, tensor_and_data, unwaited
from distributed_state import STATE
from helpers import DEEP, kept_cuts, loss_of, quick_but
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from ways import BUILD, WAYS, Build, Plain, functions_of

from revfx import convert
from revfx.engine import proof
from revfx.engine.forward import Forward
from revfx.testing import Memory, measure_memory


Case = Callable[[Build, int, int], Result]
Key = tuple[str, str, str]  # kind, case, way
# `rev_block` in deep runs alone: it differs from `RevBlock` in where the parameters live
OWN = ("convert", "rev_block", "RevBlock") if DEEP else ("convert", "RevBlock")
OF_DDP, OF_MEMORY = (WAYS, OWN) if DEEP else (OWN, ("convert",))
SAME_KEYS = ("convert", "rev_block")  # as the plain model


# --- DDP: options and what is trained
TINY = 1e-4  # MB: less than two functions' parameters
TWO_OPTIONS = (
    *("gradients as views of tiny buckets", "static graph, tiny buckets", "unused parameters, static graph"),
    *("accumulation in views of buckets", "uneven inputs, tiny buckets"),
)
DDP: dict[str, tuple[dict[str, Any], Task]] = quick_but(
    TWO_OPTIONS,
    {
        "plain options": ({}, Task()),
        "tiny buckets": ({"bucket_cap_mb": TINY}, Task()),
        "gradients as views of buckets": ({"gradient_as_bucket_view": True}, Task()),
        "gradients as views of tiny buckets": ({"gradient_as_bucket_view": True, "bucket_cap_mb": TINY}, Task()),
        "unused parameters": ({"find_unused_parameters": True}, Task(unused=True)),
        "unused parameters, static graph": ({"static_graph": True}, Task(unused=True)),
        "static graph": ({"static_graph": True}, Task()),
        "static graph, tiny buckets": ({"static_graph": True, "bucket_cap_mb": TINY}, Task()),
        "accumulation": ({}, Task(accumulate=True)),
        "accumulation in views of buckets": ({"gradient_as_bucket_view": True}, Task(accumulate=True)),
        "uneven inputs": ({}, Task(uneven=True)),
        "uneven inputs, tiny buckets": ({"bucket_cap_mb": TINY}, Task(uneven=True)),
    },
)


def _ddp(options: dict[str, Any], task: Task) -> Case:
    return lambda build, rank, world: train(DistributedDataParallel(model_of(task, build), **options), rank, task)


# --- FSDP2
Parts = Callable[[nn.Module], list[Any]]  # modules, or lists of modules that are sharded together


def none(model: nn.Module) -> list[Any]:
    return []


def layers(model: nn.Module) -> list[Any]:
    """f and g of each layer."""
    return [list(pair) for pair in zip(functions_of(model)[::2], functions_of(model)[1::2], strict=True)]


def sharded(model: nn.Module, parts: list[Any], root: dict[str, Any] | None = None, **options: Any) -> nn.Module:
    """The model itself, after FSDP2 was applied to it, and before that to each of its parts."""
    for m in parts:
        fully_shard(m, **options)
    fully_shard(model, **(options if root is None else root))
    return model


def _fsdp(parts: Parts, task: Task = Task(), **options: Any) -> Case:  # noqa: B008
    def run(build: Build, rank: int, world: int) -> Result:
        model = chain(build)
        return train(sharded(model, parts(model), **options), rank, task)

    return run


def _mixed(parts: Parts, root: dict[str, Any], **options: Any) -> Case:
    def run(build: Build, rank: int, world: int) -> Result:
        model = chain_of(build)
        return train(sharded(model, parts(model), root, **options), rank)

    return run


def _blocks(**options: Any) -> Case:
    def run(build: Build, rank: int, world: int) -> Result:
        model = blocks(build)
        return train(sharded(model, list(model), **options), rank)

    return run


def shard_then_convert(parts: Parts) -> Case:
    def run(build: Build, rank: int, world: int) -> Result:
        model = chain(build)
        return train(convert(sharded(model, parts(model))), rank, Task(accumulate=True))

    return run


def around(build: Build, rank: int, world: int) -> Result:
    """Blocks that are sharded each, in a model that is converted as a whole."""
    model: Any = blocks(Plain)
    return train(sharded(model if build is Plain else convert(model), list(model)), rank)


class Affine(nn.Module):
    """Couplings whose factor comes near to zero where a stream is large."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.s, self.t = (nn.ModuleList(nn.Linear(4, 4) for _ in range(4)) for _ in "st")

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        for s, t in zip(self.s, self.t, strict=True):
            a, b = b, a * torch.exp(-s(b).abs()) + t(b)
        return torch.cat([a, b], dim=-1).tanh()


def guarded(build: Build, rank: int, world: int) -> Result:
    """In the last process alone a factor is too small to be divided by, so it keeps another cut than the others do."""
    model: Any = Affine() if build is Plain else convert(Affine())
    sharded(model, [*model.s, *model.t])
    for _ in range(STEPS):
        loss_of(model(inputs(rank, 0) * (40.0 if rank == world - 1 else 1.0))).backward()
    gradients: list[Tensor | None] = [p.grad.full_tensor() for p in model.parameters()]
    return Result([gradients], [torch.tensor(0.0 if build is Plain else kept_cuts(model))])


def disagreeing(build: Build, rank: int, world: int) -> Result:
    """The last process finds other bits in a replay with collectives: no process may run that again."""
    right = proof.same_values
    if rank == world - 1:
        proof.same_values = lambda a, b: False
    try:
        return train(TENSOR["rows and columns"](chain_of(build)), 0)
    finally:
        proof.same_values = right


F32 = torch.float32
CASTS = {"mp_policy": MixedPrecisionPolicy(param_dtype=F32, reduce_dtype=F32)}
BACK = {"mp_policy": MixedPrecisionPolicy(param_dtype=F32, output_dtype=torch.float64)}
FSDP: dict[str, tuple[Case, Task]] = quick_but(
    ("whole, kept unsharded",),  # as f and g each
    {
        "whole": (_fsdp(none), Task()),
        "whole, kept unsharded": (_fsdp(none, reshard_after_forward=False), Task()),
        "f and g each": (_fsdp(functions_of, reshard_after_forward=True), Task()),
        "f and g each, kept unsharded": (_fsdp(functions_of, reshard_after_forward=False), Task()),
        "f and g of a layer together": (_fsdp(layers), Task()),
        "accumulation": (_fsdp(functions_of, task=Task(accumulate=True)), Task(accumulate=True)),
    },
)
BLOCKS: dict[str, Case] = quick_but(
    ("blocks, kept unsharded",),  # as f and g each
    {
        "blocks": _blocks(reshard_after_forward=True),
        "blocks, kept unsharded": _blocks(reshard_after_forward=False),
    },
)
MIXED: dict[str, Case] = {  # what is computed in float32, of a model in fp64
    "f and g": _mixed(functions_of, {}, **CASTS),
    "f and g, with streams": _mixed(functions_of, BACK, **CASTS),
    "f and g, without what they return": _mixed(functions_of, {}, **BACK),
    "all as one": _mixed(none, BACK),
}
LAST: dict[str, Case] = {"whole": shard_then_convert(none), "f and g each": shard_then_convert(functions_of)}


# --- memory of one step
def _wide(model: nn.Module) -> Callable[[], Tensor]:
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    return lambda: loss_of(model(x))


def _measured(place: Callable[[nn.Module], nn.Module]) -> Case:
    """The least of eight steps: gloo's threads let go of what a collective wrote to when they get to it."""

    def run(build: Build, rank: int, world: int) -> Result:
        step = _wide(place(chain_of(build, depth=8)))
        found = [measure_memory(step) for _ in range(8)]
        return Result(memory=Memory(min(m.kept for m in found), min(m.peak for m in found)))

    return run


MEMORY: dict[str, Case] = {
    "DDP": _measured(DistributedDataParallel),
    "FSDP2": _measured(lambda model: sharded(model, functions_of(model))),
    "tensor parallel": _measured(TENSOR["rows and columns"]),
}


# --- all of it
IN_ONE = ("tiny buckets",)  # of DDP: what one process runs
IN_FOUR = {  # what four processes run
    "DDP": ("tiny buckets", "uneven inputs"),
    "FSDP": ("whole", "f and g each"),
    "pipeline": ("1F1B", "interleaved, without bubbles") if DEEP else ("1F1B",),
}


def _cases(world: int) -> dict[tuple[str, str], tuple[Case, tuple[str, ...]]]:
    """By kind and name: a case, and the ways besides plain in which it runs."""
    found: dict[tuple[str, str], tuple[Case, tuple[str, ...]]] = {}
    if world < 4:
        found |= {("DDP", name): (_ddp(*DDP[name]), OF_DDP) for name in (IN_ONE if world == 1 else DDP)}
    if world == 2:
        found |= {("FSDP", name): (case, OWN) for name, (case, _) in FSDP.items()}
        found |= {("blocks", name): (case, OWN) for name, case in BLOCKS.items()}
        found |= {("converted last", name): (case, ("plain",)) for name, case in LAST.items()}
        found |= {("mixed", name): (case, OWN) for name, case in MIXED.items()}
        found |= {("around", "around"): (around, ("convert",))}
        found |= {("guarded", "guarded"): (guarded, ("convert",))}
        found |= {("disagreeing", "disagreeing"): (disagreeing, ("convert",))}
        found |= {("tensor", name): (_tensor(place), OWN) for name, place in TENSOR.items()}
        found |= {("pipeline", name): (pipelined(schedule), OWN) for name, schedule in PIPELINES.items()}
        found |= {("state", name): (case, SAME_KEYS) for name, case in STATE.items()}
        found |= {("memory", name): (case, OF_MEMORY) for name, case in MEMORY.items()}
    if world == 4:
        found |= {("DDP", name): (_ddp(*DDP[name]), OWN) for name in IN_FOUR["DDP"]}
        found |= {("FSDP", name): (FSDP[name][0], OWN) for name in IN_FOUR["FSDP"]}
        found |= {("tensor and data", "tensor and data"): (tensor_and_data, OWN)}
        found |= {("pipeline", name): (pipelined(PIPELINES[name]), OWN) for name in IN_FOUR["pipeline"]}
    return found


def _tensor(place: Callable[[nn.Module], nn.Module]) -> Case:
    return lambda build, rank, world: train(place(chain_of(build)), 0)  # all processes have the same data


# torch's own, whatever the model
IGNORED = (".*NumPy.*", ".*torch.jit.*", ".*returned a view tensor.*", "Guards may run slower.*")


def work(rank: int, world: int, folder: str) -> None:
    """Runs every case and saves {(kind, case, way): Result}."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    runs, end = [0], Forward.end

    def counted(self: Forward) -> None:
        runs[0] += self.count > 0
        end(self)

    Forward.end = counted
    results: dict[Key, Result] = {}
    for (kind, name), (case, ways) in _cases(world).items():
        for way in ("plain", *ways):
            results[kind, name, way] = _result(case, BUILD[way], rank, world, runs)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def _result(case: Case, build: Build, rank: int, world: int, runs: list[int]) -> Result:
    runs[0] = 0
    try:
        with warnings.catch_warnings():  # for each case anew, as torch.distributed leaves filters of its own
            warnings.simplefilter("error")
            for message in IGNORED:
                warnings.filterwarnings("ignore", message=message)
            result = case(build, rank, world)
    except Exception:
        result = Result(error=traceback.format_exc())
    result.dropped, result.unwaited = runs[0], unwaited()
    return result

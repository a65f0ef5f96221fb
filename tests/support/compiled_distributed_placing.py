"""The cases of the compiled distributed tests: how models are distributed and compiled, and the regions that are left.

In a module of its own, which the spawned processes can import.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from compiled_distributed_models import DEPTH, blocks, chain, sums_between_chains, sums_in_couplings, with_unused
from distributed_models import chain_of
from distributed_parallel import in_rows_and_columns
from helpers import DEEP, TOLERANCE, quick_but
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from ways import Plain


MIB = 1 << 20
FUNCTION = 8 * (4 * 4 + 4)  # bytes of the parameters of one f or g
DEFAULT_BUCKET = MIB  # DDP's optimizer takes none smaller than that
Options = dict[str, Any]  # of `torch.compile`


@dataclass(frozen=True)
class Case:
    """How a model is distributed and compiled, and the regions of each of its graphs, in the order of compilation."""

    place: Callable[[nn.Module, Options], Any]
    regions: tuple[int, ...]
    build: Callable[..., nn.Module] = chain
    bucket: int = DEFAULT_BUCKET  # bytes
    accumulate: bool = False
    optimize_ddp: bool = True
    alike: bool = False  # all processes have the same data
    tolerance: float = TOLERANCE


def ddp_first(**more: Any) -> Callable[[nn.Module, Options], Any]:
    return lambda model, options: torch.compile(DistributedDataParallel(model, **more), **options)


def compiled_first(**more: Any) -> Callable[[nn.Module, Options], Any]:
    return lambda model, options: DistributedDataParallel(whole_compiled(model, options), **more)


def whole_compiled(model: nn.Module, options: Options) -> Any:
    return torch.compile(model, **options)


def shard(model: nn.Module, **more: Any) -> nn.Module:
    """Shards each block, and what is left."""
    for block in model.get_submodule("blocks").children():
        fully_shard(block, **more)
    return sharded(model)


def sharded(model: nn.Module) -> nn.Module:
    """Shards what no inner module was sharded with."""
    fully_shard(model)
    return model


def compile_blocks(model: nn.Module, options: Options) -> nn.Module:
    for block in model.get_submodule("blocks").children():
        block.compile(**options)
    return model


def wide_chain() -> nn.Module:
    return chain_of(Plain)


BOTH_ORDERS = {"DDP, then compiled": ddp_first, "compiled, then DDP": compiled_first}
ORDERS = BOTH_ORDERS if DEEP else {"DDP, then compiled": ddp_first}  # each takes half a minute
BUCKETS: dict[str, tuple[int, tuple[int, ...]]] = quick_but(
    ("one function a bucket",),
    {
        "default buckets": (DEFAULT_BUCKET, (1,)),
        "four functions a bucket": (4 * FUNCTION, (1, 1)),
        "one function a bucket": (1, (0,) * 2 * DEPTH),
    },
)
DDP: dict[str, Case] = quick_but(
    ("compiled, then DDP, in buckets", "static graph", "gradients as views of buckets"),
    {
        **{
            f"{order}, {buckets}": Case(
                place(**({} if size == DEFAULT_BUCKET else {"bucket_cap_mb": size / MIB})), regions, bucket=size
            )
            for order, place in ORDERS.items()
            for buckets, (size, regions) in BUCKETS.items()
        },
        **{
            f"{order}, small buckets, not split": Case(place(bucket_cap_mb=1 / MIB), (1,), bucket=1, optimize_ddp=False)
            for order, place in ORDERS.items()
        },
        "compiled, then DDP, in buckets": Case(
            compiled_first(bucket_cap_mb=4 * FUNCTION / MIB), (1, 1), bucket=4 * FUNCTION
        ),
        "unused parameters": Case(ddp_first(find_unused_parameters=True), (1,), with_unused),
        "static graph": Case(ddp_first(static_graph=True), (1,)),
        "accumulation": Case(ddp_first(), (1,), accumulate=True),
        "gradients as views of buckets": Case(ddp_first(gradient_as_bucket_view=True), (1,)),
    },
)
IN_FLOAT32 = MixedPrecisionPolicy(param_dtype=torch.float32, output_dtype=torch.float64)
FSDP: dict[str, Case] = quick_but(
    ("blocks compiled, then sharded", "blocks kept unsharded"),
    {
        # of three blocks the first has an input that needs no gradient; the others share a graph
        "blocks sharded, then compiled": Case(lambda m, options: compile_blocks(shard(m), options), (1, 1), blocks),
        "blocks compiled, then sharded": Case(lambda m, options: shard(compile_blocks(m, options)), (1, 1), blocks),
        "blocks sharded, all compiled": Case(lambda m, options: whole_compiled(shard(m), options), (1, 1), blocks),
        "sharded as one, all compiled": Case(lambda m, options: whole_compiled(sharded(m), options), (1,), blocks),
        "blocks kept unsharded": Case(
            lambda m, options: compile_blocks(shard(m, reshard_after_forward=False), options), (1, 1), blocks
        ),
        "blocks in float32": Case(
            lambda m, options: compile_blocks(shard(m, mp_policy=IN_FLOAT32), options), (1, 1), blocks, tolerance=1e-5
        ),
    },
)
COLLECTIVES: dict[str, Case] = {
    "between chains": Case(whole_compiled, (2,), sums_between_chains),
    # what a collective gives is never computed again, so nothing can be computed back
    "in couplings": Case(whole_compiled, (0,), sums_in_couplings),
}
# f and g are cut in columns and rows, and what their sums give is never computed again
TENSOR: dict[str, Case] = {
    "rows and columns": Case(
        lambda m, options: whole_compiled(in_rows_and_columns(m), options), (0,), wide_chain, alike=True
    ),
}
CASES: dict[str, dict[str, Case]] = {"DDP": DDP, "FSDP": FSDP, "collectives": COLLECTIVES, "tensor": TENSOR}

"""What the processes of `tests/fit/test_distributed_budgets.py` run: each case plainly and within a budget."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fit_models import Residual, branch, fit_of, square
from helpers import DEEP, quick_but
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from revfx import convert
from revfx.testing import measure_memory


SHARE = 0.6
Place = Callable[[nn.Module], Any]


def _sharded(model: Any, **options: Any) -> nn.Module:
    for layer in model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def _compiled(model: Any) -> nn.Module:
    for layer in model.layers[1:]:
        layer.compile(backend="aot_eager")
    return DistributedDataParallel(model)


HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
# Those that differ in what all orders of conversion share; they are converted first alone, but for deep runs
ONE_ORDER = ("DDP, static graph", "DDP, views of tiny buckets", "FSDP2, the whole", "FSDP2 in bf16")
CASES: dict[str, Place] = quick_but(
    ("FSDP2, layers kept gathered",),  # as "FSDP2, layers", in `test_distributed`
    {
        "DDP": DistributedDataParallel,
        "DDP, static graph": partial(DistributedDataParallel, static_graph=True),
        "DDP, views of tiny buckets": partial(
            DistributedDataParallel, gradient_as_bucket_view=True, bucket_cap_mb=0.01
        ),
        "DDP, compiled layers": _compiled,
        "FSDP2, layers": _sharded,
        "FSDP2, layers kept gathered": partial(_sharded, reshard_after_forward=False),
        "FSDP2, the whole": lambda model: fully_shard(model),
        "FSDP2 in bf16": partial(_sharded, mp_policy=HALF),
    },
)


def _trained(model: nn.Module, x: Tensor) -> tuple[list[Tensor], int]:
    """Return losses, gradients and weights of some steps, and the least of their peaks."""
    found, peaks = list[Tensor](), list[int]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(3):
        torch.manual_seed(seed)
        losses: list[Tensor] = []

        def step(losses: list[Tensor] = losses) -> Tensor:
            losses.append(square(model(x)))
            return losses[-1]

        peaks.append(measure_memory(step).peak)
        grads: Any = [p.grad for p in model.parameters()]
        found += [losses[0].detach(), *(g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for g in grads)]
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return found, min(peaks)


def _made() -> nn.Module:
    torch.manual_seed(0)
    return Residual(*(branch() for _ in range(4)))


def _compared(name: str, place: Place, x: Tensor) -> dict[str, Any]:
    plain, most = _trained(place(_made()), x)
    found: dict[str, Any] = {}
    fitted: dict[str, Callable[[], Any]] = {
        "converted first": lambda: place(convert(_made(), memory=SHARE)),
        "converted last": lambda: convert(place(_made()), memory=SHARE),
    }
    if name in ONE_ORDER and not DEEP:
        del fitted["converted last"]
    for order, make in fitted.items():
        model: Any = make()
        got, peak = _trained(model, x)
        inner = model if hasattr(model, "revfx") else model.module
        kind = fit_of(inner).plans[0]
        plan = kind.chosen.plan
        same = len(got) == len(plain) and all(map(torch.equal, got, plain))
        found[order] = same, peak / most, kind.summary.plain / most, len(plan.dropped)
    return found


def work(rank: int, world: int, folder: str) -> None:
    """Runs every case and saves what came of it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    warnings.simplefilter("error")
    for message in ("NumPy", "torch.jit", "Profiler clears", "returned a view tensor", "not a leaf Tensor"):
        warnings.filterwarnings("ignore", message=f".*{message}.*")
    torch.manual_seed(5 + rank)
    x, results = torch.randn(256, 64), dict[str, Any]()
    for name, place in CASES.items():
        try:
            results[name] = _compared(name, place, x)
        except Exception:
            results[name] = traceback.format_exc()
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()

"""The models of the distributed tests, how they are trained, and what one process makes of the same data.

In a module of its own, which the spawned processes can import.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from helpers import loss_of, mlps
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from ways import Build, Plain

from revfx.testing import Memory


DEPTH, ROWS, STEPS = 3, 6, 4  # the first step learns, the second one proves
Gradients = list[Tensor | None]


@dataclass
class Result:
    """Gradients per step of one case in one process; or the error that came up.

    `dropped` counts forwards that dropped saved tensors, `unwaited` collectives that nobody has waited for; `memory` is
    that of a step, if it was measured.
    """

    gradients: list[Gradients] = field(default_factory=list[Gradients])
    buffers: list[Tensor] = field(default_factory=list[Tensor])
    dropped: int = 0
    unwaited: int = 0
    memory: Memory | None = None
    error: str = ""


@dataclass(frozen=True)
class Task:
    """What is trained: with a layer that is not used; two batches a step, the first without communication; and with
    one step more in each process than in the one before.
    """

    unused: bool = False
    accumulate: bool = False
    uneven: bool = False

    def steps(self, rank: int) -> int:
        return STEPS + rank if self.uneven else STEPS


# --- models: the same weights every time
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
    torch.manual_seed(0)
    return build([normed(), *mlps(DEPTH - 1)], mlps(DEPTH))


def chain_of(build: Build, depth: int = DEPTH, seed: int = 0) -> nn.Module:
    """As `chain`, without a batch norm, which would look at what one process has of a batch."""
    torch.manual_seed(seed)
    return build(mlps(depth), mlps(depth))


def blocks(build: Build) -> nn.Sequential:
    """Three chains, one after the other."""
    return nn.Sequential(*(chain_of(build, seed=seed) for seed in range(3)))


def model_of(task: Task, build: Build) -> nn.Module:
    return WithUnused(chain(build)) if task.unused else chain(build)


# --- training
def inputs(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(ROWS, 8, generator=generator)


def whole(grad: Any) -> Tensor | None:
    """A gradient, put together where it is sharded."""
    if grad is None:
        return None
    return (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).detach().clone()


def update(model: nn.Module) -> Gradients:
    """The gradients that there are, after a step of SGD."""
    gradients = [whole(p.grad) for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(p.grad, alpha=0.01)
                p.grad = None
    return gradients


def train(model: nn.Module, rank: int, task: Task = Task()) -> Result:
    """Several steps, with an update between them."""
    result = Result()
    with model.join() if isinstance(model, DistributedDataParallel) and task.uneven else contextlib.nullcontext():
        for step in range(task.steps(rank)):
            if task.accumulate:
                with silent(model):
                    loss_of(model(inputs(rank, step + 50))).backward()
            loss_of(model(inputs(rank, step))).backward()
            result.gradients.append(update(model))
    result.buffers = [b.clone() for b in model.buffers()]
    return result


@contextlib.contextmanager
def silent(model: Any) -> Any:
    """A context in which gradients stay in each process."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)


def reference(world: int, task: Task = Task(), model: nn.Module | None = None) -> list[Gradients]:
    """Per step the plain model's gradients, averaged over the ranks' inputs, in one process."""
    torch.set_default_dtype(torch.float64)
    model = model_of(task, Plain) if model is None else model
    found: list[Gradients] = []
    for step in range(task.steps(world - 1)):
        for rank in range(world):
            for k in (step + 50, step) if task.accumulate else (step,):
                if step < task.steps(rank):
                    (loss_of(model(inputs(rank, k))) / world).backward()
        found.append(update(model))
    return found

"""The models of the compiled distributed tests, what they are trained on, and a process that plays several.

In a module of its own, which the spawned processes can import.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from distributed_models import WithUnused
from helpers import loss_of
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from ways import Plain


DEPTH, BLOCKS, ROWS, STEPS = 4, 3, 16, 2
Sum = Callable[[Tensor], Tensor]


# --- models: the same weights every time
def functions(count: int) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(count)]


def couplings(depth: int) -> nn.Module:
    return Plain(functions(depth), functions(depth))


def chain() -> nn.Module:
    torch.manual_seed(0)
    return couplings(DEPTH)


def with_unused() -> nn.Module:
    return WithUnused(chain())


class Blocks(nn.Module):
    """Blocks of couplings, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(couplings(2) for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def blocks() -> nn.Module:
    torch.manual_seed(0)
    return Blocks()


# --- models whose processes need each other's values: in both, all processes hold their own parameters
def summed(x: Tensor) -> Tensor:
    """The sum of a tensor over the processes."""
    assert dist.group.WORLD is not None
    return collectives.all_reduce(x, "sum", dist.group.WORLD)


class Summed(nn.Module):
    """A function of which every process holds a part: the sum over the processes is the function."""

    def __init__(self, inner: nn.Module, total: Sum) -> None:
        super().__init__()
        self.inner, self.total = inner, total

    def forward(self, x: Tensor) -> Tensor:
        return self.total(self.inner(x))


def sums_between_chains(total: Sum = summed) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Summed(couplings(2), total), nn.Tanh(), couplings(2))


def sums_in_couplings(total: Sum = summed) -> nn.Module:
    torch.manual_seed(0)
    return Plain([Summed(m, total) for m in functions(2)], functions(2))


class Processes(nn.Module):
    """What every process does with its part of a batch: one process plays them all."""

    def __init__(self, module: nn.Module, world: int) -> None:
        super().__init__()
        self.ranks = nn.ModuleList(copy.deepcopy(module) for _ in range(world))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([module(part) for module, part in zip(self.ranks, x, strict=True)])


def played(model: nn.Module, world: int) -> nn.Module:
    """A model of the parts of all processes, (world, rows, columns), of a model of one's."""
    for name, child in model.named_children():
        setattr(model, name, Processes(child, world) if isinstance(child, nn.Linear) else played(child, world))
    return model


# --- training
def inputs(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(ROWS, 8, generator=generator)


def whole(grad: Any) -> Tensor | None:
    """A gradient, put together where it is sharded."""
    if grad is None:
        return None
    return (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).detach().clone()


def update(model: nn.Module) -> list[Tensor | None]:
    """The gradients that there are, after a step of SGD."""
    gradients = [whole(p.grad) for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(p.grad, alpha=0.01)
                p.grad = None
    return gradients


def reference_of(world: int, rank: int, build: Callable[[Sum], nn.Module]) -> list[list[Tensor | None]]:
    """Per step the gradients of one process's parameters, where one process plays all of them."""
    model = played(build(lambda x: x.sum(0, keepdim=True).expand_as(x)), world)
    own = [f".ranks.{rank}." in name for name, _ in model.named_parameters()]
    found: list[list[Tensor | None]] = []
    for step in range(STEPS):
        for y in model(torch.stack([inputs(r, step) for r in range(world)])):
            loss_of(y).backward(retain_graph=True)
        found.append([g for g, mine in zip(update(model), own, strict=True) if mine])
    return found

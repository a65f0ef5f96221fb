"""One chain of additive couplings, written in every way that the tests of training compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from revfx import RevBlock, convert, rev_block


Functions = Sequence[Callable[[Tensor], Tensor]] | nn.ModuleList
Build = Callable[[Functions, Functions], nn.Module]


def listed(functions: Functions) -> Any:
    """A ModuleList where all are modules, else a list."""
    modules = [m for m in functions if isinstance(m, nn.Module)]
    return nn.ModuleList(modules) if len(modules) == len(functions) else list(functions)


class Plain(nn.Module):
    """The couplings as their author writes them: the oracle, and what `convert` is given."""

    def __init__(self, f: Functions, g: Functions) -> None:
        super().__init__()
        self.f, self.g = listed(f), listed(g)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            b = b + g(a)
        return torch.cat([a, b], dim=-1)


class Called(Plain):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat(rev_block(a, b, self.f, self.g, len(self.f)), dim=-1)


class Blocked(nn.Module):
    def __init__(self, f: Functions, g: Functions) -> None:
        super().__init__()
        self.block = RevBlock(f, g, len(f))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat(self.block(a, b), dim=-1)


def couple(f: Callable[[Tensor], Tensor], g: Callable[[Tensor], Tensor], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a = a + f(b)
    return a, b + g(a)


class Checkpointed(Plain):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        for f, g in zip(self.f, self.g, strict=True):
            a, b = checkpoint(couple, f, g, a, b, use_reentrant=False)
        return torch.cat([a, b], dim=-1)


def converted(f: Functions, g: Functions) -> nn.Module:
    return convert(Plain(f, g))


BUILD: dict[str, Build] = {
    "plain": Plain,
    "convert": converted,
    "rev_block": Called,
    "RevBlock": Blocked,
    "checkpoint": Checkpointed,
}
WAYS = ("convert", "rev_block", "RevBlock", "checkpoint")


def functions_of(model: nn.Module) -> list[nn.Module]:
    """The modules f and g of a chain, by layer."""
    holder: Any = model.block if isinstance(model, Blocked) else model
    return [m for pair in zip(holder.f, holder.g, strict=True) for m in pair]

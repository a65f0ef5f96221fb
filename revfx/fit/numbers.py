"""Numbers in Python that a tape stands on: those of modules, and among the arguments.

Below autograd they are constants. What changes from call to call, such as a temperature that falls, is found by
recording twice: operators that were given another number then don't run again, and nothing stands on it any more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from revfx import _torch
from revfx.fit.tape import Spot, Tape


@dataclass
class Numbers:
    """Numbers and flags of modules, and whether they are compiled, by their attribute tables and names; fractions among
    arguments, by place; and the layouts of parameters and buffers, by their tables and names.
    """

    held: list[tuple[dict[str, Any], str, Any]]
    given: list[tuple[int, float]]
    layouts: list[tuple[Mapping[str, Tensor | None], str, Any]]

    @staticmethod
    def of(model: nn.Module, leaves: Sequence[Any]) -> Numbers:
        """Return those of now."""
        modules = [*model.modules()]
        tables = [vars(m) for m in modules]
        held = [(t, name, n) for t in tables for name, n in t.items() if isinstance(n, (float, int))]
        return Numbers(
            [*held, *((t, _torch.COMPILED, t.get(_torch.COMPILED)) for t in tables)],
            [(i, x) for i, x in enumerate(leaves) if isinstance(x, float)],
            [(t, n, _layout(t[n])) for m in modules for t in (_torch.parameters(m), _torch.buffers(m)) for n in t],
        )

    def hold(self, leaves: Sequence[Any]) -> bool:
        """Return whether they are what they were."""
        return (
            all([t.get(name) == n for t, name, n in self.held])
            and all([leaves[i] == x for i, x in self.given])
            and all([_layout(t.get(name)) == layout for t, name, layout in self.layouts])
        )

    def common(self, model: nn.Module, leaves: Sequence[Any]) -> Numbers:
        """Return those that are what they were, and the layouts of now."""
        held = [(t, name, n) for t, name, n in self.held if t.get(name) == n]
        return replace(Numbers.of(model, leaves), held=held, given=[(i, x) for i, x in self.given if leaves[i] == x])


def _layout(t: Tensor | None) -> Any:
    """Return what a plan takes for granted of a parameter or buffer; where it lies in its storage is not part of it."""
    if t is None:
        return None
    if type(t) not in (nn.Parameter, Tensor) and (is_lazy(t) or t.is_nested):
        return type(t)
    return t.requires_grad, t.dtype, t.stride() if t.layout == torch.strided else t.layout


def differing(a: Tape, b: Tape) -> frozenset[int] | None:
    """Return the operators that were given other numbers; None if the tapes differ in more."""
    kept = [[(p.packed, p.spot and p.spot.place) for p in tape.packs] for tape in (a, b)]
    if len(a.ops) != len(b.ops) or a.turn != b.turn or kept[0] != kept[1]:
        return None
    found: set[int] = set()
    for o, (x, y) in enumerate(zip(a.ops, b.ops, strict=True)):
        if (x.func, x.reads, x.outs, x.makes) != (y.func, y.reads, y.outs, y.makes):
            return None
        ours, theirs = (pytree.tree_leaves((op.args, op.kwargs)) for op in (x, y))
        if any(not isinstance(m, Spot) and m != n for m, n in zip(ours, theirs, strict=True)):
            found.add(o)
    return frozenset(found)

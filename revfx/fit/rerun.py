"""Running operators of a tape again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from revfx.codes import bits
from revfx.errors import RegenerationError
from revfx.fit.compiled import StateOf
from revfx.fit.plan import Plan
from revfx.fit.tape import Spot


Find = Callable[[Any], Any]  # of a spot its tensor, of what a call of a compiled part begins with that
Values = dict[int, Tensor]  # by value: a tensor in its memory


class Operator:
    """An operator of a tape, ready to run again."""

    def __init__(self, plan: Plan, number: int) -> None:
        tape = plan.needs.tape
        made = tape.ops[number].makes
        self.coin = made[0] if made[0] in plan.coins else None
        op = tape.ops[number] if self.coin is not None else plan.needs.replayed[number]
        assert op is not None
        self.op, self.elements = op, tape.size(made[0]) // op.reads[0].dtype.itemsize if self.coin is not None else 0
        self.overwrites = [(v, was) for v in made if (was := tape.before(v)) is not None]
        written = {v for v, _ in self.overwrites}
        self.outs = [s if s is not None and s.value in made and s.value not in written else None for s in op.outs]

    def run(self, goes: frozenset[int], values: Values, kept: Values, find: Find) -> None:
        """Run it on values that are there, or `kept`, or found, and add what it makes; it may write over what goes."""
        op = self.op
        if self.coin is not None:
            values[self.coin] = bits.decode(kept[self.coin], self.elements, op.reads[0].dtype)
            return
        aside: Values = {}
        for _, was in self.overwrites:
            if was not in goes:
                aside[was] = values[was] if was in values else kept[was]
                values[was] = whole(aside[was]).clone()
        out = op.func(*[_filled(a, find) for a in op.args], **{n: _filled(a, find) for n, a in op.kwargs.items()})
        for v, was in self.overwrites:
            values[v] = values[was]
            if was in aside:
                values[was] = aside[was]
                if was in kept:
                    del values[was]
        results = (out,) if isinstance(out, Tensor) else pytree.tree_leaves(out)
        if len(results) != len(self.outs):
            raise RegenerationError(f"{op.func} gave another number of tensors than when it was recorded.")
        for spot, t in zip(self.outs, results, strict=True):
            if spot is not None:
                if t.stride() != spot.stride or t.shape != spot.shape:
                    raise RegenerationError(f"{op.func} gave a tensor of other strides than when it was recorded.")
                values[spot.value] = t


def _filled(a: Any, find: Find) -> Any:
    if isinstance(a, (Spot, StateOf)):
        return find(a)
    return [_filled(x, find) for x in a] if isinstance(a, (list, tuple)) else a


def whole(t: Tensor) -> Tensor:
    """Return all elements of a tensor's memory."""
    return t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)


def placed(t: Tensor, spot: Spot, start: int = 0) -> Tensor:
    """Return the tensor at `spot`, of a tensor in the same memory; `start`: the byte at which offsets begin."""
    offset = start // spot.dtype.itemsize + spot.offset
    if t.dtype != spot.dtype:
        return torch.empty(0, dtype=spot.dtype, device=t.device).set_(
            t.untyped_storage(), offset, spot.shape, spot.stride
        )
    if t.shape == spot.shape and t.stride() == spot.stride and t.storage_offset() == offset:
        return t
    return t.as_strided(spot.shape, spot.stride, offset)

"""What a backward runs again, written down once per plan, in the order in which autograd asked when it was recorded.

Where it asks otherwise (`autograd.grad` of some inputs, a second backward), what runs next is found as it goes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from revfx.errors import RegenerationError
from revfx.fit import bits
from revfx.fit.plan import Plan, Replay
from revfx.fit.tape import Spot, Tape


Find = Callable[[Spot], Tensor]
Values = dict[int, Tensor]  # by value: a tensor in its memory


@dataclass
class Act:
    """An operator that runs again: with values that it may write over, after copies of those that it may not."""

    op: int
    goes: frozenset[int]
    drops: list[int] = field(default_factory=list[int])


@dataclass
class Scene:
    """What is done before autograd gets the tensor of a pack, and what is let go then."""

    pack: int
    acts: list[Act]
    drops: list[int]


def script_of(plan: Plan) -> list[Scene]:
    """Return what is done for each dropped pack, in the order in which they were asked for."""
    scenes: list[Scene] = []

    def run(op: int, goes: set[int]) -> None:
        scenes[-1].acts.append(Act(op, frozenset(goes)))

    def drop(value: int) -> None:
        acts = scenes[-1].acts
        (scenes[-1].drops if done or not acts else acts[-1].drops).append(value)

    replay, done = Replay(plan, run, drop), False
    packs = plan.needs.tape.packs
    asked = [k for k in plan.dropped if packs[k].unpacked is not None]
    for k in sorted(asked, key=lambda k: packs[k].turn):
        scenes.append(Scene(k, [], []))
        value = plan.needs.value(k)
        done = False
        replay.obtain(value, plan.dropped[k])
        done = True
        replay.took(value, plan.dropped[k])
    return scenes


class Machine:
    """Runs operators of a plan again; `values` are there, `find` finds others."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.tape = plan, plan.needs.tape
        self.calls: dict[int, _Call] = {}

    def run(self, number: int, goes: frozenset[int], values: Values, kept: Values, find: Find) -> None:
        """Run an operator on values that are there, or `kept`, and add what it makes."""
        call = self.calls.get(number)
        if call is None:
            call = self.calls[number] = _Call(self.plan, number)
        call(goes, values, kept, find)


class _Call:
    """One operator of a tape, ready to run again."""

    def __init__(self, plan: Plan, number: int) -> None:
        tape = plan.needs.tape
        made = tape.ops[number].makes
        self.coin = made[0] if made[0] in plan.coins else None
        op = tape.ops[number] if self.coin is not None else plan.needs.replayed[number]
        assert op is not None
        self.op, self.elements = op, tape.size(made[0]) // op.reads[0].dtype.itemsize if self.coin is not None else 0
        self.overwrites = [(v, was) for v in made if (was := _before(tape, v)) is not None]
        written = {v for v, _ in self.overwrites}
        self.outs = [s if s is not None and s.value in made and s.value not in written else None for s in op.outs]

    def __call__(self, goes: frozenset[int], values: Values, kept: Values, find: Find) -> None:
        op = self.op
        if self.coin is not None:
            values[self.coin] = bits.decode(kept[self.coin], self.elements, op.reads[0].dtype)
            return
        aside: Values = {}
        for _, was in self.overwrites:
            if was not in goes:
                t = values.get(was, kept.get(was))
                assert t is not None
                aside[was] = t
                values[was] = whole(t).clone()
        out = op.func(*[_filled(a, find) for a in op.args], **{n: _filled(a, find) for n, a in op.kwargs.items()})
        for v, was in self.overwrites:
            values[v] = values[was]
            if was in aside:
                values[was] = aside[was]
                if was in kept:
                    del values[was]
        for spot, t in zip(self.outs, (out,) if isinstance(out, Tensor) else pytree.tree_leaves(out), strict=True):
            if spot is not None:
                if t.stride() != spot.stride or t.shape != spot.shape:
                    raise RegenerationError(f"{op.func} gave a tensor of other strides than when it was recorded.")
                values[spot.value] = t


def _before(tape: Tape, value: int) -> int | None:
    """Return the value that `value` was written over."""
    values = tape.memories[tape.memory_of[value]].values
    at = values.index(value)
    return values[at - 1] if at else None


def _filled(a: Any, find: Find) -> Any:
    if isinstance(a, Spot):
        return find(a)
    return [_filled(x, find) for x in a] if isinstance(a, (list, tuple)) else a


def whole(t: Tensor) -> Tensor:
    """Return all elements of a tensor's memory."""
    return t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)


def placed(t: Tensor, spot: Spot) -> Tensor:
    """Return the tensor at `spot`, of a tensor in the same memory."""
    if t.dtype != spot.dtype:
        return torch.empty(0, dtype=spot.dtype, device=t.device).set_(
            t.untyped_storage(), spot.offset, spot.shape, spot.stride
        )
    if t.shape == spot.shape and t.stride() == spot.stride and t.storage_offset() == spot.offset:
        return t
    return t.as_strided(spot.shape, spot.stride, spot.offset)

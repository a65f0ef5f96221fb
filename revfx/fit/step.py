"""One step under a plan: hooks of autograd that keep what the plan keeps, and run operators again for the rest."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from revfx import _torch
from revfx.errors import RegenerationError
from revfx.fit import bits
from revfx.fit.plan import Plan, Replay
from revfx.fit.tape import Op, Spot


Cells = dict[int, Tensor]  # by value


class Moved(Exception):
    """The forward keeps other tensors than the one that was recorded."""


class _Held:
    """A tensor that is kept, as it was when autograd read it."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor.detach(), _torch.version(tensor)

    def get(self) -> Tensor:
        if _torch.version(self.tensor) != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation:"
                f" {self.tensor.dtype} {list(self.tensor.shape)} is at version {_torch.version(self.tensor)}, expected"
                f" {self.version}."
            )
        return self.tensor


class _Signs:
    """A tensor of which only what is positive is kept, or not a number."""

    __slots__ = ("bits", "spot")

    def __init__(self, tensor: Tensor, spot: Spot) -> None:
        self.bits, self.spot = bits.encode((tensor <= 0).logical_not_()), spot

    def get(self) -> Tensor:
        s = self.spot
        n = 1
        for extent in s.shape:
            n *= extent
        return bits.decode(self.bits, n, s.dtype).as_strided(s.shape, s.stride)


class _Dropped:
    """A tensor that is computed again when it is asked for."""

    __slots__ = ("cells", "number", "step")

    def __init__(self, step: Step, number: int, cells: Cells) -> None:
        self.step, self.number, self.cells = step, number, cells

    def get(self) -> Tensor:
        return self.step.again(self)


class Step:
    """A forward and its backward."""

    def __init__(self, plan: Plan, sources: Mapping[int, Tensor]) -> None:
        self.plan, self.sources = plan, sources
        self.versions = {v: _torch.version(t) for v, t in sources.items()}
        self.number = 0
        self.cells: dict[int, Cells] = {block: {} for block in plan.bases}
        self.users = plan.users
        self.env: Cells = {}
        self.task = -1
        self.replay: Replay | None = None
        self.lock = threading.RLock()
        self.block = -1

    # --- the forward
    def pack(self, t: Tensor) -> Any:
        """Return what autograd holds in the place of `t`."""
        k = self.number
        self.number = k + 1
        plan = self.plan
        packs = plan.needs.tape.packs
        if k >= len(packs):
            raise Moved
        spot = packs[k].spot
        if spot is None or isinstance(t, torch.nn.Parameter):
            return t
        if t.shape != spot.shape or t.dtype != spot.dtype or t.stride() != spot.stride:
            raise Moved
        value = spot.value
        for v, blocks in self.users.get(value, ()):
            for block in blocks:
                cells = self.cells[block]
                if v not in cells:
                    cells[v] = t.detach() if v == value else bits.encode(_whole(t) != 0)
        if k in plan.signs:
            return _Signs(t, spot)
        if (block := plan.dropped.get(k)) is not None:
            return _Dropped(self, k, self.cells[block])
        return _Held(t)

    @staticmethod
    def unpack(kept: Any) -> Tensor:
        """Return what autograd reads."""
        return kept if isinstance(kept, Tensor) else kept.get()

    # --- the backward
    def again(self, dropped: _Dropped) -> Tensor:
        """Return a tensor that was dropped."""
        with self.lock, torch.enable_grad(), _torch.below_autograd():
            if self.task != (task := _torch.graph_task_id()) or self.replay is None:
                self.task, self.replay = task, Replay(self.plan, self._run, self.env.pop)
                self.env.clear()
                if task >= 0:
                    _torch.at_end_of_backward(self._end)
            spot = self.plan.needs.tape.packs[dropped.number].spot
            block = self.plan.dropped[dropped.number]
            self.now = dropped.cells
            self.replay.obtain(spot.value, block)
            tensor = self._tensor(spot)
            self.replay.took(spot.value, block)
            return tensor

    def _end(self) -> None:
        self.replay, self.task = None, -1
        self.env.clear()

    def _tensor(self, spot: Spot) -> Tensor:
        v = spot.value
        t = self.env.get(v)
        if t is None:
            t = self.now.get(v)
        if t is None:
            t = self.sources[v]
            if _torch.version(t) != self.versions[v]:
                raise RuntimeError("a parameter, buffer or argument was modified in place between forward and backward")
        if t.dtype != spot.dtype:
            t = t.view(spot.dtype)
        if t.shape == spot.shape and t.stride() == spot.stride and t.storage_offset() == spot.offset:
            return t
        return t.as_strided(spot.shape, spot.stride, spot.offset)

    def _run(self, number: int, goes: set[int]) -> None:
        """Run an operator again."""
        tape = self.plan.needs.tape
        op = self.plan.needs.replayed[number]
        coin = tape.ops[number].makes[0]
        if coin in self.plan.coins:
            spot = tape.ops[number].reads[0]
            n = tape.size(coin) // spot.dtype.itemsize
            self.env[coin] = bits.decode(self.now[coin], n, spot.dtype)
            return
        assert op is not None
        written = self._written(op, goes)
        out = op.func(*[self._value(a) for a in op.args], **{n: self._value(a) for n, a in op.kwargs.items()})
        for v, was in written:
            self.env[v] = self.env[was]
            if was in self._shadow:
                self.env[was] = self._shadow.pop(was)
            elif was in self._none:
                del self.env[was]
        if isinstance(out, Tensor):
            self._made(op.outs[0], out, op)
        else:
            for spot, t in zip(op.outs, pytree.tree_leaves(out), strict=True):
                if isinstance(t, Tensor):
                    self._made(spot, t, op)

    def _made(self, spot: Spot | None, t: Tensor, op: Op) -> None:
        if spot is None or spot.value in self.env or spot.value not in op.makes:
            return
        if t.shape != spot.shape or t.stride() != spot.stride:
            raise RegenerationError(f"{op.func} gave {list(t.shape)}, {t.stride()}; recorded {spot}")
        self.env[spot.value] = t

    def _written(self, op: Op, goes: set[int]) -> list[tuple[int, int]]:
        """Return the values that an operator overwrites, by those that it makes so; what is needed later is copied."""
        tape, found = self.plan.needs.tape, list[tuple[int, int]]()
        self._shadow, self._none = Cells(), set[int]()
        for v in op.makes:
            values = tape.memories[tape.memory_of[v]].values
            if v == values[0]:
                continue
            was = values[values.index(v) - 1]
            found.append((v, was))
            if was not in goes:
                t = self.env.get(was)
                if t is None:
                    t = self.now.get(was)
                    self._none.add(was)
                else:
                    self._shadow[was] = t
                assert t is not None
                self.env[was] = _whole(t).clone()
        return found

    def _value(self, a: Any) -> Any:
        if isinstance(a, Spot):
            return self._tensor(a)
        if isinstance(a, (list, tuple)):
            return [self._value(x) for x in a]
        return a


def _whole(t: Tensor) -> Tensor:
    """Return all elements of a tensor's memory."""
    n = t.untyped_storage().nbytes() // t.element_size()
    return t.as_strided((n,), (1,), 0)


def fetch(plan: Plan, model: torch.nn.Module, leaves: Sequence[Any]) -> dict[int, Tensor]:
    """Return what was there before the step and is read by what runs again."""
    found: dict[int, Tensor] = {}
    for v, (kind, where) in plan.sources.items():
        if kind == "argument":
            found[v] = leaves[where]
        else:
            path, name = where
            found[v] = getattr(model.get_submodule(path), name)
    return found

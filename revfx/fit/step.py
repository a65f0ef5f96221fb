"""One step under a plan: autograd's hooks keep what the plan keeps, and run operators again for the rest."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from revfx import _torch
from revfx.ambient import kernels_of
from revfx.codes import bits
from revfx.errors import RegenerationError, RevfxError
from revfx.fit.compiled import StateOf, Whole, state_of
from revfx.fit.meter import Meter
from revfx.fit.plan import Plan, Replay, Segment
from revfx.fit.rerun import Operator, Values, placed, whole
from revfx.fit.tape import Spot
from revfx.fit.witness import Witness
from revfx.parts import Part
from revfx.passes.sizes import tensors_of
from revfx.world.state import CallState


Failed = Callable[[frozenset[int]], None]  # is called with the operators that gave another value

_NOTHING: Values = {}
_AS_IT_IS = contextlib.nullcontext()


def _as_it_is(t: Tensor) -> Callable[[], Tensor]:
    return partial(_torch.unchanged, t if isinstance(t, nn.Parameter) else t.detach(), _torch.version(t))


def _decode(code: Tensor, spot: Spot) -> Tensor:
    """Return ones for the positive elements of a tensor, and zeros elsewhere."""
    return bits.decode(code, math.prod(spot.shape), spot.dtype).as_strided(spot.shape, spot.stride)


class Course:
    """What all steps under one plan have in common.

    `looks`: the packs that are looked at in both directions; the first of each value. Not bytes: workspaces of kernels
    have gaps in which anything may be.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.segments = plan, [*plan.segments(plan.dropped)]
        self.operators = {o: Operator(plan, o) for o in plan.again}
        self.spots = [p.spot for p in plan.needs.tape.packs]
        first = {plan.needs.value(k): k for k in sorted(plan.dropped, reverse=True)}
        spots = ((k, plan.needs.spot(k)) for k in first.values())
        self.looks = {k for k, s in spots if s.dtype != torch.uint8 and 0 not in s.shape}
        sharded = plan.needs.tape.sharded
        self.sources = {  # but for parameters, which FSDP2 may not have gathered yet
            v: (kind, where)
            for v, (kind, where) in plan.sources.items()
            if not (sharded and kind == "parameter" and plan.needs.unit(where[0]))
        }
        self.calls = 0


class Step:
    """A forward and its backward."""

    def __init__(self, course: Course, model: nn.Module, leaves: Sequence[Any], meter: Meter, failed: Failed) -> None:
        self.course, self.model, self.failed = course, model, failed
        sources = course.sources.items()  # what was there before the step
        self.sources = {v: leaves[at] if kind == "argument" else _held(model, at) for v, (kind, at) in sources}
        self.versions = {v: _torch.version(t) for v, t in self.sources.items()}
        self.kept: dict[int, Values] = {block: {} for block in course.plan.bases}
        self.states: dict[int, CallState] = {}  # by number, what calls of compiled parts began with
        self.bases: dict[int, list[tuple[int, int]]] = {}  # and versions of arguments that are kept, by value
        self.number, self.part_calls, self.moved, self.same = 0, 0, False, True
        self.settings, self.meter = _torch.kernel_settings(), meter
        self.witness = Witness(course.calls)
        course.calls += 1
        self.values: Values = {}
        self.now = _NOTHING  # what the block that asks has kept
        self.task, self.segment = -1, 0
        self.replay: Replay | None = None  # where autograd asks otherwise than when it was recorded
        self.lock = threading.RLock()

    # --- the forward
    @_torch.uncompiled
    def pack(self, t: Tensor) -> Callable[[], Tensor]:
        """Return what autograd holds in the place of `t`, and what that is computed from if it is dropped."""
        k, course = self.number, self.course
        self.number = k + 1
        spot = course.spots[k] if k < len(course.spots) else None
        if self.moved or spot is None or isinstance(t, nn.Parameter):
            self.moved = self.moved or k >= len(course.spots)
            return _as_it_is(t)
        if t.shape != spot.shape or t.dtype != spot.dtype or t.stride() != spot.stride:
            self.moved = True
            return _as_it_is(t)
        plan = course.plan
        for v, blocks in plan.users.get(spot.value, ()):
            noted = None
            for block in blocks:
                if v not in self.kept[block]:
                    if noted is None:
                        noted = bits.encode(whole(t.detach()) != 0) if v in plan.coins else t.detach()
                    self.kept[block][v] = noted
        if k in plan.marks:
            return partial(_decode, bits.encode((t.detach() <= 0).logical_not_()), spot)
        block = plan.dropped.get(k)
        if block is None:
            return _as_it_is(t)
        if k in course.looks:
            self.witness.then(spot, t.detach())
        return partial(self.again, k, self.kept[block])

    def part(self, part: Part, args: Any, kwargs: Any) -> Any:
        """Return what a compiled part returns, having noted what its call began with, if it is to run again."""
        first, plan = self.number, self.course.plan
        tensors, n = tensors_of((args, kwargs)), self.part_calls
        for t in tensors:
            self.pack(t)
        self.part_calls, planned = n + 1, plan.parts.get(n)
        if planned is not part:
            self.moved = self.moved or planned is not None
            return part.call(*args, **kwargs)
        spots = zip(self.course.spots[first : self.number], tensors, strict=False)
        self.bases[n] = [(s.value, _torch.version(t)) for s, t in spots if s is not None and s.value in plan.users]
        self.states[n], returned = state_of(part), False
        try:
            result = part.call(*args, **kwargs)
            returned = True
            return result
        finally:
            self.states[n].settle(returned)

    def end(self) -> None:
        """Note that the forward is through: from now on, what is kept is held by autograd alone."""
        self.kept = {}
        self.moved = self.moved or self.number != len(self.course.spots)

    @staticmethod
    @_torch.uncompiled
    def unpack(held: Callable[[], Tensor]) -> Tensor:
        """Return what autograd reads."""
        return held()

    # --- the backward
    def again(self, k: int, kept: Values) -> Tensor:
        """Return the tensor of a pack that was dropped; `kept` is what it is computed from."""
        course = self.course
        with self.lock, torch.enable_grad(), _torch.below_autograd():
            if self.task != (task := _torch.graph_task_id()):  # another backward pass asks
                self._forget()
                self.task, self.same = task, _torch.kernel_settings() == self.settings
                if task >= 0:
                    _torch.at_end_of_backward(self._end)
            self.now = kept
            try:
                spot = course.spots[k]
                assert spot is not None
                with _AS_IT_IS if self.same else kernels_of(self.settings):
                    tensor = self._run(self._next(k), spot)
            except KeyError as e:
                if not self.moved:
                    raise
                what = "the forward went another way than planned, before all that its backward takes was there"
                raise RegenerationError(f"{what}: repeat the step, for which it is planned anew.") from e
            finally:
                self.now = _NOTHING
            if k in course.looks:
                self.witness.now(spot, tensor)
            return tensor

    def _next(self, k: int) -> Segment:
        """Return what is to run for a pack, as it was planned, or found now (by `autograd.grad` of some inputs)."""
        segments = self.course.segments
        if self.replay is None:
            if self.segment < len(segments) and (segment := segments[self.segment]).pack == k:
                self.segment += 1
                return segment
            self.replay = Replay(self.course.plan, self.values)
        return self.replay.segment(k)

    def _run(self, segment: Segment, spot: Spot) -> Tensor:
        values, operators = self.values, self.course.operators
        for rerun in segment.reruns:
            operator = operators[rerun.op]
            try:
                operator.run(rerun.goes, values, self.now, self._find)
            except RegenerationError:
                self.failed(frozenset() if isinstance(operator.op.func, Whole) else frozenset({rerun.op}))
                raise
            for v in rerun.drops:
                del values[v]
        tensor = self._find(spot)
        for v in segment.drops:
            del values[v]
        return tensor

    def _find(self, spot: Spot | StateOf) -> Any:
        """Return a tensor that is there, or what a call of a compiled part began with."""
        if isinstance(spot, StateOf):
            for v, version in self.bases[spot.number]:
                if v in self.now:
                    _torch.unchanged(self.now[v], version)
            return self.states[spot.number]
        v = spot.value
        t = self.values.get(v)
        if t is None:
            t = self.now.get(v)
        if t is not None:
            return placed(t, spot)
        t = self.sources.get(v)
        if t is None:
            t = _held(self.model, self.course.plan.sources[v][1])
        else:
            _torch.unchanged(t, self.versions[v])
        return placed(t, spot, int(t.storage_offset()) * t.dtype.itemsize)  # wherever it lies in this call

    def _end(self) -> None:
        self._forget()
        self.meter.check()
        plan = self.course.plan
        wrong, right = self.witness.compare(plan.needs)
        if wrong:
            self.failed(plan.suspects(wrong.keys(), right))
            raise RegenerationError(next(iter(wrong.values())))

    def _forget(self) -> None:
        self.values.clear()
        self.replay, self.segment, self.task = None, 0, -1


def _held(model: nn.Module, where: tuple[str, str]) -> Tensor:
    t = getattr(model.get_submodule(where[0]), where[1])
    if not isinstance(t, Tensor) or _torch.is_dtensor(t):
        raise RevfxError(f"`{'.'.join(where)}` is no tensor any more, or not gathered.")
    return t

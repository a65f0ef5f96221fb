"""Runs a region: its real operations under saved-tensor hooks that free what autograd would keep and regenerate it.

Forward: every tensor that autograd packs becomes a handle (operation, k). Of the values only the region's last cut, its
first cut and side inputs stay alive, and of those that an inverse gives back up to rounding what it misses. Backward:
the first unpack out of a step drops everything of the step after it, regenerates this one from the cut above it (each
operation once, its saved tensors captured as it runs) and hands the tensors out. After
`torch.utils.checkpoint(use_reentrant=False)`, which keeps each step's input where this derives it from its output.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from revfx import _torch
from revfx.eager import dtensor
from revfx.eager.calls import Call
from revfx.eager.regeneration import Regeneration, unpack
from revfx.eager.region_plan import Env, Handle, RegionPlan, StepPlan
from revfx.eager.state import CallState, Random
from revfx.errors import NotReversibleError
from revfx.layout import address, offset_of, same_view
from revfx.passes.program import Arc


def run_region(plan: RegionPlan, calls: Sequence[Call], env: Env) -> RegionRun:
    """Run the region's operations on the values in `env`, which then holds its last cut, and return the run's state."""
    run = RegionRun(plan, calls, env)
    run.forward(env)
    plan.kept, plan.coded = len(run.kept_cuts), sum(code.nbytes for code in run.codes.values())
    return run


class RegionRun(Regeneration):
    """The forward of one call of a region, which keeps what its backward starts from."""

    @_torch.uncompiled  # as the re-run will be
    def forward(self, env: Env) -> None:
        """Run the region's operations on `env`, and keep what the plan says, with the codes of what it does not."""
        program, region, last = self.program, self.region, self.program.last_use
        with self.quiet:
            for v in env:
                self._note(v, env[v])
            given = ((v, program.values[v]) for v in env if last[v] >= region.start)
            self._keep(self.kept, [v for v, value in given if value.source or value.kept], env)
            self._keep(self.kept, (*region.side, *region.saved, *region.entry), env)
        self.kept_cuts[0] = {v: self.kept[v] for v in region.entry if v in self.kept}
        held = {*region.saved, *region.side}

        @_torch.uncompiled
        def pack(t: Tensor) -> Handle:
            assert self.current is not None, "autograd saved a tensor outside an operation"
            handle = Handle(self.current, len(self.fresh), self, _torch.version(t))
            self.fresh.append((handle, t))
            return handle

        with saved_tensors_hooks(pack, unpack):
            for number, plan in enumerate(self.plan.steps):
                self._run_forward(number, plan, env, held)

    def _run_forward(self, number: int, plan: StepPlan, env: Env, held: set[int]) -> None:
        step, codes = plan.step, plan.codes if number else {}
        lowest = number - 1 in self.kept_cuts  # the last cut of its stretch to come back
        for at, index in enumerate(range(step.start, step.stop)):
            made = self.program.ops[index].outs
            outs = self._call(index, env, plan.exits[at], plan.checked)
            with self.quiet:
                for v, t in zip(made, outs, strict=True):
                    env[v] = t
                    self._note(v, t)
                if held:
                    self._keep(self.kept, [v for v in made if v in held], env)
                for arc in codes.get(index, ()):
                    self._encode(number, arc, env, lowest)
            for v in plan.dead[at]:
                env.pop(v, None)
        with self.quiet:
            if codes and all(v in self.kept for v in step.entry):
                self.kept_cuts[number] = {v: self.kept[v] for v in step.entry}
            if number == len(self.plan.steps) - 1:
                self._keep(self.kept_cuts.setdefault(number + 1, {}), step.exit, env)
        for v in plan.late:
            env.pop(v, None)

    def _encode(self, number: int, arc: Arc, env: Env, lowest: bool) -> None:
        """Make the code of an inverse's head, or keep the head where that takes less."""
        v = arc.head
        if v in self.kept:
            return
        code, codec = None, self.plan.codecs[v]
        x = dtensor.piece(env[v])
        if codec.asks(x):
            try:
                with torch.no_grad():
                    predicted = dtensor.spread(self.predicted(arc, env), self.spread.get(v))
                    code = codec.encode(x, dtensor.piece(predicted), spent=self._is_fresh(predicted, arc.tail, env))
            except Exception as e:  # of any class: the code is a library's
                if not arc.declared or isinstance(e, torch.OutOfMemoryError):
                    raise
                codec.width, codec.due = None, False  # as a spline's, for what lies outside its box
            if codec.width is None:
                self.plan.distrust(v)
        if code is None:
            self._keep(self.kept, (v,), env)
            self.uncoded[number] = self.uncoded.get(number, frozenset()) | {v}
            return
        self.codes[v] = code
        if code.lost is not None:
            self.witness.lost.append(code.lost)
        if lowest and self.lossless:
            self.witness.note(-1 - v, (env[v],))

    def _is_fresh(self, predicted: Tensor, tail: tuple[int, ...], env: Env) -> bool:
        """Return whether nothing that an inverse read shares memory with what it gave."""
        if type(predicted) is not Tensor:
            return False
        memory = _torch.storage_key(predicted)
        return all([_torch.storage_key(env[v] if v in env else self.kept[v]) != memory for v in tail])

    def _note(self, v: int, t: Tensor) -> None:
        strided = t.layout == torch.strided
        self.layout[v] = (tuple(t.shape), t.stride() if strided else (), t.requires_grad)
        if type(t) is not Tensor:
            self.spread[v] = dtensor.spread_of(t)
        elif strided and (offset := offset_of(t)):
            self.offsets[v] = offset
        if self.watch is not None:
            self.watch.made(self, v, t)

    def _keep(self, into: Env, values: Iterable[int], env: Env) -> None:
        """Hold aliases without autograd history: holding the tensors would make a cycle through the graph."""
        for v in values:
            if v in env:
                t = env[v].detach()
                kept = into[v] = t.clone() if self.program.values[v].written else t
                self.versions.append((v, kept, _torch.version(kept)))

    def _call(self, index: int, env: Env, exits: tuple[int, ...], checked: bool) -> tuple[Tensor, ...]:
        op, call = self.program.ops[index], self.calls[index]
        outs = self._called(index, env) if op.opaque else self._invoke(call, index, env)
        fresh, self.fresh = self.fresh, []
        for t in outs:
            if not isinstance(t, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"`{call.name}` returned a {type(t).__name__}; it must return one tensor.")
        for v, t in zip(op.outs, outs, strict=True) if exits else ():
            planned = self.program.values[v]
            if v in exits and (t.shape != planned.shape or t.dtype != planned.dtype):
                made, want = (f"{x.dtype}{list(x.shape)}" for x in (t, planned))
                raise NotReversibleError(
                    f"{self._named(index)} returned {made} instead of {want}, so its region can't be regenerated."
                    " Take off the hook that changes its output, if there is one."
                )
        if fresh:
            read = [(v, env[v]) for v in op.ins if v in env]
            self._settle(index, fresh, [*read, *zip(op.outs, outs, strict=True)])
        if op.opaque and checked:
            with self.quiet:
                self.witness.note(index, outs, [t if _is_own(handle, t) else None for handle, t in fresh])
        return outs

    def _invoke(self, call: Call, index: int, env: Env) -> tuple[Tensor, ...]:
        self.current = index
        try:
            return call.invoke(env)
        except BaseException:
            self.fresh = []
            raise
        finally:
            self.current = None

    def _called(self, index: int, env: Env) -> tuple[Tensor, ...]:
        """Return what a function of the user's gives, after noting what the call depends on."""
        op, call = self.program.ops[index], self.calls[index]
        data = [env[v] for v in op.ins if v in env]
        versions = [_torch.version(t) for t in data]
        with self.quiet:
            state, returned = CallState(call.name, call.reach), False
        try:
            outs = self._invoke(call, index, env)
            returned = True
        finally:
            with self.quiet:
                state.settle(returned)
        self.states[index] = state
        with self.quiet:
            now = Random(self.devices)
            if not now.same(self.random):
                state.random, self.random = self.random, now
        for t, version in zip(data, versions, strict=True):
            if _torch.version(t) != version:
                raise NotReversibleError(
                    f"{self._named(index)} writes to its input in place, so the value that the next operations read"
                    " can't be regenerated. Let it work on a copy (`x.clone()`)."
                )
        return outs

    def _settle(self, index: int, fresh: list[tuple[Handle, Tensor]], candidates: list[tuple[int, Tensor]]) -> None:
        """Make each new handle a value where it is one; the tensors were alive until now, so addresses are unique.

        A result that outlives the step is not taken for one: what is kept of it would not be the result of what is
        regenerated, and a backward such as `amax`'s compares the two.
        """
        step = self.plan.step_of[index]
        outs, exit = self.program.ops[index].outs, self.region.steps[step].exit
        known: dict[int | None, list[tuple[int, Tensor]]] = {}
        for v, t in candidates:
            if (at := address(t)) and not (v in outs and v in exit):
                known.setdefault(at, []).append((v, t))
        for handle, t in fresh:
            handle.spoilt = _torch.version(t) != handle.version
            handle.value = next((v for v, other in known.get(address(t), ()) if same_view(t, other)), None)
            if handle.value is not None:
                self.wanted.setdefault(step, set()).add(handle.value)
            else:
                self.captured_ops.setdefault(step, set()).add(index)
        self.saved_meta[index] = [(t.shape, t.dtype) for _, t in fresh]


def _is_own(handle: Handle, t: Tensor) -> bool:
    """Return whether an operation computed what autograd saved: no value, no buffer, no view of a weight."""
    seen = handle.value is not None or handle.spoilt
    return not seen and t.grad_fn is not None and not isinstance(t._base, torch.nn.Parameter)

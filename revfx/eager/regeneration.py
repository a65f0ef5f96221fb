"""The backward of a region: its values regenerated step by step, each operation run once again as it ran first."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from revfx import _torch
from revfx.ambient import autocast_of, autocast_states, kernels_of
from revfx.codes import Code, decode
from revfx.eager import dtensor
from revfx.eager.calls import Call
from revfx.eager.region_plan import Env, Handle, RegionPlan, region_observer
from revfx.eager.state import CallState, Random
from revfx.eager.witness import AS_IT_IS, Witness, changed, compare, join, judge
from revfx.errors import RegenerationError
from revfx.layout import leaf, placed, restrided
from revfx.passes.closure import Forward, Invert
from revfx.passes.program import Arc
from revfx.passes.rounding import precision
from revfx.passes.schedule import Instruction, schedule


class Regeneration:
    """One call of a region: what it kept, and the values regenerated for the step that the backward is in.

    Cut c lies before step c; step s goes from cut s to cut s+1. State belongs to the call: threads may share a module.
    """

    def __init__(self, plan: RegionPlan, calls: Sequence[Call], env: Env) -> None:
        self.plan, self.program, self.region, self.calls = plan, plan.program, plan.region, calls
        self.states: dict[int, CallState] = {}
        self.saved_meta: dict[int, list[tuple[Any, ...]]] = {}
        self.wanted: dict[int, set[int]] = {}
        self.captured_ops: dict[int, set[int]] = {}
        self.layout: dict[int, tuple[tuple[int, ...], tuple[int, ...], bool]] = {}
        self.offsets: dict[int, int] = {}
        self.spread: dict[int, dtensor.Spread | None] = {}
        self.kept_cuts: dict[int, Env] = {}
        self.kept: Env = {}
        self.codes: dict[int, Code] = {}
        self.uncoded: dict[int, frozenset[int]] = {}  # of each step what is kept as its code would be no smaller
        self.versions: list[tuple[int, Tensor, int]] = []
        self.watch = region_observer.get()(self)
        self.devices = dict.fromkeys(t.device for t in env.values() if t.device.type != "cpu")
        self.autocast = autocast_states(dict.fromkeys(("cpu", *(d.type for d in self.devices))))
        self.cached = torch.is_autocast_cache_enabled()
        self.settings = _torch.kernel_settings(), _torch.modes()  # around the region
        casting = [torch.finfo(dtype).eps for _, enabled, dtype in self.autocast if enabled]
        self.casts = bool(self.devices or casting)
        self.quiet = _torch.no_modes() if any(self.settings[1]) else AS_IT_IS  # for what is none of the user's
        self.lossless = plan.lossless
        self.witness = Witness(self.lossless)
        self.eps = max(casting, default=0.0)
        with self.quiet:
            self.random = Random(self.devices)
        self.lock = threading.RLock()
        self.current: int | None = None
        self.fresh: list[tuple[Handle, Tensor]] = []
        self.task: int | None = None
        self.differs = True  # whether the kernels' settings are others than in the forward
        self.active: int | None = None
        self.values: Env = {}
        self.captures: dict[int, list[Tensor | None]] = {}

    def invert(self, number: int, exit: Env) -> Env:
        """Return the entry of step `number`, derived from values of its exit; empty where it is kept instead."""
        if number in self.kept_cuts:
            return {}
        with self._as_in_the_forward():
            return dict(self._run_step(number, dict(exit), replay=False, target=False))

    def fetch(self, handle: Handle) -> Tensor:
        """Return the tensor that a handle stands for, regenerated where it is not there."""
        if handle.op == self.current:  # the operation differentiates within itself
            return self.fresh[handle.k][1].detach()
        if handle.spoilt:
            raise RegenerationError(
                f"a tensor that `{self.calls[handle.op].name}` needs for its gradient was modified by an inplace"
                " operation in it, after autograd had saved it. Plain autograd refuses this too."
            )
        with self.lock:
            task = _torch.graph_task_id()
            if task != self.task:
                self.forget()
                self._check_versions()
                self.task = task
                self.differs = _torch.kernel_settings() != self.settings[0]
                if task != -1:
                    join(task, self)
            step = self.plan.step_of[handle.op]
            tensor = self._look_up(handle) if self.active == step else None
            if tensor is None:
                self._regenerate(step)
                tensor = self._look_up(handle)
                if task == -1:
                    compare((self,))
            assert tensor is not None
            return tensor

    def _look_up(self, handle: Handle) -> Tensor | None:
        """Return the tensor if it is there; what was captured is handed out once, to be freed when it was used."""
        if (v := handle.value) is not None:
            return self.values[v] if v in self.values else self.kept.get(v)
        captured = self.captures.get(handle.op)
        if captured is None:
            return None
        tensor, captured[handle.k] = captured[handle.k], None
        return tensor

    def forget(self) -> None:
        """Let go of what was regenerated."""
        with self.lock:
            self.task = self.active = None
            self.values, self.captures = {}, {}

    def _check_versions(self) -> None:
        for v, t, version in self.versions:
            if _torch.version(t) != version:
                raise RegenerationError(
                    f"`{self.program.values[v].name}`, which the region at {self._place(0)} keeps to regenerate its"
                    " activations, was modified in place between the forward and the backward. Work on a copy"
                    " (`y.clone()`), or keep the activations with `revfx.testing.store_activations()`."
                )

    def _place(self, step: int) -> str:
        return self.program.ops[self.region.steps[step].start].where or "an unknown place"

    def _regenerate(self, step: int) -> None:
        """Make the values and captures of `step`, from the regenerated cut above it or the nearest kept one."""
        ahead = self.captures.items() if self.active == step + 1 else ()
        there = {i: c for i, c in ahead if self.plan.step_of[i] == step and all(t is not None for t in c)}
        active, self.captures = self.active, there
        try:
            with self._as_in_the_forward():
                if step in self.kept_cuts:
                    self._run_step(step, dict(self.kept_cuts[step]), replay=True, target=True)
                else:
                    above = min(c for c in self.kept_cuts if c > step)
                    if active is not None and step < active < above:
                        above, known = active, self.values
                    else:
                        known = dict(self.kept_cuts[above])
                    self.values = {}
                    for s in range(above - 1, step - 1, -1):
                        known = self._run_step(s, known, replay=False, target=s == step)
        except BaseException:
            self.active, self.values, self.captures = None, {}, {}
            raise
        self.active = step

    @contextlib.contextmanager
    def _as_in_the_forward(self) -> Generator[None]:
        """Return a context for regeneration: the forward's kernels, and none of the user's modes."""
        with kernels_of(self.settings[0]) if self.differs else AS_IT_IS, torch.no_grad():
            with _torch.no_modes() if any(_torch.modes()) else AS_IT_IS:
                yield

    def _run_step(self, number: int, known: Env, replay: bool, target: bool) -> Env:
        """Return the regenerated values of one step; with `target` also those that autograd asks for."""
        step, uncoded = self.region.steps[number], self.uncoded.get(number, frozenset())
        kept = self.kept if not step.again else {v: t for v, t in self.kept.items() if v not in step.again}
        wanted: set[int] = set() if replay else {v for v in step.entry if v not in kept}
        captured: set[int] = set()
        if target:
            wanted |= {v for v in self.wanted.get(number, ()) if v not in kept}
            captured = self.captured_ops.get(number, captured) - self.captures.keys()
            captured |= {i for i in step.above if i in self.captured_ops.get(self.plan.step_of[i], ())}
        base = step.entry if replay else [v for v in step.exit if v not in step.again]
        key = (number, replay, frozenset(wanted), frozenset(captured), uncoded)
        instructions = self.plan.schedules.get(key)
        if instructions is None:
            instructions = schedule(self.program, step, {*base, *kept}, replay, frozenset(wanted), frozenset(captured))
            self.plan.schedules[key] = instructions
        env = {**kept, **{v: known[v] for v in base if v in known}}
        known.clear()  # the caller's reference too: what is used up here is freed here
        self.values = {}
        for instruction in instructions:
            self._execute(instruction, env, kept)
        self.values = {v: env[v] for v in wanted}
        return self.values

    def _execute(self, instruction: Instruction, env: Env, kept: Env) -> None:
        d = instruction.run
        if isinstance(d, Forward):
            made = zip(self.program.ops[d.op].outs, self._rerun(d.op, env, instruction.capture), strict=True)
        else:
            made = [(d.arc.head, self._solved(d.arc, env))]
        for v, t in made:
            if v not in kept:
                env[v] = self._as_it_was(v, t)
                if self.watch is not None:
                    self.watch.regenerated(self, d, v, env[v])
                elif isinstance(d, Invert):
                    self.witness.again(-1 - v, (env[v],))
        for v in instruction.drop:
            if v not in kept:
                env.pop(v, None)

    def _solved(self, arc: Arc, env: Env) -> Tensor:
        """Return what an inverse gives, corrected by the head's code."""
        t, code = self.predicted(arc, env), self.codes.get(arc.head)
        if code is None:
            return t
        spread = self.spread.get(arc.head)
        if spread is None:
            return decode(t, code)
        whole = dtensor.spread(t, spread)
        return dtensor.holding(whole, decode(dtensor.piece(whole), code))

    def predicted(self, arc: Arc, env: Env) -> Tensor:
        """Return what an inverse gives, by the same kernels both times: without autocast; modules in it as they ran."""
        tail = [env[v] if v in env else self.kept[v] for v in arc.tail]
        if not (arc.runs or any([torch.is_autocast_enabled(d) for d, *_ in self.autocast])):
            return arc.solve(*tail)
        with contextlib.ExitStack() as stack:
            for device, *_ in () if arc.runs else self.autocast:
                stack.enter_context(torch.autocast(device, enabled=False))
            if arc.runs:
                stack.enter_context(autocast_of(self.autocast, self.cached))
            for op in arc.runs:
                stack.callback(self.states[op].put_back())
            return arc.solve(*tail)

    def _as_it_was(self, v: int, t: Tensor) -> Tensor:
        """Return `t` as the value lay in memory in the forward: kernels, and what they save, depend on it."""
        shape, stride, _ = self.layout[v]
        if type(t) is Tensor and t.layout == torch.strided and 0 not in stride:
            return placed(t, shape, stride, self.offsets.get(v, 0))
        return restrided(dtensor.spread(t, self.spread.get(v)), shape, stride)

    def judge(self, key: int, error: float) -> None:
        """Warn, or raise, as a result, or a value, is off by `error` (see `Witness`)."""
        dtypes = [self.program.values[v].dtype for v in (self.program.ops[key].outs if key >= 0 else (-1 - key,))]
        eps = max(self.eps, *map(precision, dtypes))
        if key >= 0:
            name = self._named(key)
        else:
            step = next((n for n, s in enumerate(self.region.steps) if -1 - key in s.entry), 0)
            name = f"`{self.program.values[-1 - key].name}` ({self._place(step)})"
        if judge(name, error, eps, self.lossless, warn=not self.plan.warned):
            self.plan.warned = True

    def _rerun(self, index: int, env: Env, capture: bool) -> list[Tensor]:
        """Return the outputs of one operation, run as it was in the forward; what autograd saves goes to `captures`."""
        op, call, state = self.program.ops[index], self.calls[index], self.states.get(index)
        modes = any(self.settings[1])
        caching = torch.is_autocast_cache_enabled() != self.cached  # compiled functions are guarded by it
        casts = self.casts or caching or torch.is_autocast_enabled("cpu")
        if not (op.opaque or capture or casts or modes):
            return [t.detach() for t in call.invoke(env)]  # arithmetic or layout: nothing around it matters
        inputs = {v: leaf(env[v], self.layout[v][2]) for v in op.ins}
        saved: list[Tensor] = []
        metas: list[tuple[Any, ...]] = []

        @_torch.uncompiled
        def pack(t: Tensor) -> int:
            saved.append(t.detach())
            metas.append((t.shape, t.dtype))
            return len(saved) - 1

        @_torch.uncompiled
        def unpack(k: int) -> Tensor:  # only an operation that differentiates within itself asks for it
            if not saved:
                raise RegenerationError("the graph of a re-run is never differentiated")
            return saved[k]

        with contextlib.ExitStack() as stack:
            if state is not None:
                stack.callback(state.put_back())
            if modes:
                stack.enter_context(_torch.modes_of(self.settings[1]))
            if casts:
                stack.enter_context(autocast_of(self.autocast, self.cached))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(saved_tensors_hooks(pack, unpack))
            outs = [dtensor.arrived(t.detach()) for t in call.invoke(inputs)]
        shapes = [self.layout[v][0] for v in op.outs], [t.shape for t in outs]
        if (change := changed(self.saved_meta.get(index, []), metas, *shapes)) is not None:
            raise RegenerationError(
                f"{self._named(index)} did not return the same shapes and save the same"
                f" tensors when it was run again for the backward: {change}. It branches on values that rounding can"
                " flip, or depends on state that changed since. Keep its activations with"
                " `revfx.testing.store_activations()`, or make it deterministic."
            )
        if self.watch is None:  # which compares all itself
            self.witness.again(index, outs, saved)
        if capture:
            self.captures[index] = [*saved]
        saved.clear()
        return outs

    def _named(self, index: int) -> str:
        return f"`{self.calls[index].name}` ({self.program.ops[index].where or 'unknown place'})"


@_torch.uncompiled
def unpack(handle: Handle) -> Tensor:
    """Return the tensor that a handle stands for."""
    return handle.state.fetch(handle)

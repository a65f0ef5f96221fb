"""Runs a region: its real operations under saved-tensor hooks that free what autograd would keep and regenerate it.

Forward: every tensor that autograd packs becomes a handle (operation, k). Of the values only the region's last cut, its
first cut, side inputs and the cuts that numerics demand stay alive. Backward: the first unpack out of a step drops
everything of the step after it, regenerates this one from the cut above it (each operation once, its saved tensors
captured as it runs) and hands the tensors out. After `torch.utils.checkpoint(use_reentrant=False)`, which keeps each
step's input where this derives it from its output.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from revfx import _torch, numerics, sharding
from revfx.ambient import autocast_of, settings, settings_of
from revfx.calls import Call
from revfx.cancellation import NOTHING, Sums, sums_of
from revfx.checks import Checksums, Ranges, Samples, changed
from revfx.errors import NotReversibleError, RegenerationError, RevfxWarning
from revfx.layout import ALIGNED, identity, leaf, placed, restrided
from revfx.mode import without_hooks
from revfx.passes.closure import Derivation, Forward
from revfx.passes.cuts import Step
from revfx.passes.plan import Instruction, asked_for, deep_in_half_precision, inverted_from, schedule
from revfx.passes.program import Program
from revfx.passes.regions import Region
from revfx.sides import Sides
from revfx.surroundings import Random, Surroundings, noted


Env = dict[int, Tensor]


class Watch(Protocol):
    """What looks on while one run of a region goes on."""

    def made(self, run: RegionRun, value: int, tensor: Tensor) -> None:
        """Called with every value that the forward reads or makes."""
        ...

    def regenerated(self, run: RegionRun, derivation: Derivation, value: int, tensor: Tensor) -> None:
        """Called with every value that the backward derives, before anything reads it."""
        ...


watching: ContextVar[Callable[[RegionRun], Watch] | None] = ContextVar("revfx_watching", default=None)


@dataclass(eq=False, slots=True)
class Handle:
    """Stands for the k-th tensor that autograd saved during operation `op`; `value` where that is a program value.

    `spoilt`: the operation wrote to the tensor after autograd had saved it, which only matters if it is asked for.
    """

    op: int
    k: int
    state: RegionRun
    version: int
    value: int | None = None
    spoilt: bool = False


@dataclass
class RegionPlan:
    """A region of a program, with the schedules made for it so far (one per step, direction and need).

    `anchors` are the cuts that are kept as the user wishes, one for every `anchor_every` couplings. `kept` is the
    number of cuts that the latest forward kept, `calls` that of forwards; `warned` is set once drift was warned of, and
    `warning` is what the first run has to say.
    """

    program: Program
    region: Region
    tolerance: float | None = None
    anchor_every: int | None = None
    schedules: dict[object, tuple[Instruction, ...]] = field(default_factory=dict[object, tuple[Instruction, ...]])
    anchors: frozenset[int] = frozenset()
    step_of: dict[int, int] = field(default_factory=dict[int, int])
    kept: int = 0
    warned: bool = False
    warning: str | None = None
    exact: bool = False
    calls: int = 0
    sums: list[Sums] = field(default_factory=list[Sums])

    def __post_init__(self) -> None:
        self.anchors = asked_for(self.region.steps, self.anchor_every)
        self.exact = any(v.grid is not None for v in self.program.values)
        self.warning = deep_in_half_precision(self.program, self.region.steps, self.anchors)
        self.sums = [sums_of(self.program, step) for step in self.region.steps]
        for number, step in enumerate(self.region.steps):
            self.step_of.update(dict.fromkeys(range(step.start, step.stop), number))


def run_region(plan: RegionPlan, calls: Sequence[Call], env: Env) -> RegionRun:
    """The run's state, after the region's operations were run on the values in `env`, which then holds its last cut.

    Raises:
        NotReversibleError: an operation wrote to its input in place, or returned another shape or dtype than planned.
    """
    if plan.warning is not None:
        warning, plan.warning = plan.warning, None
        warnings.warn(warning, RevfxWarning, stacklevel=2)
    plan.calls += 1
    run = RegionRun(plan, calls, env)
    _torch.uncompiled(run.forward)(env)  # as the re-run will be
    plan.kept = len(run.kept_cuts)
    return run


class RegionRun:
    """One call of a region: what it kept, and the values regenerated for the step that the backward is in.

    Cut c lies before step c; step s goes from cut s to cut s+1. State belongs to the call, so the same module may be
    called several times, from several threads.
    """

    def __init__(self, plan: RegionPlan, calls: Sequence[Call], env: Env) -> None:
        program, region = plan.program, plan.region
        self.plan, self.program, self.region, self.calls = plan, program, region, calls
        self.surroundings: dict[int, Surroundings] = {}
        self.saved_meta: dict[int, list[tuple[Any, ...]]] = {}
        self.wanted: dict[int, set[int]] = {}
        self.captured_ops: dict[int, set[int]] = {}
        self.layout: dict[int, tuple[tuple[int, ...], tuple[int, ...], bool]] = {}
        self.offsets: dict[int, int] = {}
        self.spread: dict[int, sharding.Spread | None] = {}
        self.kept_cuts: dict[int, Env] = {}
        self.kept: Env = {}
        self.unchanged: set[int] = set()
        self.versions: list[tuple[int, Tensor, int]] = []
        self.ranges, self.checksums = Ranges(program), Checksums(program)
        self.returns = numerics.Returns(program, region)
        watch = watching.get()
        self.watch = watch(self) if watch is not None else None
        self.device = device = next((t.device for t in env.values() if t.device.type != "cpu"), None)
        devices = ["cpu"] if device is None else ["cpu", device.type]
        self.autocast = [(d, *_torch.autocast_state(d)) for d in devices]
        self.cached = torch.is_autocast_cache_enabled()
        self.casts = device is not None or any(_torch.modes()) or any(enabled for _, enabled, _ in self.autocast)
        eps = max((torch.finfo(dtype).eps for _, enabled, dtype in self.autocast if enabled), default=0.0)
        self.samples = Samples(program, eps)
        dtypes = [program.values[v].dtype for v in region.entry]
        self.sides = Sides(0 if plan.exact else plan.calls, len(region.steps), dtypes, eps)
        self.random, self.settings = Random.now(device), settings()
        self.lock = threading.RLock()
        self.current: int | None = None
        self.fresh: list[tuple[Handle, Tensor]] = []
        self.task: int | None = None
        self.active: int | None = None
        self.values: Env = {}
        self.captures: dict[int, list[Tensor | None]] = {}

    # --- forward
    def forward(self, env: Env) -> None:
        """None; runs the region's operations on `env` and keeps what the plan and the numerics say."""
        program, region = self.program, self.region
        last = program.last_use
        for v in env:
            self._note(v, env[v])
        self._keep_all(self.kept, [v for v in env if program.values[v].source and last[v] >= region.start], env)
        self._keep_all(self.kept, (*region.side, *region.saved, *region.entry), env)
        self.kept_cuts[0] = {v: self.kept[v] for v in region.entry if v in self.kept}
        growth = numerics.Growth(self.plan.tolerance, self.returns)
        self.unchanged = growth.unchanged
        alive, held = set(program.outputs), {*region.saved, *region.side}
        with saved_tensors_hooks(_torch.uncompiled(self._pack), _torch.uncompiled(_unpack)):
            for number, step in enumerate(region.steps):
                anchored = number in self.plan.anchors
                if anchored:
                    self._keep_all(self.kept_cuts.setdefault(number, {}), step.entry, env)
                sums = NOTHING if number == 0 or anchored else self.plan.sums[number]
                asked, lost = numerics.asked_of(step) | sums.held, False
                lower = {v: env[v] for v in step.entry} if asked or sums.after else {}
                sampled = numerics.is_checked(number, len(region.steps))
                unseen = anchored or all(a.head in self.kept for a in step.arcs)  # nothing that comes back tells of it
                if sampled:
                    self.samples.note(number, self._regenerated(step, env))
                if self.plan.exact and number - 1 in self.kept_cuts:  # the last one of a stretch to come back
                    self.checksums.note(number, self._regenerated(step, env))
                for index in range(step.start, step.stop):
                    outs = self._call(index, env, unseen)
                    for v, t in zip(program.ops[index].outs, outs, strict=True):
                        env[v] = t
                        self._note(v, t)
                    self._keep_all(self.kept, [v for v in program.ops[index].outs if v in held], env)
                    lost = lost or sums.lose(index, env, self.kept, self.plan.tolerance)
                    for v in (*program.ops[index].ins, *program.ops[index].outs):
                        if last[v] <= index and v in env and not (v in alive or v in asked or program.values[v].source):
                            del env[v]
                unsafe, growing = growth.close(step, env, lower, replayed=number == 0 or anchored, lost=lost)
                if unsafe:
                    self._keep_all(self.kept_cuts.setdefault(number, {}), step.entry, lower)
                if growing or number == len(region.steps) - 1:
                    self._keep_all(self.kept_cuts.setdefault(number + 1, {}), step.exit, env)
                if sampled:
                    self.samples.rescale(number, inverted_from(step), env)
                for v in asked:
                    if last[v] < step.stop:
                        env.pop(v, None)
        self.ranges.close()
        self.returns.forget()

    def _regenerated(self, step: Step, env: Env) -> Env:
        """What the backward makes of a step's entry, as the forward made it."""
        return {v: env[v] for v in step.entry if v not in self.kept}

    def _note(self, v: int, t: Tensor) -> None:
        self.layout[v] = (tuple(t.shape), t.stride() if t.layout == torch.strided else (), t.requires_grad)
        if self.plan.exact and type(t) is Tensor and t.layout == torch.strided and t.data_ptr() % ALIGNED:
            self.offsets[v] = t.data_ptr() % ALIGNED
        self.spread[v] = sharding.spread_of(t)
        self.ranges.note(v, t)
        if self.watch is not None:
            self.watch.made(self, v, t)

    def _keep_all(self, into: Env, values: Iterable[int], env: Env) -> None:
        for v in values:
            if v in env:
                self._keep(into, v, env[v])

    def _keep(self, into: Env, v: int, t: Tensor) -> None:
        """Holds an alias without autograd history: holding the tensor itself would make a cycle through the graph."""
        kept = into[v] = t.detach().clone() if self.program.values[v].written else t.detach()
        self.versions.append((v, kept, _torch.version(kept)))
        if not self.program.values[v].source:
            self.returns.remember(v, kept)

    def _call(self, index: int, env: Env, unseen: bool) -> tuple[Tensor, ...]:
        op, call = self.program.ops[index], self.calls[index]
        data = [v for v in op.ins if v in env]
        before = [_torch.version(env[v]) for v in data]
        around = noted(call.name, (call.fn, call.args, call.kwargs)) if op.opaque else contextlib.nullcontext()
        self.current = index
        try:
            with around as surroundings, self.sides.noted(index, self.plan.step_of[index]):
                outs = call.invoke(env)
        finally:
            self.current = None
            fresh, self.fresh = self.fresh, []
        for t in outs:
            if not isinstance(t, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"`{call.name}` returned a {type(t).__name__}; it must return one tensor.")
        if surroundings is not None:
            now = Random.now(self.device)
            if not now.same(self.random):
                surroundings.random = self.random
            self.random = now
            self.surroundings[index] = surroundings
        for v, version in zip(data, before, strict=True):
            if _torch.version(env[v]) != version:
                raise NotReversibleError(
                    f"`{call.name}` ({op.where or 'unknown place'}) writes to its input in place, so the value that"
                    " the next operations read can't be regenerated. Let it work on a copy (`x.clone()`)."
                )
        exit = self.region.steps[self.plan.step_of[index]].exit
        for v, t in zip(op.outs, outs, strict=True):
            planned = self.program.values[v]
            if v in exit and (tuple(t.shape) != planned.shape or t.dtype != planned.dtype):
                raise NotReversibleError(
                    f"`{call.name}` ({op.where or 'unknown place'}) returned {t.dtype}{list(t.shape)} where"
                    f" {planned.dtype}{list(planned.shape)} was planned; does a hook change its output?"
                )
        self._settle(index, fresh, {**{v: env[v] for v in data}, **dict(zip(op.outs, outs, strict=True))})
        if op.opaque and (unseen or self.sides.watches(self.plan.step_of[index])):
            saved = [t if handle.value is None else None for handle, t in fresh]
            self.samples.note_results(index, outs if unseen else (), saved, all(v in self.kept for v in op.ins))
        return outs

    def _pack(self, t: Tensor) -> Handle:
        assert self.current is not None, "autograd saved a tensor outside an operation"
        handle = Handle(self.current, len(self.fresh), self, _torch.version(t))
        self.fresh.append((handle, t))
        return handle

    def _settle(self, index: int, fresh: list[tuple[Handle, Tensor]], candidates: Env) -> None:
        """Makes each new handle a value where it is one; the tensors were alive until now, so addresses are unique.

        A result that outlives the step is not taken for one: what is kept of it would not be the result of what is
        regenerated, and a backward such as `amax`'s compares the two.
        """
        if not fresh:
            return
        step = self.plan.step_of[index]
        lasting = {*self.region.steps[step].exit}.intersection(self.program.ops[index].outs)
        known = {key: v for v, t in candidates.items() if v not in lasting and (key := identity(t)) is not None}
        metas: list[tuple[Any, ...]] = []
        for handle, t in fresh:
            metas.append((tuple(t.shape), t.dtype))
            handle.spoilt = _torch.version(t) != handle.version
            key = identity(t)
            handle.value = known.get(key) if key is not None else None
            if handle.value is not None:
                self.wanted.setdefault(step, set()).add(handle.value)
            else:
                self.captured_ops.setdefault(step, set()).add(index)
        self.saved_meta[index] = metas

    def invert(self, number: int, exit: Env) -> Env:
        """The entry of step `number`, derived from given values of its exit; empty where its entry is kept instead."""
        return {} if number in self.kept_cuts else dict(self._run_step(number, dict(exit), replay=False, target=False))

    # --- backward
    def fetch(self, handle: Handle) -> Tensor:
        """The tensor that a handle stands for, regenerated where it is not there."""
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
                self._forget()
                self._check_versions()
                self.task = task
                if task != -1:
                    _torch.at_end_of_backward(self._forget)
            step = self.plan.step_of[handle.op]
            tensor = self._look_up(handle) if self.active == step else None
            if tensor is None:
                self._regenerate(step)
                tensor = self._look_up(handle)
            assert tensor is not None
            return tensor

    def _look_up(self, handle: Handle) -> Tensor | None:
        """The tensor if it is there; what was captured is handed out once, so that it can be freed as soon as it was
        used.
        """
        if handle.value is not None:
            v = handle.value
            return self.values[v] if v in self.values else self.kept.get(v)
        captured = self.captures.get(handle.op)
        if captured is None:
            return None
        tensor, captured[handle.k] = captured[handle.k], None
        return tensor

    def _forget(self) -> None:
        with self.lock:
            self.task = self.active = None
            self.values, self.captures = {}, {}

    def _check_versions(self) -> None:
        for v, t, version in self.versions:
            if _torch.version(t) != version:
                raise RegenerationError(
                    f"`{self.program.values[v].name}`, which the region {self._where()} keeps to regenerate its"
                    " activations, was modified in place between the forward and the backward. Work on a copy"
                    " (`y.clone()`), or keep the activations with `revfx.testing.store_activations()`."
                )

    def _where(self) -> str:
        return f"at {self._place(0)}"

    def _place(self, step: int) -> str:
        return self.program.ops[self.region.steps[step].start].where or "an unknown place"

    def _regenerate(self, step: int) -> None:
        """Makes the values and captures of `step`, from the regenerated cut above it or the nearest kept one."""
        active, self.captures = self.active, {}
        try:
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
                    self._compare(s)
        except BaseException:
            self.active, self.values, self.captures = None, {}, {}
            raise
        self.active = step

    def _run_step(self, number: int, known: Env, replay: bool, target: bool) -> Env:
        """The regenerated values of one step; with `target` also those that autograd asks for, and its captures."""
        step = self.region.steps[number]
        kept = self.kept if not step.again else {v: t for v, t in self.kept.items() if v not in step.again}
        wanted: set[int] = set() if replay else {v for v in step.entry if v not in kept}
        captured: set[int] = set()
        if target:
            wanted |= {v for v in self.wanted.get(number, ()) if v not in kept}
            captured = self.captured_ops.get(number, captured)
        base = step.entry if replay else [v for v in step.exit if v not in step.again]
        key = (number, replay, frozenset(wanted), frozenset(captured))
        instructions = self.plan.schedules.get(key)
        if instructions is None:
            have = {*base, *kept}
            instructions = schedule(self.program, step, have, replay, frozenset(wanted), frozenset(captured))
            self.plan.schedules[key] = instructions
        env = {**kept, **{v: known[v] for v in base if v in known}}
        known.clear()  # the caller's reference too: what is used up here is freed here
        self.values = {}
        with torch.no_grad(), without_hooks():
            for instruction in instructions:
                self._execute(instruction, env, kept)
        self.values = {v: env[v] for v in wanted}
        return self.values

    def _compare(self, cut: int) -> None:
        """None; warns, or raises, where the regenerated cut is not what it was."""
        where = self._place(cut)
        self.checksums.compare(cut, self.values, where)
        if self.samples.compare(cut, self.values, where, warn=not self.plan.warned):
            self.plan.warned = True

    def _execute(self, instruction: Instruction, env: Env, kept: Env) -> None:
        d = instruction.run
        if isinstance(d, Forward):
            made = zip(self.program.ops[d.op].outs, self._rerun(d.op, env, instruction.capture), strict=True)
        else:
            tail = [env[v] for v in d.arc.tail]
            made = [(d.arc.head, tail[0] if d.arc.head in self.unchanged else d.arc.solve(*tail))]
        for v, t in made:
            if v not in kept:
                env[v] = self._as_it_was(v, t)
                if self.watch is not None:
                    self.watch.regenerated(self, d, v, env[v])
        for v in instruction.drop:
            if v not in kept:
                env.pop(v, None)

    def _as_it_was(self, v: int, t: Tensor) -> Tensor:
        """`t` with the strides that the value had in the forward: kernels and what they save depend on them."""
        shape, stride, _ = self.layout[v]
        if self.plan.exact and type(t) is Tensor and t.layout == torch.strided and 0 not in stride:
            return placed(t, shape, stride, self.offsets.get(v, 0))
        return restrided(sharding.spread(t, self.spread[v]), shape, stride)

    def _rerun(self, index: int, env: Env, capture: bool) -> list[Tensor]:
        """The outputs of one operation, run as it was in the forward; what autograd saves goes to `captures`."""
        op, call, surroundings = self.program.ops[index], self.calls[index], self.surroundings.get(index)
        name = f"`{call.name}` ({op.where or 'unknown place'})"
        casts = self.casts or torch.is_autocast_enabled("cpu") or any(_torch.modes())
        if not op.opaque and not capture and not casts:
            return [t.detach() for t in call.invoke(env)]  # arithmetic or layout: nothing around it matters
        inputs = {v: leaf(env[v], self.layout[v][2]) for v in op.ins}
        saved: list[Tensor] = []
        metas: list[tuple[Any, ...]] = []

        def pack(t: Tensor) -> int:
            saved.append(t.detach())
            metas.append((tuple(t.shape), t.dtype))
            return len(saved) - 1

        def unpack(k: int) -> Tensor:  # only an operation that differentiates within itself asks for it
            return saved[k] if saved else _never()

        with contextlib.ExitStack() as stack:
            if surroundings is not None:
                stack.enter_context(surroundings.restored())
            stack.enter_context(settings_of(self.settings))
            stack.enter_context(autocast_of(self.autocast, self.cached))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(saved_tensors_hooks(_torch.uncompiled(pack), _torch.uncompiled(unpack)))
            stack.enter_context(self.sides.compared(index, name))
            outs = [sharding.arrived(t.detach()) for t in call.invoke(inputs)]
        shapes = [self.layout[v][0] for v in op.outs], [tuple(t.shape) for t in outs]
        if (change := changed(self.saved_meta.get(index, []), metas, *shapes)) is not None:
            raise RegenerationError(
                f"{name} did not return the same shapes and save the same"
                f" tensors when it was run again for the backward: {change}. It branches on values that rounding can"
                " flip, or depends on state that changed since. Keep its activations with"
                " `revfx.testing.store_activations()`, or make it deterministic."
            )
        if self.watch is None:  # which compares all itself
            self.samples.compare_results(index, outs, saved, name)
        if capture:
            self.captures[index] = [*saved]
        saved.clear()
        return outs


def _unpack(handle: Handle) -> Tensor:
    return handle.state.fetch(handle)


def _never() -> Tensor:
    raise RegenerationError("the graph of a re-run is never differentiated")

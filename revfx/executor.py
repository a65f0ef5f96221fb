"""Runs a region: its real operations under saved-tensor hooks that free what autograd would keep and regenerate it.

Forward: every tensor that autograd packs becomes a handle (operation, k). Of the values only the region's last cut, its
first cut, side inputs and the cuts that numerics demand stay alive. Backward: the first unpack out of a step drops
everything of the step after it, regenerates this one from the cut above it (each operation once, its saved tensors
captured as it runs) and hands the tensors out. After `torch.utils.checkpoint(use_reentrant=False)`, which keeps each
step's input where this derives it from its output.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from revfx import _torch, numerics, sharding
from revfx.ambient import autocast_of, autocast_states, kernels_of, settings
from revfx.calls import Call
from revfx.cancellation import NOTHING, Sums, sums_of
from revfx.checks import Checksums, Ranges, Samples, changed
from revfx.errors import NotReversibleError, RegenerationError, RevfxWarning
from revfx.layout import ALIGNED, address, leaf, placed, restrided, same_view
from revfx.passes.closure import Derivation, Forward
from revfx.passes.cuts import Step
from revfx.passes.plan import Instruction, asked_for, deep_in_half_precision, images, schedule
from revfx.passes.program import Program
from revfx.passes.regions import Region
from revfx.sides import Sides
from revfx.state import CallState, Random


Env = dict[int, Tensor]


class Watch(Protocol):
    """What looks on while one run of a region goes on."""

    def made(self, run: RegionRun, value: int, tensor: Tensor) -> None:
        """Called with every value that the forward reads or makes."""
        ...

    def regenerated(self, run: RegionRun, derivation: Derivation, value: int, tensor: Tensor) -> None:
        """Called with every value that the backward derives, before anything reads it."""
        ...


_AS_IT_IS = contextlib.nullcontext()
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


@dataclass(frozen=True, slots=True)
class _StepPlan:
    """What the forward does around the operations of one step, found once.

    `sums` are looked at, `asked` values stay until the step ends, `late` ones are let go then, `dead` ones behind each
    operation. `unseen`: nothing that comes back tells of the step. `exits` are the values behind each operation whose
    shapes must be as planned.
    """

    step: Step
    anchored: bool
    sampled: bool
    sums: Sums
    asked: frozenset[int]
    late: tuple[int, ...]
    dead: tuple[tuple[int, ...], ...]
    exits: tuple[tuple[int, ...], ...]


@dataclass(eq=False)
class RegionPlan:
    """A region of a program as one owner runs it, with the schedules made for it so far (one per step, direction and
    need).

    `anchors` are the cuts that are kept as the user wishes, one for every `anchor_every` couplings. `kept` is the
    number of cuts that the latest forward kept, `calls` counts forwards; `warned` is set once drift was warned of,
    `warning` is what the first run has to say, and `lossy` are the steps that were seen to hold a sum which can't be
    undone: calls 1, 2, 4, 8... look.
    """

    program: Program
    region: Region
    tolerance: float | None = None
    anchor_every: int | None = None
    schedules: dict[object, tuple[Instruction, ...]] = field(default_factory=dict[object, tuple[Instruction, ...]])
    step_of: dict[int, int] = field(default_factory=dict[int, int])
    kept: int = 0
    warned: bool = False
    lossy: set[int] = field(default_factory=set[int])
    calls: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        self.anchors = asked_for(self.region.steps, self.anchor_every)
        self.exact = any(v.grid is not None for v in self.program.values)
        self.warning = deep_in_half_precision(self.program, self.region.steps, self.anchors)
        for number, step in enumerate(self.region.steps):
            self.step_of.update(dict.fromkeys(range(step.start, step.stop), number))
        self.steps = [self._step(number, step) for number, step in enumerate(self.region.steps)]

    def _step(self, number: int, step: Step) -> _StepPlan:
        program, last, alive = self.program, self.program.last_use, {*self.program.outputs}
        anchored = number in self.anchors
        sums = NOTHING if number == 0 or anchored else sums_of(program, step)
        asked = frozenset(numerics.asked_of(step) | sums.held)
        ops = [program.ops[i] for i in range(step.start, step.stop)]
        dead = [
            tuple(
                v
                for v in dict.fromkeys((*op.ins, *op.outs))
                if last[v] <= index and not (v in alive or v in asked or program.values[v].source)
            )
            for index, op in enumerate(ops, step.start)
        ]
        exits = [tuple(v for v in op.outs if v in step.exit) for op in ops]
        late = tuple(v for v in asked if last[v] < step.stop)
        sampled = numerics.is_checked(number, len(self.region.steps))
        return _StepPlan(step, anchored, sampled, sums, asked, late, tuple(dead), tuple(exits))


def run_region(plan: RegionPlan, calls: Sequence[Call], env: Env) -> RegionRun:
    """Run the region's operations on the values in `env`, which then holds its last cut, and return the run's state.

    Raises:
        NotReversibleError: an operation wrote to its input in place, or returned another shape or dtype than planned.
    """
    if plan.warning is not None:
        warning, plan.warning = plan.warning, None
        warnings.warn(warning, RevfxWarning, stacklevel=2)
    run = RegionRun(plan, calls, env, next(plan.calls))
    run.forward(env)
    plan.kept = len(run.kept_cuts)
    return run


class RegionRun:
    """One call of a region: what it kept, and the values regenerated for the step that the backward is in.

    Cut c lies before step c; step s goes from cut s to cut s+1. State belongs to the call, so the same module may be
    called several times, from several threads.
    """

    def __init__(self, plan: RegionPlan, calls: Sequence[Call], env: Env, number: int = 1) -> None:
        program, region = plan.program, plan.region
        self.plan, self.program, self.region, self.calls = plan, program, region, calls
        self.states: dict[int, CallState] = {}
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
        self.devices = dict.fromkeys(t.device for t in env.values() if t.device.type != "cpu")
        self.autocast = autocast_states(dict.fromkeys(("cpu", *(d.type for d in self.devices))))
        self.cached = torch.is_autocast_cache_enabled()
        self.settings = settings()
        casting = [torch.finfo(dtype).eps for _, enabled, dtype in self.autocast if enabled]
        self.casts = bool(self.devices or casting)
        self.quiet = _torch.no_modes() if any(self.settings[1]) else _AS_IT_IS  # for what is none of the user's
        eps = max(casting, default=0.0)
        self.samples = Samples(program, eps)
        dtypes = [program.values[v].dtype for v in region.entry]
        self.sides = Sides(0 if plan.exact else number, len(region.steps), dtypes, eps)
        self.looks = number & (number - 1) == 0
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

    # --- forward
    @_torch.uncompiled  # as the re-run will be
    def forward(self, env: Env) -> None:
        """Run the region's operations on `env`, and keep what the plan and the numerics say."""
        program, region, last = self.program, self.region, self.program.last_use
        with self.quiet:
            for v in env:
                self._note(v, env[v])
            self._keep_all(self.kept, [v for v in env if program.values[v].source and last[v] >= region.start], env)
            self._keep_all(self.kept, (*region.side, *region.saved, *region.entry), env)
        self.kept_cuts[0] = {v: self.kept[v] for v in region.entry if v in self.kept}
        growth = numerics.Growth(self.plan.tolerance, self.returns)
        self.unchanged = growth.unchanged
        held = {*region.saved, *region.side}

        @_torch.uncompiled
        def pack(t: Tensor) -> Handle:
            assert self.current is not None, "autograd saved a tensor outside an operation"
            handle = Handle(self.current, len(self.fresh), self, _torch.version(t))
            self.fresh.append((handle, t))
            return handle

        with saved_tensors_hooks(pack, _unpack):
            for number, plan in enumerate(self.plan.steps):
                self._run_forward(number, plan, env, growth, held)
        with self.quiet:
            self.ranges.close()
        self.returns.forget()

    def _run_forward(self, number: int, plan: _StepPlan, env: Env, growth: numerics.Growth, held: set[int]) -> None:
        step, asked = plan.step, plan.asked
        with self.quiet:
            if plan.anchored:
                self._keep_all(self.kept_cuts.setdefault(number, {}), step.entry, env)
            lower = {v: env[v] for v in step.entry} if asked or plan.sums.after else {}
            unseen = plan.anchored or all(a.head in self.kept for a in step.arcs)  # nothing that comes back tells of it
            if plan.sampled:
                self.samples.note(number, self._regenerated(step, env))
            if self.plan.exact and number - 1 in self.kept_cuts:  # the last one of a stretch to come back
                self.checksums.note(number, self._regenerated(step, env))
        lost = False
        for at, index in enumerate(range(step.start, step.stop)):
            made = self.program.ops[index].outs
            outs = self._call(index, env, unseen, plan.exits[at])
            with self.quiet:
                for v, t in zip(made, outs, strict=True):
                    env[v] = t
                    self._note(v, t)
                if held:
                    self._keep_all(self.kept, [v for v in made if v in held], env)
                lost = lost or (self.looks and plan.sums.lose(index, env, self.kept, self.plan.tolerance))
            for v in plan.dead[at]:
                env.pop(v, None)
        if lost:
            self.plan.lossy.add(number)
        with self.quiet:
            lost = number in self.plan.lossy
            unsafe, growing = growth.close(step, env, lower, replayed=number == 0 or plan.anchored, lost=lost)
            if unsafe:
                self._keep_all(self.kept_cuts.setdefault(number, {}), step.entry, lower)
            if growing or number == len(self.plan.steps) - 1:
                self._keep_all(self.kept_cuts.setdefault(number + 1, {}), step.exit, env)
            if plan.sampled:
                self.samples.rescale(number, images(step), env)
        for v in plan.late:
            env.pop(v, None)

    def _regenerated(self, step: Step, env: Env) -> Env:
        """What the backward makes of a step's entry, as the forward made it."""
        return {v: env[v] for v in step.entry if v not in self.kept}

    def _note(self, v: int, t: Tensor) -> None:
        strided = t.layout == torch.strided
        self.layout[v] = (tuple(t.shape), t.stride() if strided else (), t.requires_grad)
        if type(t) is not Tensor:
            self.spread[v] = sharding.spread_of(t)
        elif self.plan.exact and strided and t.data_ptr() % ALIGNED:
            self.offsets[v] = t.data_ptr() % ALIGNED
        if self.plan.exact:
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

    def _call(self, index: int, env: Env, unseen: bool, exits: tuple[int, ...]) -> tuple[Tensor, ...]:
        op, call = self.program.ops[index], self.calls[index]
        outs = self._called(index, env) if op.opaque else self._invoke(call, index, env)
        fresh, self.fresh = self.fresh, []
        for t in outs:
            if not isinstance(t, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"`{call.name}` returned a {type(t).__name__}; it must return one tensor.")
        for v, t in zip(op.outs, outs, strict=True) if exits else ():
            planned = self.program.values[v]
            if v in exits and (t.shape != planned.shape or t.dtype != planned.dtype):
                raise NotReversibleError(
                    f"`{call.name}` ({op.where or 'unknown place'}) returned {t.dtype}{list(t.shape)} where"
                    f" {planned.dtype}{list(planned.shape)} was planned; does a hook change its output?"
                )
        if fresh:
            read = [(v, env[v]) for v in op.ins if v in env]
            self._settle(index, fresh, [*read, *zip(op.outs, outs, strict=True)])
        if op.opaque and (unseen or self.sides.watches(self.plan.step_of[index])):
            with self.quiet:
                saved = [t if handle.value is None else None for handle, t in fresh]
                kept = all(v in self.kept for v in op.ins)
                self.samples.note_results(index, outs if unseen else (), saved, kept)
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
            if self.sides.watches(self.plan.step_of[index]):
                with self.sides.noted(index):
                    outs = self._invoke(call, index, env)
            else:
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
                    f"`{call.name}` ({op.where or 'unknown place'}) writes to its input in place, so the value that"
                    " the next operations read can't be regenerated. Let it work on a copy (`x.clone()`)."
                )
        return outs

    def _settle(self, index: int, fresh: list[tuple[Handle, Tensor]], candidates: list[tuple[int, Tensor]]) -> None:
        """Make each new handle a value where it is one; the tensors were alive until now, so addresses are unique.

        A result that outlives the step is not taken for one: what is kept of it would not be the result of what is
        regenerated, and a backward such as `amax`'s compares the two.
        """
        step = self.plan.step_of[index]
        outs, exit = self.program.ops[index].outs, self.region.steps[step].exit
        known: dict[int, list[tuple[int, Tensor]]] = {}
        for v, t in candidates:
            if (at := address(t)) and not (v in outs and v in exit):
                known.setdefault(at, []).append((v, t))
        metas: list[tuple[Any, ...]] = []
        for handle, t in fresh:
            metas.append((t.shape, t.dtype))
            handle.spoilt = _torch.version(t) != handle.version
            handle.value = next((v for v, other in known.get(address(t), ()) if same_view(t, other)), None)
            if handle.value is not None:
                self.wanted.setdefault(step, set()).add(handle.value)
            else:
                self.captured_ops.setdefault(step, set()).add(index)
        self.saved_meta[index] = metas

    def invert(self, number: int, exit: Env) -> Env:
        """The entry of step `number`, derived from given values of its exit; empty where its entry is kept instead."""
        if number in self.kept_cuts:
            return {}
        with self._as_in_the_forward():
            return dict(self._run_step(number, dict(exit), replay=False, target=False))

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
                self.differs = _torch.kernel_settings() != self.settings[0]
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
        """Make the values and captures of `step`, from the regenerated cut above it or the nearest kept one."""
        active, self.captures = self.active, {}
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
                        self._compare(s)
        except BaseException:
            self.active, self.values, self.captures = None, {}, {}
            raise
        self.active = step

    @contextlib.contextmanager
    def _as_in_the_forward(self) -> Iterator[None]:
        """Return a context for regeneration: the forward's kernels, and none of the user's modes."""
        with kernels_of(self.settings[0]) if self.differs else _AS_IT_IS, torch.no_grad():
            with _torch.no_modes() if any(_torch.modes()) else _AS_IT_IS:
                yield

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
        """Return `t` with the strides that the value had in the forward: kernels and what they save depend on them."""
        shape, stride, _ = self.layout[v]
        if type(t) is Tensor and not self.plan.exact and (t.stride() == stride or t.layout != torch.strided):
            return t
        if self.plan.exact and type(t) is Tensor and t.layout == torch.strided and 0 not in stride:
            return placed(t, shape, stride, self.offsets.get(v, 0))
        return restrided(sharding.spread(t, self.spread.get(v)), shape, stride)

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
            return saved[k] if saved else _never()

        undo = None if state is None else state.put_back()
        try:
            with contextlib.ExitStack() as stack:
                if modes:
                    stack.enter_context(_torch.modes_of(self.settings[1]))
                if casts:
                    stack.enter_context(autocast_of(self.autocast, self.cached))
                if index in self.sides.seen:
                    stack.enter_context(self.sides.compared(index, self._named(index)))
                stack.enter_context(torch.enable_grad())
                stack.enter_context(saved_tensors_hooks(pack, unpack))
                outs = [sharding.arrived(t.detach()) for t in call.invoke(inputs)]
        finally:
            if undo is not None:
                undo()
        shapes = [self.layout[v][0] for v in op.outs], [t.shape for t in outs]
        if (change := changed(self.saved_meta.get(index, []), metas, *shapes)) is not None:
            raise RegenerationError(
                f"{self._named(index)} did not return the same shapes and save the same"
                f" tensors when it was run again for the backward: {change}. It branches on values that rounding can"
                " flip, or depends on state that changed since. Keep its activations with"
                " `revfx.testing.store_activations()`, or make it deterministic."
            )
        if self.watch is None and index in self.samples.results:  # a watch compares all itself
            self.samples.compare_results(index, outs, saved, self._named(index))
        if capture:
            self.captures[index] = [*saved]
        saved.clear()
        return outs

    def _named(self, index: int) -> str:
        return f"`{self.calls[index].name}` ({self.program.ops[index].where or 'unknown place'})"


@_torch.uncompiled
def _unpack(handle: Handle) -> Tensor:
    return handle.state.fetch(handle)


def _never() -> Tensor:
    raise RegenerationError("the graph of a re-run is never differentiated")

"""A model under a plan: the first call of a kind is recorded, and later ones drop saved tensors by the plan."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revfx import _fsdp, _torch
from revfx.ambient import ambient_state, set_variable
from revfx.engine import dispatch
from revfx.engine.learn import Learning
from revfx.engine.native import learner, watcher
from revfx.engine.plan import Plan
from revfx.engine.tape import Tape
from revfx.engine.unit import Unit
from revfx.engine.wrappers import unwrapped
from revfx.errors import Reason, Refusal
from revfx.info import PlanInfo
from revfx.parts import part_observer
from revfx.passes.regions import RegionSummary, summary
from revfx.passes.segments import segments, text
from revfx.plan.blocks import BlockLearning
from revfx.plan.couplings import Couplings, find_couplings
from revfx.plan.declared import CallObserver
from revfx.plan.replays import Unreplayable
from revfx.plan.spans import find_spans
from revfx.plan.units import UnitBuilder


MAX_KINDS = 64  # of calls; the oldest one makes room for a new one
MAX_DEPTH, MAX_VISITED_OBJECTS = 3, 1000  # of a search for tensors in attributes of objects
MAX_TRIES = 2  # to record another path through the forward
BACK_OFF = 2  # factor from one number of calls to the next one, between recordings of a kind of calls


@dataclass
class Kind:
    """Calls of one kind.

    Attributes:
        plan: the units that they are compared with.
        found: the regions of the recorded forward.
        units: the largest number of units that matched in a call.
        matched: the number of units that matched in the latest call.
        kept_cuts: by region, the number of cuts that the latest call kept.
        calls: the number of calls since the recording.
        wait: the number of calls until a call may be recorded again.
        is_due: the next call is recorded again.
        tries: the number of recordings in a row without a new unit: calls may take two paths in turn.
        ends: version counters of the arguments and results of the latest call.
    """

    plan: Plan
    found: Couplings
    units: int
    matched: int = 0
    kept_cuts: dict[int, int] = field(default_factory=dict[int, int])
    calls: int = 0
    wait: int = 0
    is_due: bool = False
    tries: int = 0
    ends: list[tuple[Tensor, int]] = field(default_factory=list[tuple[Tensor, int]])

    @property
    def takes_another_path(self) -> bool:
        """Whether most units did not match, so that the next call that takes this path should be recorded."""
        return 2 * self.matched < self.units and self.tries < MAX_TRIES

    @property
    def info(self) -> PlanInfo:
        """The plan as frozen data."""
        program = self.found.lowered.program
        found: list[RegionSummary] = []
        for number, region in enumerate(self.found.regions):
            found.append(summary(program, region, self.kept_cuts.get(number, 0), region.freed_bytes))
        return PlanInfo(tuple(found), self.text)

    @cached_property
    def text(self) -> str:
        """The program, with the action of the backward for each value."""
        return text(self.found.lowered, segments(self.found.lowered.program, self.found.regions))


class _Active(threading.local):
    """Whether a forward of a planned model runs on this thread; its watcher sees the operators of models inside it."""

    is_active = False


_active = _Active()


@contextlib.contextmanager
def run_plainly_inside() -> Generator[None]:
    """Open a context in which the forwards of planned models run plainly, as parts of a watched forward."""
    before, _active.is_active = _active.is_active, True
    try:
        yield
    finally:
        _active.is_active = before


def is_watched() -> bool:
    """Return whether a forward of a planned model runs on this thread."""
    return _active.is_active


@dataclass
class PlannedModel:
    """The kinds of calls of a model that were recorded so far, each with a plan."""

    lossless: bool = True
    has_parts: bool = False  # compiled ones, which the watcher in Python sees as operators
    kinds: dict[Any, Kind] = field(default_factory=dict[Any, Kind])
    coded_bytes: int = 0  # of the latest forward
    lock: Any = field(default_factory=threading.RLock)

    @property
    def refusals(self) -> list[Refusal]:
        """The places that are left as they were, in all kinds of calls, and the units that have no replay."""
        found: list[Refusal] = []
        for kind in self.kinds.values():
            found += kind.found.refusals
            for reason in kind.plan.reasons:
                where, _, detail = reason.rpartition(": ")
                found.append(Refusal(Reason.NOT_REPLAYED, ("unit",), where, detail))
        return found

    def call(
        self,
        model: nn.Module,
        forward: Callable[..., Any],
        args: Any,
        kwargs: Any,
        on_recorded: Callable[[Kind], None] = lambda _: None,
        name: str = "forward",
    ) -> Any:
        """Run a forward once, and return its result.

        Args:
            model: the model; the plan refers to its modules and parameters.
            forward: its own forward.
            args, kwargs: the arguments.
            on_recorded: called with each kind of calls that is recorded.
            name: the name of the method; each method has its own plans.
        """
        if _active.is_active:
            return forward(*args, **kwargs)
        key = (name, *call_kind(model, pytree.tree_leaves((args, kwargs))))
        kind = self.kinds.get(key)
        if kind is None or kind.is_due:
            with run_plainly_inside(), _fsdp.quiet_gathers(dispatch.unwatched):
                out, kind = self._record(key, model, forward, args, kwargs)
            on_recorded(kind)
            return out
        if not kind.units:
            return forward(*args, **kwargs)  # converted models inside have their own plans
        with run_plainly_inside(), _fsdp.quiet_gathers(dispatch.unwatched):
            return self._watch(kind, forward, args, kwargs)

    def new_watcher(self, plan: Plan) -> Any:
        """Return the watcher of a forward."""
        return watcher(self.has_parts)(plan)

    def new_recorder(self, model: nn.Module, inputs: Sequence[Tensor]) -> Learning:
        """Return the recorder of a forward."""
        return learner(BlockLearning, self.has_parts)(model, inputs)

    def _seeing_parts(self, mode: Any) -> contextlib.AbstractContextManager[None]:
        return set_variable(part_observer, mode) if self.has_parts else contextlib.nullcontext()

    def prepare_tape(self, tape: Tape) -> None:
        """Change a tape that is about to be planned."""

    def _watch(self, kind: Kind, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a forward by its plan."""
        plan = kind.plan
        plan.copies_ends |= any(_torch.version(t) != version for t, version in kind.ends)
        watching = self.new_watcher(plan)
        with watching, self._seeing_parts(watching):
            out = forward(*args, **kwargs)
            ends = tensors_in((args, kwargs, out))
            if plan.copies_ends:
                watching.forward.before_write(ends, ())
        kind.ends = dispatch.version_counters(ends)
        self.coded_bytes = watching.forward.coded_bytes
        kind.kept_cuts = watching.forward.kept_cuts
        self._count_matches(kind, watching.forward.count)
        return out

    def _record(
        self, key: Any, model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[Any, Kind]:
        """Run a forward, and plan the next calls of its kind."""
        inputs = tensors_in((args, kwargs))
        recorder = self.new_recorder(model, inputs)
        with recorder, CallObserver(recorder), self._seeing_parts(recorder):
            out = forward(*args, **kwargs)
        tape = recorder.tape
        self.prepare_tape(tape)
        returned = tensors_in(out)
        tape.returned = list(map(recorder.number, returned))
        recorder.before_write([*inputs, *returned])  # the next call shows whether they are written to
        del recorder
        with self.lock:
            before = self.kinds.get(key)
            plan = Plan(self.lossless) if before is None else before.plan
            known = set(plan.units)
            kind = self._plan(tape, plan)
            kind.ends = dispatch.version_counters([*inputs, *returned])
            tape.forget_tensors()
            _schedule_next(kind, before, has_new_units=not known.issuperset(plan.units))
            self.kinds.pop(key, None)
            self.kinds[key] = kind  # the newest last
            if len(self.kinds) > MAX_KINDS:
                del self.kinds[next(iter(self.kinds))]
        return out, kind

    def _plan(self, tape: Tape, plan: Plan) -> Kind:
        """Add the units of the couplings of a tape to a plan."""
        found = find_couplings(tape, self.lossless)
        if not found.regions:
            return Kind(plan, found, 0)
        units: list[Unit] = []
        chains: list[int] = []
        for span in find_spans(found):
            try:
                units.append(UnitBuilder(tape, span, self.lossless).run())
                chains.append(span.region)
            except Unreplayable as e:
                plan.reasons[str(e)] = None
        plan.learn(units, chains)
        plan.notes_settings |= tape.changes_settings
        return Kind(plan, found, len(units))

    def _count_matches(self, kind: Kind, matched: int) -> None:
        """Count a call; if fewer units matched than before, the next call is recorded again."""
        kind.calls, kind.matched = kind.calls + 1, matched
        if matched < kind.units and kind.calls > kind.wait:
            kind.is_due = True
        kind.units = max(kind.units, matched)


def _schedule_next(kind: Kind, before: Kind | None, has_new_units: bool) -> None:
    """Decide when calls of a kind that was just recorded are recorded again; `before` is its state until now."""
    if before is None:
        kind.is_due = not kind.units  # layers may set themselves up in their first call
    elif kind.units and not has_new_units and before.takes_another_path:
        kind.is_due, kind.tries, kind.wait = True, before.tries + 1, before.wait
    else:
        kind.wait = BACK_OFF * before.wait + 1


def call_kind(model: nn.Module, leaves: Iterable[Any]) -> tuple[Any, ...]:
    """Return the key of a kind of calls: the ambient state, and the leaves of the arguments without their sizes."""
    described: list[Any] = []
    for x in leaves:
        if isinstance(x, Tensor):
            described.append((x.dtype, x.layout, x.dim(), x.requires_grad, x.device))
        else:
            described.append(type(x))
    return model.training, ambient_state(), tuple(described)


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors among arguments or results: in containers, and in attributes of objects, a few levels deep."""
    found: list[Tensor] = []
    todo: list[tuple[Any, int]] = [(tree, MAX_DEPTH)]
    for _ in range(MAX_VISITED_OBJECTS):
        if not todo:
            break
        x, depth = todo.pop()
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple, dict)):
            parts = [*x.values()] if isinstance(x, dict) else x
            todo += [(part, depth) for part in reversed(parts[:MAX_VISITED_OBJECTS])]
        elif depth and hasattr(x, "__dict__") and not isinstance(x, (type, nn.Module)):
            todo += [(part, depth - 1) for part in reversed([*vars(x).values()])]
    return unwrapped(found)

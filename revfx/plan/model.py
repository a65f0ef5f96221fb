"""A model under a plan: it learns in its first call of a kind, and drops by the plan afterwards."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revfx import _fsdp, _torch
from revfx.ambient import ambient_state, given
from revfx.engine import dispatch
from revfx.engine.learn import Learning
from revfx.engine.native import learner, watcher
from revfx.engine.plan import Plan
from revfx.engine.tape import Tape
from revfx.engine.unit import Unit
from revfx.engine.wrappers import unwrapped
from revfx.errors import Reason, Refusal
from revfx.info import PlanInfo
from revfx.parts import looking_on
from revfx.passes.regions import RegionSummary, summary
from revfx.passes.segments import segments, text
from revfx.plan.blocks import BlockLearning
from revfx.plan.couplings import Couplings, find_couplings
from revfx.plan.declared import CallObserver
from revfx.plan.replays import Unreplayable
from revfx.plan.units import UnitBuilder, spans


MAX_KINDS = 64  # of calls; the oldest one makes room for a new one
DEPTH, MOST_VISITED = 3, 1000  # of objects that are looked into for tensors
MOST_TRIES = 2  # to learn another path through the forward
PATIENCE = 2  # times as many calls pass between one time that a kind of call is learnt again and the next one


@dataclass
class Kind:
    """Calls of one kind.

    Attributes:
        plan: the units that they are compared with.
        found: the regions of the forward that it was learnt from.
        units: how many units matched at most.
        matched: how many did in the latest call.
        kept_cuts: by region, how many cuts the latest call kept.
        calls: how many calls there were since it was learnt.
        wait: how many calls have to pass before it is learnt again.
        is_due: the next call is learnt again.
        tries: how many times in a row that brought nothing new: calls may take two paths in turn.
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
        """Whether most units did not match, so that the next call that takes this path should be learnt."""
        return 2 * self.matched < self.units and self.tries < MOST_TRIES

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
    """Whether a forward of a planned model runs on this thread: it sees the operators of those inside of it."""

    is_active = False


_active = _Active()


@contextlib.contextmanager
def seen_whole() -> Generator[None]:
    """Open a context in which the forwards of planned models run as they are, inside of one that is watched."""
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
    """The kinds of calls of a model that were learnt so far, each with a plan."""

    lossless: bool = True
    has_parts: bool = False  # compiled ones, which the watcher in Python sees as operators
    kinds: dict[Any, Kind] = field(default_factory=dict[Any, Kind])
    coded_bytes: int = 0  # of the latest forward
    lock: Any = field(default_factory=threading.RLock)

    @property
    def refusals(self) -> list[Refusal]:
        """The places that are left as they were, of all kinds of calls, and the units that were kept for good."""
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
        learnt: Callable[[Kind], None] = lambda _: None,
        name: str = "forward",
    ) -> Any:
        """Run a forward; it runs once, as it is.

        Args:
            model: the model; the plan refers to its modules and parameters.
            forward: its own forward.
            args, kwargs: its arguments.
            learnt: called with each kind of call that was learnt.
            name: of the method; calls of each have plans of their own.
        """
        if _active.is_active:
            return forward(*args, **kwargs)
        key = (name, *call_kind(model, args, kwargs))
        kind = self.kinds.get(key)
        learns = self.learns(kind)
        if not learns and (kind is None or not kind.units):
            return forward(*args, **kwargs)  # converted models inside have plans of their own
        with seen_whole(), _fsdp.quiet_gathers(dispatch.unwatched):
            if kind is not None and not learns:
                return self._watch(kind, forward, args, kwargs)
            out, kind = self._learn(key, model, forward, args, kwargs)
        learnt(kind)
        return out

    def learns(self, kind: Kind | None) -> bool:
        """Return whether the next call of a kind is learnt."""
        return kind is None or kind.is_due

    def watching(self, plan: Plan) -> Any:
        """Return the watcher of a forward."""
        return watcher(self.has_parts)(plan)

    def learning(self, model: nn.Module, inputs: Sequence[Tensor]) -> Learning:
        """Return the learner of a forward."""
        return learner(BlockLearning, self.has_parts)(model, inputs)

    def _seeing_parts(self, mode: Any) -> contextlib.AbstractContextManager[None]:
        return given(looking_on, mode) if self.has_parts else contextlib.nullcontext()

    def learnt(self, tape: Tape) -> None:
        """Look at a tape that is about to be planned."""

    def _watch(self, kind: Kind, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        plan = kind.plan
        plan.copies_ends |= any(_torch.version(t) != version for t, version in kind.ends)
        watching = self.watching(plan)
        with watching, self._seeing_parts(watching):
            out = forward(*args, **kwargs)
            ends = tensors_in((args, kwargs, out))
            if plan.copies_ends:
                watching.forward.before_write(ends, ())
        kind.ends = dispatch.version_counters(ends)
        self.coded_bytes = watching.forward.coded_bytes
        kind.kept_cuts = watching.forward.kept_cuts
        self._judge(kind, watching.forward.count)
        return out

    def _learn(
        self, key: Any, model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[Any, Kind]:
        inputs = tensors_in((args, kwargs))
        learning = self.learning(model, inputs)
        with learning, CallObserver(learning), self._seeing_parts(learning):
            out = forward(*args, **kwargs)
        tape = learning.tape
        self.learnt(tape)
        returned = tensors_in(out)
        tape.returned = [learning.number(t) for t in returned]
        learning.before_write([*inputs, *returned])  # whether they are shows in the next call
        del learning
        with self.lock:
            before = self.kinds.get(key)
            plan = Plan(self.lossless) if before is None else before.plan
            known = set(plan.units)
            kind = self._plan(tape, plan)
            kind.ends = dispatch.version_counters([*inputs, *returned])
            tape.forget_tensors()
            if before is not None and kind.units and known.issuperset(plan.units) and before.takes_another_path:
                kind.is_due, kind.tries, kind.wait = True, before.tries + 1, before.wait
            elif before is not None:
                kind.wait = PATIENCE * before.wait + 1
            elif not kind.units:
                kind.is_due = True  # layers may set themselves up in their first call
            self.kinds.pop(key, None)
            self.kinds[key] = kind  # the newest last
            if len(self.kinds) > MAX_KINDS:
                del self.kinds[next(iter(self.kinds))]
        return out, kind

    def _plan(self, tape: Tape, plan: Plan) -> Kind:
        found = find_couplings(tape, self.lossless)
        if not found.regions:
            return Kind(plan, found, 0)
        units: list[Unit] = []
        chains: list[int] = []
        for span in spans(found):
            try:
                units.append(UnitBuilder(tape, span, self.lossless).run())
                chains.append(span.region)
            except Unreplayable as e:
                plan.reasons[str(e)] = None
        plan.learn(units, chains)
        plan.notes_settings |= tape.changes_settings
        return Kind(plan, found, len(units))

    def _judge(self, kind: Kind, matched: int) -> None:
        """Have a kind of call learnt again if fewer units matched than before."""
        kind.calls, kind.matched = kind.calls + 1, matched
        if matched < kind.units and kind.calls > kind.wait:
            kind.is_due = True
        kind.units = max(kind.units, matched)


def call_kind(model: nn.Module, args: Any, kwargs: Any) -> tuple[Any, ...]:
    """Return the key of a kind of calls: their surroundings, and their arguments without sizes."""
    described: list[Any] = []
    for x in pytree.tree_leaves((args, kwargs)):
        if isinstance(x, Tensor):
            described.append((x.dtype, x.layout, x.dim(), x.requires_grad, x.device))
        else:
            described.append(type(x))
    return model.training, ambient_state(), tuple(described)


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors among arguments or results: in containers, and in attributes of objects, a few levels deep."""
    found: list[Tensor] = []
    todo: list[tuple[Any, int]] = [(tree, DEPTH)]
    for _ in range(MOST_VISITED):
        if not todo:
            break
        x, depth = todo.pop()
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple, dict)):
            parts = [*x.values()] if isinstance(x, dict) else x
            todo += [(part, depth) for part in reversed(parts[:MOST_VISITED])]
        elif depth and hasattr(x, "__dict__") and not isinstance(x, (type, nn.Module)):
            todo += [(part, depth - 1) for part in reversed([*vars(x).values()])]
    return unwrapped(found)

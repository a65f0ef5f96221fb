"""A model under a plan: it learns in its first call of a kind, and drops by the plan afterwards."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revfx import _torch
from revfx.ambient import ambient_state
from revfx.engine.native import learner, watcher
from revfx.engine.plan import Plan
from revfx.engine.tape import Tape
from revfx.engine.unit import Unit
from revfx.errors import Reason, Refusal
from revfx.info import PlanInfo
from revfx.passes.regions import RegionSummary, summary
from revfx.passes.segments import segments, text
from revfx.plan.blocks import BlockLearning
from revfx.plan.couplings import Couplings, find_couplings
from revfx.plan.declared import CallObserver
from revfx.plan.replays import Unreplayable
from revfx.plan.units import UnitBuilder, spans


MAX_KINDS = 64  # of calls; the oldest one makes room for a new one
PATIENCE = 2  # times as many calls pass between one time that a kind of call is learnt again and the next one


@dataclass
class Kind:
    """Calls of one kind.

    Attributes:
        found: the regions of the forward that it was learnt from.
        units: how many units matched at most.
        matched: how many did in the latest call.
        kept_cuts: by region, how many cuts the latest call kept.
        calls: how many calls there were since it was learnt.
        wait: how many calls have to pass before it is learnt again.
        is_due: the next call is learnt again.
    """

    found: Couplings
    units: int
    matched: int = 0
    kept_cuts: dict[int, int] = field(default_factory=dict[int, int])
    calls: int = 0
    wait: int = 0
    is_due: bool = False

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


@dataclass
class PlannedModel:
    """The plan of a model, and the kinds of calls that it was learnt from."""

    lossless: bool = True
    plan: Plan = field(init=False)
    kinds: dict[Any, Kind] = field(default_factory=dict[Any, Kind])
    coded_bytes: int = 0  # of the latest forward
    _returned: list[tuple[weakref.ref[Tensor], int]] = field(default_factory=list[Any])
    lock: Any = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self.plan = Plan(self.lossless)

    @property
    def refusals(self) -> list[Refusal]:
        """The places that are left as they were, of all kinds of calls, and the units that were kept for good."""
        found: list[Refusal] = []
        for kind in self.kinds.values():
            found += kind.found.refusals
        for reason in self.plan.reasons:
            where, _, detail = reason.rpartition(": ")
            found.append(Refusal(Reason.HIDDEN_STATE, ("unit",), where, detail))
        return found

    def call(
        self,
        model: nn.Module,
        forward: Callable[..., Any],
        args: Any,
        kwargs: Any,
        learnt: Callable[[Kind], None] = lambda _: None,
    ) -> Any:
        """Run a forward; it runs once, as it is.

        Args:
            model: the model; the plan refers to its modules and parameters.
            forward: its own forward.
            args, kwargs: its arguments.
            learnt: called with each kind of call that was learnt.
        """
        if _active.is_active:
            return forward(*args, **kwargs)
        _active.is_active = True
        try:
            return self._call(model, forward, args, kwargs, learnt)
        finally:
            _active.is_active = False

    def _call(
        self, model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any, learnt: Callable[[Kind], None]
    ) -> Any:
        key = self._key(model, args, kwargs)
        kind = self.kinds.get(key)
        if kind is None or kind.is_due:
            out, kind = self._learn(key, model, forward, args, kwargs)
            learnt(kind)
            return out
        if not kind.units:
            return forward(*args, **kwargs)
        for reference, version in self._returned:
            t = reference()
            self.plan.copies_returned |= t is not None and _torch.version(t) != version
        watching = watcher()(self.plan)
        with watching:
            out = forward(*args, **kwargs)
            returned = tensors_in(out)
            if self.plan.copies_returned:
                watching.forward.before_write(returned, ())
        self._returned = [(weakref.ref(t), _torch.version(t)) for t in returned]
        self.coded_bytes = watching.forward.coded_bytes
        kind.kept_cuts = watching.forward.kept_cuts
        self._judge(kind, watching.forward.count)
        return out

    def _key(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        described: list[Any] = []
        for x in leaves:
            if isinstance(x, Tensor):
                described.append((x.dtype, x.layout, x.dim(), x.requires_grad, x.device))
            else:
                described.append(type(x))
        return model.training, ambient_state(), tuple(described)

    def _learn(
        self, key: Any, model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[Any, Kind]:
        inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        learning = learner(BlockLearning)(model, inputs)
        with learning, CallObserver(learning):
            out = forward(*args, **kwargs)
        tape = learning.tape
        returned = tensors_in(out)
        tape.returned = [learning.number(t) for t in returned]
        self._returned = [(weakref.ref(t), _torch.version(t)) for t in returned]
        del learning
        with self.lock:
            before = self.kinds.get(key)
            kind = self._plan(tape)
            tape.constants.clear()
            if before is not None:
                kind.wait = PATIENCE * before.wait + 1
            elif not kind.units:
                kind.is_due = True  # layers may set themselves up in their first call
            self.kinds.pop(key, None)
            self.kinds[key] = kind  # the newest last
            if len(self.kinds) > MAX_KINDS:
                del self.kinds[next(iter(self.kinds))]
        return out, kind

    def _plan(self, tape: Tape) -> Kind:
        found = find_couplings(tape, self.lossless)
        if not found.regions:
            return Kind(found, 0)
        units: list[Unit] = []
        chains: list[int] = []
        for span in spans(found):
            try:
                units.append(UnitBuilder(tape, span, self.lossless).run())
                chains.append(span.region)
            except Unreplayable as e:
                self.plan.reasons[str(e)] = None
        self.plan.learn(units, chains)
        self.plan.notes_settings |= tape.changes_settings
        return Kind(found, len(units))

    def _judge(self, kind: Kind, matched: int) -> None:
        """Have a kind of call learnt again if fewer units matched than before."""
        kind.calls, kind.matched = kind.calls + 1, matched
        if matched < kind.units and kind.calls > kind.wait:
            kind.is_due = True
        kind.units = max(kind.units, matched)


def tensors_in(tree: Any, depth: int = 3) -> list[Tensor]:
    """Return the tensors in a result: in containers, and in attributes of objects, a few levels deep."""
    found: list[Tensor] = []
    for x in pytree.tree_leaves(tree):
        if isinstance(x, Tensor):
            found.append(x)
        elif depth and hasattr(x, "__dict__") and not isinstance(x, (type, nn.Module)):
            found += tensors_in([*vars(x).values()], depth - 1)
    return found

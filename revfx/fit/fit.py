"""A model with a budget: plans by kind of call, what they stand on, and steps under them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from revfx import _torch
from revfx.eager.modes import is_simulating, runs_plain
from revfx.errors import BudgetError
from revfx.fit.budget import Budget
from revfx.fit.choose import Planner
from revfx.fit.costs import Costs
from revfx.fit.holders import holders
from revfx.fit.needs import Needs
from revfx.fit.numbers import Numbers, differing
from revfx.fit.plan import Plan
from revfx.fit.record import record
from revfx.fit.simulate import Load
from revfx.fit.step import Course, Step, sources_of
from revfx.units import size


MOST_PLANS = 16  # per model; the oldest one makes room for a new one


@dataclass(frozen=True)
class Call:
    """Arguments, their leaves, and what tells kinds of calls apart."""

    args: Any
    kwargs: Any
    leaves: Sequence[Any]
    key: Any


@dataclass(frozen=True)
class Ways:
    """How to run a forward: plainly, or with what is reversible in it, if anything is."""

    runs: Mapping[str, Callable[..., Any]]
    is_reversible: Callable[[], bool]


_inside: ContextVar[bool] = ContextVar("revfx_fitting", default=False)


def may_fit(leaves: Sequence[Any]) -> bool:
    """Return whether a call is a step of training with ordinary tensors, on which nobody else has hooks: not a part of
    another model with a budget, which knows of it.
    """
    tensors = [t for t in leaves if isinstance(t, Tensor)]
    busy = _inside.get() or is_simulating() or _torch.has_saved_tensors_hooks()
    return not busy and not runs_plain(tensors)


@dataclass(frozen=True)
class Fitted:
    """A plan for one way to run the forward, of the calls of one kind as long as `numbers` hold; `course` is None where
    autograd keeps what it keeps.
    """

    key: Any
    numbers: Numbers
    way: str
    plan: Plan
    load: Load
    plain: int  # bytes at the peak of the plain model's step
    barred: frozenset[int]  # operators that are given other numbers from call to call
    course: Course | None


class Fit:
    """What is known of a model that trains within a budget."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.costs = Costs()
        self.plans: list[Fitted] = []
        self.lock = threading.RLock()

    def call(self, model: nn.Module, ways: Ways, call: Call) -> Any:
        """Return what the model returns, under the plan for calls of this kind; it is made now if there is none.

        Raises:
            BudgetError: no plan stays within the budget.
        """
        fitted = self.prepare(model, ways, call)
        run = ways.runs[fitted.way]
        if fitted.course is None:
            return run(*call.args, **call.kwargs)
        step = Step(fitted.course, sources_of(fitted.plan, model, call.leaves))
        token = _inside.set(True)
        try:
            with saved_tensors_hooks(step.pack, step.unpack):
                return run(*call.args, **call.kwargs)
        finally:
            _inside.reset(token)
            step.end()
            if step.moved:
                with self.lock:
                    self.plans = [f for f in self.plans if f is not fitted]

    def prepare(self, model: nn.Module, ways: Ways, call: Call) -> Fitted:
        """Return the plan for a call."""
        with self.lock:
            alike = [f for f in reversed(self.plans) if f.key == call.key]
            fitted = next((f for f in alike if f.numbers.hold(call.leaves)), None)
            if fitted is None:
                fitted = self._choose(model, ways, call, alike[0] if alike else None)
                self.plans = [*self.plans[1 - MOST_PLANS :], fitted]
            return fitted

    def _choose(self, model: nn.Module, ways: Ways, call: Call, before: Fitted | None) -> Fitted:
        numbers = Numbers.of(model, call.leaves)
        found: list[Fitted] = []
        planners: list[Planner] = []
        first = 0.0
        for way in ("plain", "reversible") if ways.is_reversible() else ("plain",):
            tape = record(model, ways.runs[way], call.args, call.kwargs)
            costs = self.costs.of(tape)
            barred = frozenset[int]()
            if before is not None and before.way == way and (other := differing(before.plan.needs.tape, tape)):
                barred, numbers = before.barred | other, numbers.common(before.numbers)
            planner = Planner(Needs(tape, barred), costs)
            planners.append(planner)
            seconds = sum(c.seconds for c in costs)
            first = first or seconds
            plain = planners[0].plain[1].peak
            best = planner.best(planner.bytes_of(self.budget, planners[0])) if self.budget.share != 1 else planner.plain
            if best is not None:
                load = replace(best[1], seconds=best[1].seconds + seconds - first)
                course = Course(best[0]) if best[0].dropped or best[0].signs else None
                found.append(Fitted(call.key, numbers, way, best[0], load, plain, barred, course))
                if course is None:
                    break
        if not found:
            raise BudgetError(self._infeasible(type(model).__name__, planners))
        return min(found, key=lambda f: f.load.seconds)

    def _infeasible(self, name: str, planners: Sequence[Planner]) -> str:
        plain = planners[0].plain[1].peak
        for planner in planners:
            planner.bytes_of(Budget("", bytes=1), planners[0])
        planner = min(planners, key=lambda p: p.least()[1].peak)
        plan, load = planner.least()
        held = "\n  ".join(str(h) for h in holders(planner.model, plan, load)[:3])
        budget, share = self.budget.of(plain), self.budget.share
        asked = size(budget) if share is None else f"{share:.0%} of {size(plain)}, {size(budget)}"
        return (
            f"`convert({name}, {self.budget.text})`: no plan stays within {asked}. The least feasible budget is"
            f" {load.peak} bytes ({size(load.peak)}, {load.peak / plain:.1%} of the plain model's {size(plain)}). Its"
            f" peak is held by\n  {held}"
        )

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
from revfx.fit.plan import Plan
from revfx.fit.record import record
from revfx.fit.simulate import Load
from revfx.fit.step import Course, Step, sources_of
from revfx.units import size


MOST_PLANS = 16  # per model; the oldest one makes room for a new one

Run = Callable[..., Any]
Ways = Callable[[], Mapping[str, Run]]
_inside: ContextVar[bool] = ContextVar("revfx_fitting", default=False)


def may_fit(leaves: Sequence[Any]) -> bool:
    """Return whether a call is a step of training with ordinary tensors, on which nobody else has hooks: not a part of
    another model with a budget, which knows of it.
    """
    tensors = [t for t in leaves if isinstance(t, Tensor)]
    busy = _inside.get() or is_simulating() or _torch.has_saved_tensors_hooks()
    return not busy and not runs_plain(tensors)


@dataclass
class Fitted:
    """A plan for one way to run the forward, with the numbers in Python that it stands on."""

    run: Run
    way: str
    plan: Plan
    load: Load
    plain: int  # bytes
    numbers: list[tuple[dict[str, Any], str, Any]]
    flags: list[tuple[nn.Parameter, bool]]
    course: Course | None

    def holds(self) -> bool:
        """Return whether modules have the numbers, and parameters need gradients, as when it was made."""
        return all([t.get(name) == n for t, name, n in self.numbers]) and all(
            [p.requires_grad == f for p, f in self.flags]
        )


class Fit:
    """What is known of a model that trains within a budget."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.costs = Costs()
        self.plans: list[tuple[Any, Fitted]] = []
        self.lock = threading.RLock()

    def call(self, model: nn.Module, ways: Ways, args: Any, kwargs: Any, leaves: Sequence[Any], key: Any) -> Any:
        """Return what the model returns, under the plan for calls of this kind; it is made now if there is none.

        `ways` gives those to run its forward, the plain one first; `key` tells kinds of calls apart.

        Raises:
            BudgetError: no plan stays within the budget.
        """
        fitted = self.prepare(model, ways, args, kwargs, key)
        if fitted.course is None:
            return fitted.run(*args, **kwargs)
        step = Step(fitted.course, sources_of(fitted.plan, model, leaves))
        token = _inside.set(True)
        try:
            with saved_tensors_hooks(step.pack, step.unpack):
                result = fitted.run(*args, **kwargs)
        finally:
            _inside.reset(token)
            step.end()
        if step.moved:
            with self.lock:
                self.plans = [(k, f) for k, f in self.plans if f is not fitted]
        return result

    def prepare(self, model: nn.Module, ways: Ways, args: Any, kwargs: Any, key: Any) -> Fitted:
        """Return the plan for calls of a kind."""
        with self.lock:
            for known, fitted in reversed(self.plans):
                if known == key and fitted.holds():
                    return fitted
            if len(self.plans) >= MOST_PLANS:
                del self.plans[0]
            fitted = self._choose(model, ways(), args, kwargs)
            self.plans.append((key, fitted))
            return fitted

    def _choose(self, model: nn.Module, ways: Mapping[str, Run], args: Any, kwargs: Any) -> Fitted:
        numbers = [
            (vars(m), name, n) for m in model.modules() for name, n in vars(m).items() if isinstance(n, (float, bool))
        ]
        flags = [(p, p.requires_grad) for p in model.parameters()]
        found: list[Fitted] = []
        planners: list[Planner] = []
        first = 0.0
        for way, run in ways.items():
            tape = record(model, run, args, kwargs)
            costs = self.costs.of(tape)
            planner = Planner(Needs(tape), costs)
            planners.append(planner)
            seconds = sum(c.seconds for c in costs)
            first = first or seconds
            plain = planners[0].plain[1].peak
            best = planner.best(planner.bytes_of(self.budget, planners[0])) if self.budget.share != 1 else planner.plain
            if best is not None:
                load = replace(best[1], seconds=best[1].seconds + seconds - first)
                course = Course(best[0]) if best[0].dropped or best[0].signs else None
                found.append(Fitted(run, way, best[0], load, plain, numbers, flags, course))
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

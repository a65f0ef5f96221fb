"""A model with a budget: plans by kind of call, what they stand on, and steps under them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from revfx import _torch
from revfx.ambient import given
from revfx.errors import BudgetWarning, RevfxError, name_of, warn
from revfx.fit.budget import Budget
from revfx.fit.choose import Planner
from revfx.fit.costs import Costs
from revfx.fit.messages import shapes_of, warn_of_losses, warn_of_miss
from revfx.fit.meter import Meter
from revfx.fit.needs import Needs
from revfx.fit.numbers import Numbers, differing
from revfx.fit.record import record
from revfx.fit.step import Course, Step
from revfx.fit.summary import summarize
from revfx.fit.survey import Chosen, Survey
from revfx.fit.tape import Tape
from revfx.info import BudgetPlan
from revfx.modes import is_simulating, runs_plain
from revfx.parts import looking_on
from revfx.units import size


LOG = logging.getLogger("revfx")
MOST_PLANS = 16  # per model; the oldest one makes room for a new one
WANDERS = 4  # calls that went another way than planned, and a quarter of all, until no more plans are made


@dataclass(frozen=True)
class Call:
    """A call of a model: arguments, their leaves, the key of calls of this kind, and how to run the forward: plainly,
    or with what is reversible in it, if anything is.
    """

    args: Any
    kwargs: Any
    leaves: Sequence[Any]
    key: Any
    runs: Mapping[str, Callable[..., Any]]
    is_reversible: Callable[[], bool]

    def run(self, way: str) -> Any:
        """Run the forward."""
        return self.runs[way](*self.args, **self.kwargs)


def may_fit(leaves: Sequence[Any]) -> bool:
    """Return whether a call is a step of training with ordinary tensors, on which nobody else has hooks: not a part of
    another model with a budget, which knows of it.
    """
    tensors = [t for t in leaves if isinstance(t, Tensor)]
    if looking_on.get() is not None or is_simulating() or runs_plain(tensors):
        return False
    if _torch.has_saved_tensors_hooks():
        warn(
            "hooks on saved tensors, such as those of a checkpoint, are active around a model with a budget. It runs"
            " plainly, and the budget is not kept. Remove the hooks, or convert the outer model that they are around.",
            BudgetWarning,
        )
        return False
    return True


@dataclass(frozen=True)
class Fitted:
    """A plan for one way to run the forward, of the calls of one kind as long as `numbers` hold; `course` is None where
    autograd keeps what it keeps. `suspects`: operators of which some gave another value when they ran again.
    """

    key: Any
    numbers: Numbers
    chosen: Chosen
    barred: frozenset[int]  # operators whose numbers or results were others in another call
    device: torch.device
    course: Course | None
    summary: BudgetPlan
    suspects: frozenset[int] = frozenset()


def alike_tapes(plans: Sequence[Fitted], way: str, tape: Tape) -> list[tuple[Fitted, frozenset[int]]]:
    """Return the plans of one way whose tapes differ from a new one in numbers alone, and the operators that do."""
    found = [(f, differing(f.chosen.plan.needs.tape, tape)) for f in plans if way == "plain"]
    return [(f, other) for f, other in found if other is not None]


class Unrecorded(RevfxError):
    """A step can't be recorded, because of another exception, its cause."""


class Fit:
    """What is known of a model that trains within a budget."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.costs = Costs()
        self.plans: list[Fitted] = []
        self.failed: list[Fitted] = []  # plans under which a value was another one when it was computed again
        self.unrecorded: list[tuple[Any, Numbers]] = []  # kinds of calls that can't be recorded
        self.lock = threading.RLock()
        self.calls = self.moves = 0
        self.wanders = False

    @property
    def budget_plans(self) -> tuple[BudgetPlan, ...]:
        """Return summaries of the plans, oldest first; print them."""
        with self.lock:
            return tuple([f.summary for f in self.plans])

    def call(self, model: nn.Module, call: Call) -> Any:
        """Return what the model returns, under the plan for calls of this kind; it is made now if there is none.

        Raises:
            BudgetError: no plan stays within the budget.

        Warns:
            BudgetWarning: it can't be recorded, or went another way than when it was recorded, so more was kept.
        """
        if self.wanders or any(key == call.key and numbers.hold(call.leaves) for key, numbers in self.unrecorded):
            return call.run("plain")
        try:
            fitted = self.prepare(model, call)
        except Unrecorded as e:
            fitted = e
        if isinstance(fitted, Unrecorded):  # outside of the `except`: the model's own error is no consequence of it
            result = call.run("plain")
            with self.lock:
                self.unrecorded = [*self.unrecorded[1 - MOST_PLANS :], (call.key, Numbers.of(model, call.leaves))]
            warn(
                f"{fitted}. It runs plainly, and the budget is not kept. Convert sub-modules that can be recorded"
                " instead.",
                BudgetWarning,
            )
            return result
        if fitted.course is None:
            return call.run("plain")
        most = replace(self.budget, less=0).of(fitted.summary.plain)
        meter = Meter(model, fitted.device, most, partial(self._missed, name_of(model)))
        step = Step(fitted.course, model, call.leaves, meter, partial(self._failed, fitted))
        try:
            with given(looking_on, step), saved_tensors_hooks(step.pack, step.unpack):
                result = call.run("plain")
        finally:
            step.end()
        self.calls += 1
        if step.moved:
            self._moved(name_of(model), fitted)
        return result

    def _missed(self, name: str, over: int) -> None:
        with self.lock:
            self.budget, self.plans = replace(self.budget, less=self.budget.less + over), []
        warn_of_miss(name, self.budget, over)

    def _failed(self, fitted: Fitted, suspects: frozenset[int]) -> None:
        """Drop a plan under which some of these operators gave other values: later plans never run them again."""
        with self.lock:
            self.plans = [f for f in self.plans if f is not fitted]
            failed = replace(fitted, suspects=suspects, course=None)
            self.failed = [*self.failed[1 - MOST_PLANS :], failed]

    def _moved(self, name: str, fitted: Fitted) -> None:
        with self.lock:
            self.plans = [f for f in self.plans if f is not fitted]
            self.moves += 1
            self.wanders = self.moves >= max(WANDERS, self.calls / 4)
        then = "The next call records it again. If this repeats, convert only sub-modules that always take one path"
        if self.wanders:
            then = "This happens often, so the model runs plainly now. Convert sub-modules that always take one path"
        warn(
            f"`convert({name}, {self.budget.text})`: the forward took another path than the recorded one, and all"
            f" that followed was kept. {then}.",
            BudgetWarning,
        )

    def prepare(self, model: nn.Module, call: Call) -> Fitted:
        """Return the plan for a call."""
        with self.lock:
            alike = [f for f in reversed(self.plans) if f.key == call.key]
            fitted = next((f for f in alike if f.numbers.hold(call.leaves)), None)
            if fitted is None:
                failed = [f for f in reversed(self.failed) if f.key == call.key]
                fitted = self._choose(model, call, [*alike[:1], *failed])
                self.plans = [*self.plans[1 - MOST_PLANS :], fitted]
            return fitted

    def _choose(self, model: nn.Module, call: Call, before: Sequence[Fitted]) -> Fitted:
        """Return a new plan; earlier ones (`before`) show which operators vary, and which numbers stay."""
        start = time.perf_counter()
        survey = self.survey(model, call, before)
        chosen = survey.best(self.budget)
        name, inputs, asked = (
            name_of(model),
            shapes_of([t for t in call.leaves if isinstance(t, Tensor)]),
            self.budget.of(survey.peak),
        )
        if chosen is None and not any(f.suspects for f in before):
            raise survey.refusal(name, inputs, self.budget, "The step did not run, and nothing was changed.")
        if chosen is None:  # the training has begun: it goes on
            chosen = survey.least()
            warn(
                f"`convert({name}, {self.budget.text})`: results that differ from step to step are kept now, and no"
                f" plan stays within the budget. A step takes up to {size(chosen.load.peak)}. Pass numbers that change"
                " as tensors: arguments or buffers.",
                BudgetWarning,
            )
        most = chosen.model.load(chosen.plan).peak
        if self.budget.share is None and most > asked:
            warn_of_losses(name, self.budget, most)
        plan = summarize(survey, chosen, f"{name}, {inputs}", asked, time.perf_counter() - start)
        LOG.info("%s", plan.line)
        devices = (t.device for t in (*model.parameters(), *call.leaves) if isinstance(t, Tensor))
        course = Course(chosen.plan) if chosen.plan.dropped or chosen.plan.marks else None
        alike = alike_tapes(before, "plain", chosen.plan.needs.tape)
        numbers = alike[0][0].numbers.common(model, call.leaves) if alike else Numbers.of(model, call.leaves)
        device = next(devices, torch.device("cpu"))
        return Fitted(call.key, numbers, chosen, chosen.plan.needs.barred, device, course, plan)

    def survey(self, model: nn.Module, call: Call, before: Sequence[Fitted] = ()) -> Survey:
        """Return planners for a call; operators that varied between earlier ones (`before`) don't run again.

        Raises:
            Unrecorded: the forward can't be recorded, or raises.
        """

        def planner(way: str) -> Planner:
            try:
                tape = record(model, call.runs[way], call.args, call.kwargs)
            except Exception as e:
                what = f"a step of it can't be recorded: {type(e).__name__}: {str(e).strip().rstrip('.')}"
                raise Unrecorded(f"`convert({name_of(model)}, {self.budget.text})`: {what}") from e
            costs = self.costs.of(tape)
            # A number that differs explains why a plan failed; else all suspects are barred.
            barred = [f.barred | (other or f.suspects) for f, other in alike_tapes(before, way, tape)]
            return Planner(Needs(tape, frozenset().union(*barred)), costs, any_caller=True)

        return Survey(planner("plain"))

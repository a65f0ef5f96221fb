"""A model with a budget: plans by kind of call, what they stand on, and steps under them."""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from revfx import _torch
from revfx.ambient import given
from revfx.capture.guards import name_of
from revfx.eager.modes import is_simulating, runs_plain
from revfx.errors import RevfxError, RevfxWarning
from revfx.fit.budget import Budget, as_memory
from revfx.fit.choose import LOSS, Planner
from revfx.fit.compiled import active_step
from revfx.fit.costs import Costs
from revfx.fit.meter import Meter
from revfx.fit.needs import Needs
from revfx.fit.numbers import Numbers, differing
from revfx.fit.record import record
from revfx.fit.step import Course, Step
from revfx.fit.summary import BudgetPlan, summarize
from revfx.fit.survey import Chosen, Survey
from revfx.fit.tape import Tape
from revfx.units import size


Varying = Callable[[str, Tape], frozenset[int]]  # by way and tape, operators that are given other numbers each time

LOG = logging.getLogger("revfx")
MOST_PLANS = 16  # per model; the oldest one makes room for a new one
WANDERS = 4  # calls that went another way than planned, and a quarter of all, until no more plans are made


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


def shapes_of(leaves: Sequence[Any]) -> str:
    """Return the shapes of the tensors among some arguments as text, such as "inputs (8, 512), (8, 512)"."""
    found = [str(tuple(t.shape)) for t in leaves if isinstance(t, Tensor)]
    return f"inputs {', '.join(found)}" if found else "no inputs"


def may_fit(leaves: Sequence[Any]) -> bool:
    """Return whether a call is a step of training with ordinary tensors, on which nobody else has hooks: not a part of
    another model with a budget, which knows of it.
    """
    tensors = [t for t in leaves if isinstance(t, Tensor)]
    if active_step.get() is not None or is_simulating() or runs_plain(tensors):
        return False
    if _torch.has_saved_tensors_hooks():
        what = "hooks on what autograd saves are active around a model with a budget, such as those of a checkpoint"
        warnings.warn(f"{what}: it runs plainly, and the budget is not kept.", RevfxWarning, stacklevel=7)
        return False
    return True


@dataclass(frozen=True)
class Fitted:
    """A plan for one way to run the forward, of the calls of one kind as long as `numbers` hold; `course` is None where
    autograd keeps what it keeps.
    """

    key: Any
    numbers: Numbers
    chosen: Chosen
    plain: int  # bytes at the peak of the plain model's step
    barred: frozenset[int]  # operators whose numbers or results were others in another call
    device: torch.device
    course: Course | None
    summary: BudgetPlan


class Unrecorded(RevfxError):
    """A step can't be recorded, because of `error`."""

    def __init__(self, text: str, error: Exception) -> None:
        super().__init__(text)
        self.error = error


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

    def call(self, model: nn.Module, ways: Ways, call: Call) -> Any:
        """Return what the model returns, under the plan for calls of this kind; it is made now if there is none.

        Raises:
            BudgetError: no plan stays within the budget.

        Warns:
            RevfxWarning: it went another way than when it was recorded, so more was kept.
        """
        if self.wanders or self._is_unrecorded(call):
            return ways.runs["plain"](*call.args, **call.kwargs)
        unrecorded: Unrecorded | None = None
        fitted: Fitted | None = None
        try:
            fitted = self.prepare(model, ways, call)
        except Unrecorded as e:
            unrecorded = e
        if fitted is None:  # outside of the `except`, for the model's own error not to be a consequence of that one
            result = ways.runs["plain"](*call.args, **call.kwargs)
            self._run_plainly(model, call, unrecorded)
            return result
        run = ways.runs[fitted.chosen.way]
        if fitted.course is None:
            return run(*call.args, **call.kwargs)
        most = replace(self.budget, less=0).of(fitted.plain)
        meter = Meter(model, fitted.device, most, partial(self._missed, name_of(model)))
        step = Step(fitted.course, model, call.leaves, meter, partial(self._failed, fitted))
        try:
            with given(active_step, step), saved_tensors_hooks(step.pack, step.unpack):
                result = run(*call.args, **call.kwargs)
        finally:
            step.end()
        self.calls += 1
        if step.moved:
            self._moved(name_of(model), fitted)
        return result

    def _missed(self, name: str, over: int) -> None:
        with self.lock:
            self.budget, self.plans = replace(self.budget, less=self.budget.less + over), []
        what = f"a step took {size(over)} more than its budget, as the allocator counts"
        then = "the next one is planned for less"
        warnings.warn(f"`convert({name}, {self.budget.text})`: {what}: {then}.", RevfxWarning, stacklevel=2)

    def ready(self, model: nn.Module, ways: Ways, call: Call) -> None:
        """Make the plan for a call.

        Raises:
            BudgetError: no plan stays within the budget.
            Exception: whatever the model raises.
        """
        unrecorded: Unrecorded | None = None
        try:
            self.prepare(model, ways, call)
        except Unrecorded as e:
            unrecorded = e
        if unrecorded is not None and not isinstance(unrecorded.error, RevfxError):
            raise unrecorded.error
        if unrecorded is not None:
            self._run_plainly(model, call, unrecorded)

    def _is_unrecorded(self, call: Call) -> bool:
        return any(key == call.key and numbers.hold(call.leaves) for key, numbers in self.unrecorded)

    def _run_plainly(self, model: nn.Module, call: Call, why: Unrecorded | None) -> None:
        """Have calls of this kind run plainly from now on."""
        with self.lock:
            self.unrecorded = [*self.unrecorded[1 - MOST_PLANS :], (call.key, Numbers.of(model, call.leaves))]
        then = "It runs plainly, and the budget is not kept. Convert sub-modules that can be recorded instead"
        warnings.warn(f"{why}. {then}.", RevfxWarning, stacklevel=8)

    def _failed(self, fitted: Fitted, varied: frozenset[int]) -> None:
        """Drop a plan under which these operators gave other values: later plans never run them again."""
        with self.lock:
            self.plans = [f for f in self.plans if f is not fitted]
            failed = replace(fitted, barred=fitted.barred | varied, course=None)
            self.failed = [*self.failed[1 - MOST_PLANS :], failed]

    def _moved(self, name: str, fitted: Fitted) -> None:
        with self.lock:
            self.plans = [f for f in self.plans if f is not fitted]
            self.moves += 1
            self.wanders = self.moves >= max(WANDERS, self.calls / 4)
        what = "went another way than the one that was recorded, so what came after was kept"
        then = "it is recorded anew at its next call"
        if self.wanders:
            then = "that happens again and again, so it runs plainly from now on: convert sub-modules that go one way"
        warnings.warn(f"`convert({name}, {self.budget.text})`: a forward {what}; {then}.", RevfxWarning, stacklevel=8)

    def prepare(self, model: nn.Module, ways: Ways, call: Call) -> Fitted:
        """Return the plan for a call."""
        with self.lock:
            alike = [f for f in reversed(self.plans) if f.key == call.key]
            fitted = next((f for f in alike if f.numbers.hold(call.leaves)), None)
            if fitted is None:
                failed = [f for f in reversed(self.failed) if f.key == call.key]
                fitted = self._choose(model, ways, call, [*alike[:1], *failed])
                self.plans = [*self.plans[1 - MOST_PLANS :], fitted]
            return fitted

    def _choose(self, model: nn.Module, ways: Ways, call: Call, before: Sequence[Fitted]) -> Fitted:
        """Return a new plan; earlier ones (`before`) show which operators vary, and which numbers stay."""
        start = time.perf_counter()
        numbers: Numbers | None = None
        barred: dict[str, frozenset[int]] = {"plain": frozenset(), "reversible": frozenset()}

        def varying(way: str, tape: Tape) -> frozenset[int]:
            nonlocal numbers
            for f in before:
                if f.chosen.way == way and (other := differing(f.chosen.plan.needs.tape, tape)) is not None:
                    barred[way] |= f.barred | other
                    numbers = numbers or f.numbers.common(model, call.leaves)
            return barred[way]

        survey = self.survey(model, ways, call, varying)
        chosen = survey.best(self.budget)
        name, inputs, asked = name_of(model), shapes_of(call.leaves), self.budget.of(survey.peak)
        if chosen is None:
            raise survey.refusal(name, inputs, self.budget)
        most = survey.peak_of_any_caller(chosen)
        if self.budget.share is None and most > asked:
            self._warn_of_losses(name, most)
        plan = summarize(survey, chosen, name, inputs, asked, time.perf_counter() - start)
        LOG.info("%s", plan.line)
        devices = (t.device for t in (*model.parameters(), *call.leaves) if isinstance(t, Tensor))
        course = Course(chosen.plan) if chosen.plan.dropped or chosen.plan.marks else None
        numbers = numbers or Numbers.of(model, call.leaves)
        device = next(devices, torch.device("cpu"))
        return Fitted(call.key, numbers, chosen, survey.peak, barred[chosen.way], device, course, plan)

    def _warn_of_losses(self, name: str, most: int) -> None:
        what = "the plan stays within the budget only for a loss that takes little memory"
        much = f"With one that takes {LOSS} times the outputs a step takes up to {size(most)}"
        todo = f'Compute the loss in the forward, or give `memory="{as_memory(most)}"`'
        warnings.warn(f"`convert({name}, {self.budget.text})`: {what}. {much}. {todo}.", RevfxWarning, stacklevel=10)

    def survey(self, model: nn.Module, ways: Ways, call: Call, varying: Varying | None = None) -> Survey:
        """Return planners for a call, whose `varying` operators don't run again.

        Raises:
            Unrecorded: the forward can't be recorded, or raises.
        """

        def planner(way: str) -> Planner:
            try:
                tape = record(model, ways.runs[way], call.args, call.kwargs)
            except Exception as e:
                what = f"a step of it can't be recorded: {type(e).__name__}: {str(e).strip().rstrip('.')}"
                raise Unrecorded(f"`convert({name_of(model)}, {self.budget.text})`: {what}", e) from e
            needs = Needs(tape, frozenset() if varying is None else varying(way, tape))
            return Planner(needs, self.costs.of(tape), any_caller=True)

        @cache
        def reversible() -> Planner | None:
            with suppress(RevfxError):
                return planner("reversible") if ways.is_reversible() else None

        return Survey(planner("plain"), reversible)

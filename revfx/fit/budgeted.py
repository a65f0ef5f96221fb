"""A model with a budget: the first step of each kind of call is recorded as it runs, later steps follow a plan."""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revfx import _fsdp, _torch
from revfx.ambient import set_variable
from revfx.engine import dispatch
from revfx.engine.native import learner, watcher
from revfx.engine.plan import NEVER, Plan
from revfx.errors import BudgetError, Reason, Refusal, name_of
from revfx.fit.budget import Budget
from revfx.fit.costs import Costs, sizes_depend_on_data
from revfx.fit.grouping import RecordedStep
from revfx.fit.inverted import InvertedSteps
from revfx.fit.kinds import BudgetKind, PlainForward, count_elements, covers, sizes_of
from revfx.fit.learning import StepLearning
from revfx.fit.make_units import fallback_units, units_of
from revfx.fit.messages import (
    about_checkpoints,
    noting_out_of_memory,
    shapes_of,
    warn_of_blocks,
    warn_of_gathered_part,
    warn_of_hooks,
    warn_of_least,
    warn_of_losses,
    warn_of_miss,
    warn_of_ways,
)
from revfx.fit.meter import Meter
from revfx.fit.needs import Needs
from revfx.fit.planner import Planner
from revfx.fit.progress import showing_progress
from revfx.fit.step_recorder import StepRecorder
from revfx.fit.summary import summarize
from revfx.fit.survey import Chosen, Survey
from revfx.fit.tape import is_same_but_for_sizes
from revfx.fit.unknown_ways import UnknownWay
from revfx.info import BudgetPlan
from revfx.modes import runs_plain, sees_the_engine
from revfx.parts import part_observer, parts_of
from revfx.plan.declared import CallObserver
from revfx.plan.model import BACK_OFF, call_kind, is_watched, run_plainly_inside, tensors_in


LOG = logging.getLogger("revfx")
DATA_MARGIN = 0.03  # share of a budget that stays free if the sizes of tensors depend on data
LEAST_MARGIN = 2**-10  # share of the least budget by which steps with and without earlier gradients may differ
MAX_PATHS = 8  # of the forwards of one kind of call, each with a plan; the oldest one makes room for a new one
MAX_TRIES = 3  # recorded steps without a plan, after which whole blocks are dropped
MAX_KINDS = 32  # of calls; the least recently used one makes room for a new one


class BudgetedModel:
    """A budget, and the kinds of calls of a model that were recorded so far, each with a plan.

    Attributes:
        kinds: the plans, by the kind of call and the sizes of its inputs.
        refused: errors of kinds of calls for which no plan stays within the budget.
        has_parts: whether parts of the model are compiled.
        least_bytes: the bytes of a share in the first plan, which later plans may use too.
        has_planned: whether a plan was made, so that no later step raises.
        has_warned: whether a warning about forwards without a plan was given.
        unplanned: by kind of call, the number of steps without a plan.
        forwards: the most forwards alive at once when a backward began; they share a budget of bytes.
        retried: kinds of calls that drop whole blocks, and were recorded once more as a backward came after all.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget: Budget = budget
        self.costs: Costs = Costs()
        self.kinds: dict[Any, BudgetKind] = {}
        self.refused: dict[Any, BudgetError] = {}
        self.has_parts: bool = False
        self.least_bytes: int = 0
        self.has_planned: bool = False
        self.has_warned: bool = False
        self.unplanned: Counter[Any] = Counter()
        self.forwards: int = 1
        self.retried: set[Any] = set()
        self._forwards = weakref.WeakValueDictionary[int, Any]()  # by number, those whose graph is alive
        self._numbers = itertools.count()
        self._parameters: list[weakref.ref[nn.Parameter]] = []  # of the model, when a step was last recorded
        self.lock: threading.RLock = threading.RLock()

    @property
    def budget_plans(self) -> tuple[BudgetPlan, ...]:
        """Summaries of the plans, oldest first; print them."""
        with self.lock:
            return tuple([kind.summary for kind in self.kinds.values() if kind.summary is not None])

    @property
    def plans(self) -> list[BudgetKind]:
        """The plans, oldest first."""
        with self.lock:
            return [*self.kinds.values()]

    @property
    def refusals(self) -> list[Refusal]:
        """The tensors that are kept for good, with reasons."""
        found: list[Refusal] = []
        for kind in self.kinds.values():
            for reason in kind.plan.reasons:
                where, _, detail = reason.rpartition(": ")
                found.append(Refusal(Reason.NOT_REPLAYED, ("unit",), where, detail))
        return found

    def call(self, model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a forward; it runs once, as it is.

        Args:
            model: the model.
            forward: its own forward.
            args, kwargs: its arguments.

        Raises:
            BudgetError: no plan for calls of this kind stays within the budget.
        """
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        if is_watched() or runs_plain(tensors) or _torch.is_optimized(model):
            return forward(*args, **kwargs)
        if sees_the_engine():
            warn_of_hooks()
            return forward(*args, **kwargs)
        key = self._key(model, leaves)
        if key in self.refused:
            raise self.refused[key]
        kind = self.kinds.get(key)
        if kind is None or kind.is_due:
            parts = parts_of(model)
            if parts and any(map(_fsdp.is_sharded, model.modules())):
                warn_of_gathered_part(name_of(model), self.budget, parts[0])
                return forward(*args, **kwargs)
            self.has_parts = bool(parts)
        with (
            run_plainly_inside(),
            _fsdp.quiet_gathers(dispatch.unwatched),
            noting_out_of_memory(lambda: self.budget_plans),
        ):
            if kind is None or kind.is_due:
                return self._learn(key, model, forward, args, kwargs)
            if not kind.plan.units:
                out = forward(*args, **kwargs)
                self._note_plain(out)
                return out
            return self._watch(key, kind, model, forward, args, kwargs)

    def _seeing_parts(self, mode: Any) -> contextlib.AbstractContextManager[None]:
        return set_variable(part_observer, mode) if self.has_parts else contextlib.nullcontext()

    def _key(self, model: nn.Module, leaves: Sequence[Any]) -> Any:
        """Return the key of the plan for a call.

        A plan serves smaller inputs and fewer trained parameters as well; the closest one is taken.
        """
        if not self._parameters:
            self._parameters = [*map(weakref.ref, model.parameters())]
        parameters = [reference() for reference in self._parameters]
        trained = tuple([p is not None and p.requires_grad for p in parameters])
        kind, sizes = call_kind(model, leaves), sizes_of(leaves)
        found: list[Any] = []
        for key in self.kinds:
            if key[0] == kind and all(map(covers, key[2], sizes)) and covers(key[1], trained):
                found.append(key)
        return min(found, key=lambda key: (count_elements(key[2]), sum(key[1])), default=(kind, trained, sizes))

    def _watch(
        self, key: Any, kind: BudgetKind, model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        plan, kind.used = kind.plan, next(self._numbers)
        plan.copies_ends |= any(_torch.version(t) != version for t, version in kind.ends)
        watching = watcher(self.has_parts)(plan)
        plain = 0 if kind.summary is None else kind.summary.plain
        most = replace(self.budget, less=0).of(plain)
        meter = Meter(model, kind.device, most or sys.maxsize, partial(self._shrink_budget, name_of(model)))
        backward_pass = watching.forward.backward_pass
        backward_pass.ended = partial(self._end_step, key, meter)
        self._note_forward(backward_pass)
        unknown = contextlib.nullcontext() if self.has_parts else UnknownWay(model, (args, kwargs), watching)
        with watching, self._seeing_parts(watching), unknown:
            out = forward(*args, **kwargs)
            ends = tensors_in((args, kwargs, out))
            if plan.copies_ends:
                watching.forward.before_write(ends, ())
        kind.ends = dispatch.version_counters(ends)
        if sizes_of(pytree.tree_leaves((args, kwargs))) == key[2]:  # a smaller call may be shorter
            path, matched = watching.forward.path, watching.forward.count
            if 2 * matched < path.most and not self.has_warned:
                self.has_warned = True
                warn_of_ways(name_of(model), self.budget)
            kind.judge(path, matched, watching.forward.has_left)
        return out

    def _note_forward(self, forward: Any) -> None:
        """Note a forward, which calls its `begins` when its backward begins."""
        number = next(self._numbers)
        with self.lock:
            self._forwards[number] = forward
        forward.begins = partial(self._count_sharing, number)

    def _count_sharing(self, number: int) -> None:
        """Count the forwards that share a budget: the one whose backward begins, and later ones that wait for theirs.

        If they are more than before, later steps get other plans.
        """
        with self.lock:
            sharing = sum(n >= number and not forward.is_over for n, forward in self._forwards.items())
            if sharing > self.forwards and self.budget.share is None:
                self.forwards = sharing
                self.kinds.clear()

    def _note_plain(self, out: Any) -> None:
        """Note a forward that drops nothing."""
        if self.budget.share is None:
            node: Any = next((t.grad_fn for t in tensors_in(out) if t.grad_fn is not None), None)
            if node is not None:
                forward = node.metadata["revfx"] = PlainForward()
                node.register_prehook(forward.begin)
                self._note_forward(forward)

    def _end_step(self, key: Any, meter: Meter, is_right: bool) -> None:
        """Check the peak of a step when its backward has ended.

        The next step is recorded if a recomputed value was wrong, or if no backward came before this one.
        """
        meter.check()
        with self.lock:
            kind = self.kinds.get(key)
            if not is_right:
                self.kinds.pop(key, None)
            elif kind is not None and kind.chosen is None and key not in self.retried:
                self.retried.add(key)
                kind.is_due = True

    def _shrink_budget(self, name: str, over: int) -> None:
        """Make later plans for less, after a step that exceeded the budget by `over` bytes."""
        with self.lock:
            self.budget = replace(self.budget, less=self.budget.less + over)
            self.kinds.clear()
        warn_of_miss(name, self.budget, over)

    def _learn(self, key: Any, model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        inputs = tensors_in((args, kwargs))
        recorded: list[RecordedStep] = []
        self._parameters = []

        def finished(step: StepRecorder) -> None:
            with showing_progress(f"revfx plans {name}"):
                self._plan(key, model, text, step, recorded.pop())

        name, text = name_of(model), shapes_of(inputs)
        learning = learner(StepLearning, self.has_parts)(model, inputs, finished)
        self._note_forward(learning.step)
        with learning, CallObserver(learning), self._seeing_parts(learning):
            out = forward(*args, **kwargs)
        step = learning.end(inputs, tensors_in(out))
        recorded.append(step)
        if sum(not forward.is_over for forward in self._forwards.values()) == 1:
            self.unplanned[key] += 1
        if self.unplanned[key] > MAX_TRIES:
            self._drop_blocks(key, name, step)
        return out

    def _drop_blocks(self, key: Any, name: str, recorded: RecordedStep) -> None:
        """Let later calls of a kind drop whole blocks, because no backward came that a plan could be made from."""
        plan = Plan()
        plan.learn((), (), fallback_units(recorded))
        device = recorded.tape.values[0].device
        with self.lock:
            self.kinds[key] = BudgetKind(plan, [], None, device)
        recorded.tape.forget_tensors()
        if key not in self.retried:
            warn_of_blocks(name, self.budget)

    def _plan(self, key: Any, model: nn.Module, inputs: str, step: StepRecorder, recorded: RecordedStep) -> None:
        """Plan the calls of a kind from a recorded step.

        Raises:
            BudgetError: no plan stays within the budget.
        """
        tape, name = step.tape, name_of(model)
        if all(p.read_at is None for p in tape.saved):
            return
        # Search for the fastest plan within the budget, and within less of it if sizes depend on data.
        start = time.perf_counter()
        planner = Planner(Needs(tape, recorded.unfilled()), self.costs.of(tape), any_caller=True)
        survey = Survey(planner, InvertedSteps(planner, recorded), LEAST_MARGIN)
        budget = self._budget_of(survey)
        room = 0
        if sizes_depend_on_data(tape):
            room = int(DATA_MARGIN * budget.of(survey.peak))
        with_room = replace(budget, less=budget.less + room)
        chosen = self._carried(survey, with_room) or survey.best(with_room)
        if chosen is None and room:
            chosen = survey.best(budget)
        asked = budget.of(survey.peak)
        # Without one: wait for another backward, raise before the first optimizer step, or take the smallest plan.
        if chosen is None and any(p.read_at is None and p.end is None for p in tape.saved):
            return
        if chosen is None and not self.has_planned:
            when = "This was found when the first backward had ended, before any step of an optimizer."
            if self.forwards > 1:
                when += f" {self.forwards} forwards run before the first backward, and share the budget."
            when += about_checkpoints(model)
            error = survey.refusal(name, inputs, budget, when, self.forwards)
            with self.lock:
                self.refused[key] = error
            raise error
        if chosen is None:
            chosen = survey.least()
            warn_of_least(name, self.budget, inputs, chosen.load.peak)
        most = chosen.model.load(chosen.plan).peak
        if tape.output_bytes and budget.share is None and self.budget.share is None and most > asked:
            warn_of_losses(name, self.budget, most)
        # Let later calls follow the plan.
        summary = summarize(survey, chosen, f"{name}, {inputs}", asked, time.perf_counter() - start)
        LOG.info("%s", summary.line)
        with self.lock:
            self.has_planned = True
            del self.unplanned[key]
            self._follow(key, chosen, recorded, asked, summary)
        recorded.tape.forget_tensors()

    def _follow(self, key: Any, chosen: Chosen, recorded: RecordedStep, asked: int, summary: BudgetPlan) -> None:
        """Let later calls of a kind follow a plan, or the plans of the other paths that were recorded."""
        tape = chosen.plan.needs.tape
        before = self.kinds.pop(key, None)
        plan = Plan() if before is None else before.plan
        known = [] if before is None else before.known
        others = [one for one in known if not is_same_but_for_sizes(one[0].plan.needs.tape, tape)][: MAX_PATHS - 1]
        plan.others = [path for _, path in others]
        placed = units_of(chosen, recorded, plan.reasons, asked)
        units = [p.unit for p in placed]
        if not units and not others:
            plan.units.clear()  # units of an earlier plan would match anywhere
        plan.learn(units, [p.chain for p in placed], fallback_units(recorded) if units else ())
        plan.path.firsts = [p.first for p in placed] or [NEVER]
        dropped = (*chosen.plan.dropped, *chosen.plan.compressed, *chosen.inverted.saved)
        plan.path.dropped_at = frozenset(recorded.tape.saved[k][0] for k in dropped)
        for site, of in enumerate(placed):
            if of.is_proven:
                plan.proven.add((-1, plan.sequence[site], ()))
        plan.notes_settings |= recorded.tape.changes_settings
        kind = self.kinds[key] = BudgetKind(plan, [(chosen, plan.path), *others], summary, tape.allocations[0].device)
        kind.used = next(self._numbers)
        if before is not None:
            kind.wait = before.wait
            is_new = len(others) == len(known)
            if not is_new and before.tries + 1 < MAX_TRIES:
                kind.is_due, kind.tries = True, before.tries + 1  # the next forward may take the other path
            else:
                kind.wait = BACK_OFF * before.wait + 1
        if len(self.kinds) > MAX_KINDS:
            del self.kinds[min(self.kinds, key=lambda key: self.kinds[key].used)]

    def _carried(self, survey: Survey, budget: Budget) -> Chosen | None:
        """Return the plan of a step that differs in sizes only, if it makes good use of the budget."""
        for kind in reversed(self.plans):
            for known, _ in kind.known:
                if is_same_but_for_sizes(known.plan.needs.tape, survey.plain.needs.tape):
                    carried = survey.carried(known, budget)
                    if carried is not None:
                        return carried
        return None

    def _budget_of(self, survey: Survey) -> Budget:
        """Return the budget for a kind of call.

        Forwards that are alive at once share one of bytes. A share of a smaller step is no less than that of the first
        one, so that a last batch, evaluation, or frozen layers have room.
        """
        budget = self.budget
        if budget.bytes is not None:
            budget = replace(budget, bytes=budget.bytes // self.forwards)
        elif budget.of(survey.peak) < self.least_bytes:
            budget = replace(budget, share=None, bytes=self.least_bytes)
        elif not self.least_bytes:
            self.least_bytes = budget.of(survey.peak) + budget.less
        return budget

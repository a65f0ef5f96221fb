"""The plan for a budget (`explain(..., memory=...)`), and the largest batch within one (`revfx fit`)."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from revfx.errors import name_of
from revfx.fit.budget import Budget, checked_memory
from revfx.fit.foresee import foreseen_survey
from revfx.fit.progress import showing_progress
from revfx.fit.simulate import Load
from revfx.fit.survey import Chosen, Survey
from revfx.report.budget import FitInfo, Point, Share
from revfx.report.data import Usage
from revfx.units import size


_log = logging.getLogger("revfx.report")
CURVE_SHARES = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the plain peak: the budgets of the curve
MAX_BATCH = 65536  # no larger one is tried
RESOLUTION = 32  # the largest batch is found up to this fraction of itself
ADVICE: Mapping[str, str] = {  # by the name of an operator at the peak
    "log_softmax|nll_loss|cross_entropy": "the loss holds the peak: `torch.nn.functional.linear_cross_entropy` makes no"
    " logits of all tokens at once.",
    r"softmax|bmm|baddbmm": "attention holds the peak: `scaled_dot_product_attention` without a mask of its own, and"
    " without dropout, keeps no probabilities.",
    "convolution": "a convolution holds the peak, by its own operands and workspace: a smaller batch, or a stem with"
    " larger strides, is what helps.",
}


@dataclass(frozen=True)
class BudgetFindings:
    """The plan for a budget, the usage of the plain step and of the planned one, and advice."""

    fit: FitInfo
    ways: tuple[Usage, Usage]
    advice: list[str]


def explain_fit(model: nn.Module, args: Any, kwargs: Any, budget: Budget) -> BudgetFindings:
    """Plan a step of `model(*args, **kwargs)` for a budget."""
    _log.info("planning for the budget")
    with showing_progress(f"revfx plans {name_of(model)}"):
        return _findings(foreseen_survey(model, args, kwargs), budget)


def _findings(survey: Survey, budget: Budget) -> BudgetFindings:
    chosen, smallest = survey.best(budget), survey.least()
    plan = chosen or smallest
    points = [Point(smallest.load.peak, _time_of(survey, smallest))]
    for share in CURVE_SHARES:
        other_budget = Budget("", share=share)
        other = survey.best(other_budget)
        if other is not None:
            # A plan for less memory also fits in more, and may be the fastest plan that was found.
            time = min(_time_of(survey, other), points[-1].time)
            points.append(Point(other_budget.of(survey.peak), time))
    bound = None
    if chosen is not None:
        with contextlib.suppress(ImportError):  # without scipy
            bound = 1 + survey.bound(chosen, budget) / survey.plain.seconds
    found = FitInfo(
        budget=budget.of(survey.peak),
        plain=survey.peak,
        is_feasible=chosen is not None,
        peak=plan.load.peak,
        time=_time_of(survey, plan),
        bound=bound,
        modules=tuple(_shares(survey, plan)),
        held=tuple(plan.holders[:3]),
        curve=tuple(reversed(points)),
        least=smallest.load.peak,
    )
    text = " ".join(found.held)
    advice = [hint for operators, hint in ADVICE.items() if re.search(operators, text)]
    _, plain = survey.plain.plain
    return BudgetFindings(found, (_usage("plain", survey, plain), _usage("fitted", survey, plan.load)), advice)


def _time_of(survey: Survey, chosen: Chosen) -> float:
    """Return the predicted time of a plan, in plain steps."""
    return 1 + chosen.seconds / survey.plain.seconds


def _usage(way: str, survey: Survey, load: Load) -> Usage:
    """Return the live bytes of a step, operator by operator."""
    live = [max(load.live[at : at + 2]) for at in range(0, len(load.live), 2)]
    return Usage(way, peak=load.peak, live=tuple(live), backward=survey.plain.needs.tape.backward_start)


def _shares(survey: Survey, chosen: Chosen) -> list[Share]:
    """Return the saved tensors of each module, by choice; a layer of a list is one module."""
    plan, tape = chosen.plan, chosen.plan.needs.tape
    choices = "kept", "recomputed", "compressed", "inverted"
    rows: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(choices, 0))
    compressed = {plan.needs.dropout_masks[v] for v in plan.dropout_masks}
    bases = frozenset[int]().union(*plan.bases.values())
    for v, saved in survey.plain.needs.keepable.items():
        if not saved and v not in bases:
            continue  # an argument of a compiled part
        if v not in plan.needs.keepable:
            choice = "inverted"
        elif v in plan.kept:
            choice = "kept"
        elif v in compressed or plan.compressed.issuperset(saved):
            choice = "compressed"
        else:
            choice = "recomputed"
        at = tape.made_by[v]
        path = "" if at is None else tape.ops[at].module
        layer = re.match(r".*?\.\d+(?=\.|$)", path)
        name = path.partition(".")[0] if layer is None else layer[0]
        rows[name][choice] += tape.size(v)
    return [Share(name, **row) for name, row in rows.items()]


# --- the largest batch
def resize_batch(inputs: Sequence[Any], batch: int) -> list[Any]:
    """Return inputs with another batch size: the first extent of the first tensor, and of the others that share it."""
    first = next((t.shape[0] for t in inputs if isinstance(t, Tensor) and t.dim()), None)
    if first is None:
        raise ValueError("--memory asks for the largest batch, and no input has one")
    found: list[Any] = []
    for t in inputs:
        if isinstance(t, Tensor) and t.dim() and t.shape[0] == first:
            found.append(t[:1].expand(batch, *t.shape[1:]).contiguous())
        else:
            found.append(t)
    return found


@dataclass(frozen=True)
class Largest:
    """The largest batch within a budget of bytes: plainly, and under a plan, with its predicted peak and time.

    `resident`: bytes of the device for parameters, gradients and optimizer state, beside the budget.
    """

    budget: int
    plain: int
    batch: int
    peak: int = 0
    time: float = 0.0
    resident: int = 0

    def __str__(self) -> str:
        within = f"within {size(self.budget)}"
        if self.resident:
            within += f" (beside {size(self.resident)} of parameters, gradients and optimizer state)"
        if not self.batch:
            return f"{within} not even a batch of 1 trains"
        plainly = f"plainly {self.plain}" if self.plain else "plainly not even 1"
        return (
            f"{within} the largest batch is {self.batch} ({plainly}): predicted peak {size(self.peak)}, at"
            f" {self.time:.2f} of the plain model's time. Train `revfx.convert(model, memory={self.budget})`."
        )


def largest(model: nn.Module, inputs: Sequence[Any], memory: Any) -> Largest:
    """Return the largest batch that trains within a budget of bytes, by plans alone.

    Raises:
        ValueError: `memory` is not a number of bytes, or no input has a batch.
    """
    budget = checked_memory(memory)
    if budget is None or budget.bytes is None:
        raise ValueError(f"--memory {memory}: give bytes, such as 2GiB; a share has no largest batch")
    max_bytes: int = budget.bytes

    @functools.cache
    def survey(batch: int) -> Survey:
        _log.info("planning a batch of %d", batch)
        return foreseen_survey(model, tuple(resize_batch(inputs, batch)), {})

    with showing_progress(f"revfx plans {name_of(model)}"):
        batch, too_large = search(lambda n: survey(n).fits(budget))
        plain, _ = search(lambda n: survey(n).peak <= max_bytes, high=too_large)
        chosen = survey(batch).best(budget) if batch else None
    if chosen is None:
        return Largest(max_bytes, plain, batch)
    return Largest(max_bytes, plain, batch, chosen.load.peak, _time_of(survey(batch), chosen))


OPTIMIZER_STATES: Mapping[str, int] = {"adamw": 2, "adam": 2, "momentum": 1, "sgd": 0}  # tensors for each parameter


def resident_bytes(model: nn.Module, optimizer: str) -> int:
    """Return the bytes that training holds between steps: tensors of the model, gradients and optimizer state.

    Raises:
        ValueError: the optimizer is not known.
    """
    if optimizer not in OPTIMIZER_STATES:
        raise ValueError(f"--optimizer {optimizer}: give one of {', '.join(OPTIMIZER_STATES)}")
    found = 0
    for t in (*model.parameters(), *model.buffers()):
        found += t.nbytes * (2 + OPTIMIZER_STATES[optimizer] if t.requires_grad else 1)
    return found


def search(fits: Callable[[int], bool], low: int = 0, high: int | None = None) -> tuple[int, int | None]:
    """Find the largest batch that fits, by doubling and then by bisection, up to 1/`RESOLUTION` of it.

    Args:
        fits: returns whether a batch fits; smaller ones fit as well.
        low: a batch known to fit, or 0.
        high: a batch known not to fit.

    Returns:
        The largest batch found to fit, and the smallest one found not to fit, if any.
    """
    while high is None and low < MAX_BATCH:
        batch = max(1, 2 * low)
        if fits(batch):
            low = batch
        else:
            high = batch
    while high is not None and high - low > max(1, low // RESOLUTION):
        batch = (low + high) // 2
        if fits(batch):
            low = batch
        else:
            high = batch
    return low, high

"""The plan for a budget (`explain(..., memory=...)`), and the largest batch within one (`revfx fit`)."""

from __future__ import annotations

import functools
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
SHARES = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # budgets of the curve
MAX_BATCH = 65536  # the largest that is tried
RESOLUTION = 32  # the largest is found to this part of itself
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
    """The plan for a budget, the live bytes of the plain step and of the planned one, and advice."""

    fit: FitInfo
    ways: tuple[Usage, Usage]
    advice: list[str]


def explain_fit(model: nn.Module, args: Any, kwargs: Any, budget: Budget) -> BudgetFindings:
    """Plan a step of `model(*args, **kwargs)` for a budget."""
    _log.info("planning for the budget")
    with showing_progress(f"revfx plans {name_of(model)}"):
        return _findings(foreseen_survey(model, args, kwargs), budget)


def _findings(survey: Survey, budget: Budget) -> BudgetFindings:
    chosen, least = survey.best(budget), survey.least()
    plan, asked = chosen or least, least.load.peak
    points = [Point(asked, 1 + least.seconds / survey.plain.seconds)]
    for share in SHARES:
        other = survey.best(Budget("", share=share))
        if other is not None:
            # A plan for less memory also fits in more, and may be the faster one that was found.
            time = min(1 + other.seconds / survey.plain.seconds, points[-1].time)
            points.append(Point(Budget("", share=share).of(survey.peak), time))
    found = FitInfo(
        budget=budget.of(survey.peak),
        plain=survey.peak,
        is_feasible=chosen is not None,
        peak=plan.load.peak,
        time=1 + plan.seconds / survey.plain.seconds,
        bound=_time_bound(survey, plan, budget) if chosen is not None else None,
        modules=tuple(_modules(survey, plan)),
        held=tuple(plan.holders[:3]),
        curve=tuple(reversed(points)),
        least=asked,
    )
    text = " ".join(found.held)
    advice = [said for names, said in ADVICE.items() if re.search(names, text)]
    _, plain = survey.plain.plain
    return BudgetFindings(found, (_usage("plain", survey, plain), _usage("fitted", survey, plan.load)), advice)


def _time_bound(survey: Survey, chosen: Chosen, budget: Budget) -> float | None:
    """Return the time that no plan of the same kind is below, in plain steps; None without scipy."""
    try:
        return 1 + survey.bound(chosen, budget) / survey.plain.seconds
    except ImportError:
        return None


def _usage(way: str, survey: Survey, load: Load) -> Usage:
    """Return the live bytes of a step, operator by operator."""
    backward_start = survey.plain.needs.tape.backward_start
    live = [max(load.live[at : at + 2]) for at in range(0, len(load.live), 2)]
    return Usage(way, peak=load.peak, live=tuple(live), backward=backward_start)


def _modules(survey: Survey, chosen: Chosen) -> Iterable[Share]:
    """Yield the saved tensors of each module, by choice: layers of a list whole."""
    plan, tape = chosen.plan, chosen.plan.needs.tape
    rows: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    compressed = {plan.needs.dropout_masks[v] for v in plan.dropout_masks}
    bases = frozenset[int]().union(*plan.bases.values())
    for v, saved in survey.plain.needs.keepable.items():
        if not saved and v not in bases:
            continue  # an argument of a compiled part
        if v not in plan.needs.keepable:
            column = 3
        elif v in plan.kept:
            column = 0
        else:
            column = 2 if v in compressed or plan.compressed.issuperset(saved) else 1
        made = tape.made_by[v]
        path = tape.ops[made].module if made is not None else ""
        layer = re.match(r".*?\.\d+(?=\.|$)", path)
        rows[path.partition(".")[0] if layer is None else layer[0]][column] += tape.size(v)
    return [Share(name, *row) for name, row in rows.items()]


# --- the largest batch
def batched(inputs: Sequence[Any], batch: int) -> list[Any]:
    """Return inputs with another batch: the first extent of all tensors that have the first one's."""
    first = next((t.shape[0] for t in inputs if isinstance(t, Tensor) and t.dim()), None)
    if first is None:
        raise ValueError("--memory asks for the largest batch, and no input has one")
    has = [isinstance(t, Tensor) and t.dim() and t.shape[0] == first for t in inputs]
    return [t[:1].expand(batch, *t.shape[1:]).contiguous() if h else t for t, h in zip(inputs, has, strict=True)]


@dataclass(frozen=True)
class Largest:
    """The largest batch within a budget of bytes: plainly, and under a plan, with its predicted peak and time.

    `resident`: bytes of the device that parameters, gradients and the optimizer's state take beside the budget.
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
    """Return the largest batch that trains within a budget of bytes, found by plans alone.

    Raises:
        ValueError: `memory` is no number of bytes, or no input has a batch.
    """
    budget = checked_memory(memory)
    if budget is None or budget.bytes is None:
        raise ValueError(f"--memory {memory}: give bytes, such as 2GiB; a share has no largest batch")
    most: int = budget.bytes

    @functools.cache
    def survey(batch: int) -> Survey:
        _log.info("planning a batch of %d", batch)
        return foreseen_survey(model, tuple(batched(inputs, batch)), {})

    with showing_progress(f"revfx plans {name_of(model)}"):
        batch, over = search(lambda n: survey(n).fits(budget))
        plain, _ = search(lambda n: survey(n).peak <= most, high=over)
        chosen = survey(batch).best(budget) if batch else None
    found = Largest(most, plain, batch)
    if chosen is not None:
        found = replace(found, peak=chosen.load.peak, time=1 + chosen.seconds / survey(batch).plain.seconds)
    return found


OPTIMIZER_STATES: Mapping[str, int] = {"adamw": 2, "adam": 2, "momentum": 1, "sgd": 0}  # tensors for each parameter


def resident_bytes(model: nn.Module, optimizer: str) -> int:
    """Return the bytes of a training that are there between steps: tensors of the model, gradients, optimizer state.

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
    """Return the largest size found to fit, and the smallest found not to, if any.

    Sizes are doubled until one does not fit, and then halved in between, to a part of `RESOLUTION`.

    Args:
        fits: whether a size fits; the smaller ones do as well.
        low: a size known to fit, or 0.
        high: a size known not to fit.
    """
    while high is None and low < MAX_BATCH:
        size = max(1, 2 * low)
        low, high = (size, None) if fits(size) else (low, size)
    while high is not None and high - low > max(1, low // RESOLUTION):
        size = (low + high) // 2
        low, high = (size, high) if fits(size) else (low, size)
    return low, high

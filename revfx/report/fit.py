"""What a budget comes to (`explain(..., memory=...)`): what is kept of each module and what is not, the peak and what
holds it, and what other budgets would cost. And the largest batch that a budget has room for (`revfx fit`).
"""

from __future__ import annotations

import functools
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from revfx.fit.budget import Budget, checked_memory
from revfx.fit.foresee import foreseen_survey
from revfx.fit.survey import Chosen, Survey
from revfx.units import size


_log = logging.getLogger("revfx.report")
SHARES = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # budgets of the curve
MAX_MODULES = 12  # modules that are shown
MAX_BATCH = 65536  # what is not looked beyond
RESOLUTION = 32  # the largest is found to this part of itself
ADVICE: Mapping[str, str] = {  # by what an operator at the peak is called
    "log_softmax|nll_loss|cross_entropy": "the loss holds the peak: `torch.nn.functional.linear_cross_entropy` makes no"
    " logits of all tokens at once.",
    r"softmax|bmm|baddbmm": "attention holds the peak: `scaled_dot_product_attention` without a mask of its own, and"
    " without dropout, keeps no probabilities.",
    "convolution": "a convolution holds the peak, by its own operands and workspace: a smaller batch, or a stem with"
    " larger strides, is what helps.",
}


@dataclass(frozen=True, slots=True)
class Share:
    """Bytes of a module's saved tensors: `kept`, `recomputed`, `compressed` to a bit an element, or `inverted`."""

    module: str
    kept: int
    recomputed: int
    compressed: int
    inverted: int

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """The bytes, in this order."""
        return self.kept, self.recomputed, self.compressed, self.inverted


@dataclass(frozen=True, slots=True)
class Point:
    """The predicted time of the fastest plan within a budget of bytes, in plain steps."""

    budget: int
    time: float


@dataclass(frozen=True, slots=True)
class FitInfo:
    """The plan for a budget; bytes.

    Attributes:
        budget: bytes that were asked for.
        plain: the peak of the plain model's step.
        is_feasible: a plan stays within the budget; else what follows is about the smallest one.
        peak: predicted.
        time: predicted, in plain steps.
        modules: what is done with the saved tensors of each module.
        held: what the peak consists of, largest first.
        curve: other budgets.
        least: the least feasible budget.
    """

    budget: int
    plain: int
    is_feasible: bool
    peak: int
    time: float
    modules: tuple[Share, ...]
    held: tuple[str, ...]
    curve: tuple[Point, ...]
    least: int

    def lines(self) -> Iterator[str]:
        """Yield this as text."""
        if self.is_feasible:
            share = f"{self.peak / self.plain:.0%} of the plain model's {size(self.plain)}"
            peak = f"predicted peak {size(self.peak)}, {share}"
            yield f"budget {size(self.budget)}: {peak}, at {self.time:.2f} of its time"
            yield f"  {'':28}{'kept':>12}{'recomputed':>12}{'compressed':>12}{'inverted':>12}"
            rows = sorted(self.modules, key=lambda m: -sum(m.numbers))
            for m in rows[:MAX_MODULES]:
                numbers = "".join(f"{size(n) if n else '-':>12}" for n in m.numbers)
                yield f"  {m.module or 'the root':28}{numbers}"
            if len(rows) > MAX_MODULES:
                yield f"  and {len(rows) - MAX_MODULES} more modules"
        else:
            yield f"budget {size(self.budget)}: no plan stays within it"
        yield "at its peak" if self.is_feasible else "at the peak of the smallest plan"
        yield from (f"  {text}" for text in self.held)
        yield f"least feasible budget: {self.least} bytes, {size(self.least)}"
        yield "budgets and the time they cost, in plain steps"
        yield from (f"  {size(p.budget):>10}  {p.budget / self.plain:>4.0%}  {p.time:.3f}" for p in self.curve)


def explain_fit(model: nn.Module, args: Any, kwargs: Any, budget: Budget) -> tuple[FitInfo, list[str]]:
    """Return what a budget comes to for `model(*args, **kwargs)`, and advice."""
    _log.info("planning for the budget")
    survey = foreseen_survey(model, args, kwargs)
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
        budget.of(survey.peak), survey.peak, chosen is not None, plan.load.peak,
        1 + plan.seconds / survey.plain.seconds, tuple(_modules(survey, plan)), tuple(plan.holders[:3]),
        tuple(reversed(points)), asked,
    )  # fmt: skip
    text = " ".join(found.held)
    return found, [advice for names, advice in ADVICE.items() if re.search(names, text)]


def _modules(survey: Survey, chosen: Chosen) -> Iterable[Share]:
    """Yield what is done with the saved tensors of each module: layers of a list whole."""
    plan, tape = chosen.plan, chosen.plan.needs.tape
    rows: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    compressed = {plan.needs.coins[v] for v in plan.coins}
    bases = frozenset[int]().union(*plan.bases.values())
    for v, packs in survey.plain.needs.wanted.items():
        if not packs and v not in bases:
            continue  # an argument of a compiled part
        if v not in plan.needs.wanted:
            column = 3
        elif v in plan.kept:
            column = 0
        else:
            column = 2 if v in compressed or plan.marks.issuperset(packs) else 1
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
    """The largest batch within a budget of bytes: plainly, and under a plan, with its predicted peak and time."""

    budget: int
    plain: int
    batch: int
    peak: int = 0
    time: float = 0.0

    def __str__(self) -> str:
        within = f"within {size(self.budget)}"
        if not self.batch:
            return f"{within} not even a batch of 1 trains"
        plainly = f"plainly {self.plain}" if self.plain else "plainly not even 1"
        return (
            f"{within} the largest batch is {self.batch} ({plainly}): predicted peak {size(self.peak)}, at"
            f" {self.time:.2f} of the plain model's time. Train `revfx.convert(model, memory=...)`."
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

    @functools.cache
    def planned(batch: int) -> Chosen | None:
        return survey(batch).best(budget)

    batch, over = search(lambda n: planned(n) is not None)
    plain, _ = search(lambda n: survey(n).peak <= most, high=over)
    found = Largest(most, plain, batch)
    if (chosen := planned(batch) if batch else None) is not None:
        found = replace(found, peak=chosen.load.peak, time=1 + chosen.seconds / survey(batch).plain.seconds)
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

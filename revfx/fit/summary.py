"""Summaries of budget plans, as numbers and as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from revfx.fit.needs import Needs
from revfx.fit.survey import Chosen, Survey
from revfx.units import size


@dataclass(frozen=True, slots=True)
class Amount:
    """A number of saved tensors and their bytes."""

    tensors: int = 0
    bytes: int = 0

    def __str__(self) -> str:
        return f"{self.tensors} saved tensors, {size(self.bytes)}"


@dataclass(frozen=True, slots=True)
class BudgetPlan:
    """The plan for one kind of call of a model with a budget.

    Attributes:
        model: the model's class.
        inputs: the shapes of the inputs, as text.
        budget: bytes that a step may take.
        peak: bytes that a step takes at its peak, as foreseen.
        plain: bytes that the plain model's step takes at its peak, as foreseen.
        time: of a step, in plain steps, as foreseen.
        planning: seconds that it took to make the plan.
        kept: saved tensors that are held until the backward.
        recomputed: those that are computed again in the backward.
        marks: those of which a bit or a byte per element is kept.
        inverted: those that are computed from the outputs of couplings.
    """

    model: str
    inputs: str
    budget: int
    peak: int
    plain: int
    time: float
    planning: float
    kept: Amount
    recomputed: Amount
    marks: Amount
    inverted: Amount

    @property
    def line(self) -> str:
        """Return the plan on one line, for a log."""
        return (
            f"{self.model}, {self.inputs}: budget {size(self.budget)}, foreseen peak {size(self.peak)} of the plain"
            f" model's {size(self.plain)}, foreseen extra time {self.time - 1:.1%}, planned in {self.planning:.1f} s"
        )

    def lines(self) -> Iterator[str]:
        """Yield the plan as lines of text."""
        yield f"{self.model}, {self.inputs}: budget {size(self.budget)}"
        yield f"  foreseen peak {size(self.peak)}, {self.peak / max(1, self.plain):.0%} of the plain model's"
        yield f"  foreseen time {self.time:.2f} of the plain model's; planned in {self.planning:.1f} s"
        ways = ("kept", self.kept), ("recomputed", self.recomputed), ("as marks", self.marks)
        for name, amount in (*ways, ("inverted", self.inverted)):
            if amount.tensors:
                yield f"  {name + ':':12}{amount}"

    def __str__(self) -> str:
        return "\n".join(self.lines())


def summarize(survey: Survey, chosen: Chosen, model: str, inputs: str, budget: int, planning: float) -> BudgetPlan:
    """Summarize a plan.

    Args:
        survey: the planners of which one made the plan.
        chosen: the plan.
        model: the model's class.
        inputs: the shapes of the inputs, as text.
        budget: bytes.
        planning: seconds that the search took.
    """
    plan, needs = chosen.plan, chosen.plan.needs
    found = {"kept": Amount(), "recomputed": Amount(), "marks": Amount()}
    marked = {needs.coins[v] for v in plan.coins}
    for v, packs in needs.wanted.items():
        if not packs:
            continue  # an argument of a compiled part
        if v in plan.kept:
            way = "kept"
        elif v in marked or plan.marks.issuperset(packs):
            way = "marks"
        else:
            way = "recomputed"
        before = found[way]
        found[way] = Amount(before.tensors + 1, before.bytes + needs.tape.size(v))
    inverted = Amount()
    if chosen.way == "reversible":
        plain, mine = _saved(survey.plain.needs), _saved(needs)
        inverted = Amount(max(0, plain.tensors - mine.tensors), max(0, plain.bytes - mine.bytes))
    time = 1 + chosen.seconds / max(survey.plain.seconds, 1e-9)
    return BudgetPlan(
        model, inputs, budget, chosen.load.peak, survey.peak, time, planning, **found, inverted=inverted
    )  # fmt: skip


def _saved(needs: Needs) -> Amount:
    values = [v for v, packs in needs.wanted.items() if packs]
    return Amount(len(values), sum(map(needs.tape.size, values)))

"""`model.revfx`: the findings on a converted model, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass

from revfx.errors import Refusal
from revfx.passes.regions import RegionSummary
from revfx.units import size


@dataclass(frozen=True)
class PlanInfo:
    """The plan of one kind of call: its reversible regions, and its program as text."""

    regions: tuple[RegionSummary, ...]
    program: str

    def __str__(self) -> str:
        return self.program


@dataclass(frozen=True, slots=True)
class Amount:
    """A number of saved tensors and their bytes."""

    tensors: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.tensors} saved tensors, {size(self.bytes)}"


@dataclass(frozen=True, slots=True)
class BudgetPlan:
    """The plan for one kind of call of a model with a budget.

    Attributes:
        inputs: the model's class and the shapes of its inputs, as text.
        budget: bytes that a step may take.
        peak: bytes that a step takes at its peak, as predicted.
        plain: bytes that the plain model's step takes at its peak, as predicted.
        time: of a step, in plain steps, as predicted.
        planning: seconds that the planning took.
        kept: saved tensors that are held until the backward.
        recomputed: saved tensors that are recomputed in the backward.
        compressed: saved tensors that are kept as one bit per element.
        inverted: saved tensors that are computed from the outputs of couplings.
    """

    inputs: str
    budget: int
    peak: int
    plain: int
    time: float
    planning: float
    kept: Amount
    recomputed: Amount
    compressed: Amount
    inverted: Amount

    @property
    def line(self) -> str:
        """Return the plan on one line, for a log."""
        return (
            f"{self.inputs}: budget {size(self.budget)}, predicted peak {size(self.peak)} of the plain"
            f" model's {size(self.plain)}, predicted extra time {self.time - 1:.1%}, planned in {self.planning:.1f} s"
        )

    def __str__(self) -> str:
        text = (
            f"{self.inputs}: budget {size(self.budget)}"
            f"\n  predicted peak {size(self.peak)}, {self.peak / max(1, self.plain):.0%} of the plain model's"
            f"\n  predicted time {self.time:.2f} of the plain model's; planned in {self.planning:.1f} s"
        )
        for name in ("kept", "recomputed", "compressed", "inverted"):
            amount: Amount = getattr(self, name)
            if amount.tensors:
                text += f"\n  {name + ':':12}{amount}"
        return text


@dataclass(frozen=True)
class ConversionInfo:
    """The findings on a converted model up to its latest call.

    Attributes:
        regions: the reversible regions of all plans.
        refusals: the parts that are left as they were, each with the reason and its place.
        plans: one plan per kind of call (shapes, dtypes, training state); with a budget, its plans.
        program: the plans as text; `print(model.revfx)` shows it.
    """

    regions: tuple[RegionSummary, ...]
    refusals: tuple[Refusal, ...]
    plans: tuple[PlanInfo, ...] | tuple[BudgetPlan, ...]
    program: str

    def __str__(self) -> str:
        return self.program

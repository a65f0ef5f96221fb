"""`model.revfx`: the findings on a converted model, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from revfx.errors import Refusal
from revfx.passes.regions import RegionSummary


@dataclass(frozen=True)
class PlanInfo:
    """The plan of one kind of call: its reversible regions, and its program as text."""

    regions: tuple[RegionSummary, ...]
    program: str

    def __str__(self) -> str:
        return self.program


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
    plans: tuple[PlanInfo | Any, ...]
    program: str

    def __str__(self) -> str:
        return self.program

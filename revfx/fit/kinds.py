"""Kinds of calls of a model with a budget, each with its plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from revfx.engine.plan import Plan
from revfx.fit.survey import Chosen
from revfx.info import BudgetPlan


@dataclass
class BudgetKind:
    """Calls of one kind.

    Attributes:
        plan: the units that they are compared with.
        chosen: the plan that these follow from; None where none can be made, and whole blocks are dropped.
        summary: it for users.
        device: on which the model is.
        units: how many units matched at most.
        calls: how many calls there were since it was learnt.
        wait: how many calls have to pass before it is learnt again.
        is_due: the next call is learnt again.
        used: a number that grows with each call.
        ends: tensors that the latest call took or returned, with how often they had been written to.
    """

    plan: Plan
    chosen: Chosen | None
    summary: BudgetPlan | None
    device: torch.device
    units: int
    calls: int = 0
    wait: int = 0
    is_due: bool = False
    used: int = 0
    ends: list[tuple[Tensor, int]] = field(default_factory=list[tuple[Tensor, int]])

    def judge(self, matched: int) -> None:
        """Have the kind learnt again if fewer units matched than before."""
        self.calls += 1
        if matched < self.units and self.calls > self.wait:
            self.is_due = True
        self.units = max(self.units, matched)


class PlainForward:
    """A forward that drops nothing; `begins` is called when its backward begins, when it `is_over`."""

    is_over = False
    begins: Callable[[], None] | None = None

    def begin(self, _: Any) -> None:
        """Note that its backward begins."""
        if self.begins is not None:
            self.begins()
        self.is_over = True

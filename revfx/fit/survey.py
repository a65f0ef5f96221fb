"""The ways to run a forward, each with its planner: the fastest plan of all for a budget, and the least budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from revfx.fit.budget import Budget
from revfx.fit.choose import Planner
from revfx.fit.holders import holders
from revfx.fit.plan import Plan
from revfx.fit.simulate import Load
from revfx.units import size


class Chosen(NamedTuple):
    """A plan for one of the ways, what it holds, and the seconds that it takes more than the plain step."""

    way: str
    plan: Plan
    load: Load
    seconds: float


@dataclass
class Survey:
    """Planners by the ways that they plan, the plain one first."""

    planners: dict[str, Planner]

    @property
    def plain(self) -> Planner:
        """Return that of the plain way."""
        return next(iter(self.planners.values()))

    @property
    def peak(self) -> int:
        """Return the most bytes that the plain step holds."""
        return self.plain.plain[1].peak

    @property
    def seconds(self) -> float:
        """Return what the operators of the plain step take."""
        return self.plain.seconds

    def best(self, budget: Budget) -> Chosen | None:
        """Return the fastest plan that is found to stay within the budget; None if none does."""
        if budget.share == 1:
            return Chosen("plain", *self.plain.plain, 0.0)
        found: list[Chosen] = []
        for way, planner in self.planners.items():
            best = planner.best(planner.bytes_of(budget, self.plain))
            if best is not None:
                found.append(Chosen(way, *best, best[1].seconds + planner.seconds - self.seconds))
                if not best[0].drops:
                    break
        return min(found, key=lambda c: c.seconds, default=None)

    def least(self) -> tuple[Chosen, list[str]]:
        """Return the plan with the least peak that is found, whatever the caller holds, and what holds that."""
        found: list[Chosen] = []
        for way, planner in self.planners.items():
            planner.bytes_of(Budget("", bytes=1), self.plain)
            plan, load = planner.least()
            found.append(Chosen(way, plan, load, load.seconds + planner.seconds - self.seconds))
        chosen = min(found, key=lambda c: c.load.peak)
        return chosen, self.holders(chosen)

    def holders(self, chosen: Chosen) -> list[str]:
        """Return what is there at the peak of a plan, largest first."""
        return holders(self.planners[chosen.way].model, chosen.plan, chosen.load)

    def infeasible(self, name: str, budget: Budget) -> str:
        """Return what to say where no plan stays within the budget."""
        chosen, held = self.least()
        least, asked = chosen.load.peak, size(budget.of(self.peak))
        if budget.share is not None:
            asked = f"{budget.share:.0%} of {size(self.peak)}, {asked}"
        return (
            f"`convert({name}, {budget.text})`: no plan stays within {asked}. The least feasible budget is {least}"
            f" bytes ({size(least)}, {least / self.peak:.1%} of the plain model's {size(self.peak)}). Its peak is held"
            + "\n  ".join([" by", *held[:3]])
        )

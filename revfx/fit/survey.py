"""The ways to run a forward, each with its planner: the fastest plan of all for a budget, and the least budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from revfx.fit.budget import Budget
from revfx.fit.choose import Planner
from revfx.fit.holders import holders
from revfx.fit.plan import Plan
from revfx.fit.simulate import OVERHEAD, Load
from revfx.units import size


DEAR = 0.25  # of a step's time: what inverting takes at least
MARGIN = 1.002  # times the least peak is what can be asked for again: times that are measured anew make other plans


class Chosen(NamedTuple):
    """A plan for one of the ways, what it holds, and the seconds that it takes more than the plain step."""

    way: str
    plan: Plan
    load: Load
    seconds: float


@dataclass
class Survey:
    """The planner of the plain way, and what returns that of the reversible one, if there is any."""

    plain: Planner
    reversible: Callable[[], Planner | None]

    @property
    def peak(self) -> int:
        """Return the most bytes that the plain step holds."""
        return self.plain.plain[1].peak

    def best(self, budget: Budget) -> Chosen | None:
        """Return the fastest plan that is found to stay within the budget; None if none does.

        Inverting runs functions again, so it is not looked for where the plain way takes less than that.
        """
        if budget.share == 1:
            return self._chosen("plain", self.plain, self.plain.plain)
        found = self._chosen("plain", self.plain, self.plain.best(self.plain.bytes_of(budget, self.plain)))
        if (found is None or found.seconds > DEAR * self.plain.seconds) and (other := self.reversible()) is not None:
            both = found, self._chosen("reversible", other, other.best(other.bytes_of(budget, self.plain)))
            found = min(filter(None, both), key=lambda c: c.seconds, default=None)
        return found

    def _chosen(self, way: str, planner: Planner, found: tuple[Plan, Load] | None) -> Chosen | None:
        ops = len(planner.needs.tape.ops) - len(self.plain.needs.tape.ops)
        more = planner.seconds - self.plain.seconds + OVERHEAD * ops
        return None if found is None else Chosen(way, *found, found[1].seconds + more)

    def least(self) -> tuple[Chosen, list[str]]:
        """Return the plan with the least peak that is found, whatever the caller holds, and what holds that."""
        found: list[Chosen] = []
        for way, planner in (("plain", self.plain), ("reversible", self.reversible())):
            if planner is not None:
                planner.bytes_of(Budget("", bytes=1), self.plain)
                found += filter(None, [self._chosen(way, planner, planner.least())])
        chosen = min(found, key=lambda c: c.load.peak)
        return chosen, self.holders(chosen)

    def holders(self, chosen: Chosen) -> list[str]:
        """Return what is there at the peak of a plan, largest first."""
        planner = self.reversible() if chosen.way == "reversible" else self.plain
        assert planner is not None
        return holders(planner.model, chosen.plan, chosen.load)

    def infeasible(self, name: str, budget: Budget) -> str:
        """Return what to say where no plan stays within the budget."""
        chosen, held = self.least()
        least, asked = int(chosen.load.peak * MARGIN), size(budget.of(self.peak))
        if budget.share is not None:
            asked = f"{budget.share:.0%} of {size(self.peak)}, {asked}"
        return (
            f"`convert({name}, {budget.text})`: no plan stays within {asked}. The least feasible budget is {least}"
            f" bytes ({size(least)}, {least / self.peak:.1%} of the plain model's {size(self.peak)}). Its peak is held"
            + "\n  ".join([" by", *held[:3]])
        )

"""The ways to run a forward, each with its planner: the fastest plan of all for a budget, and the least budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from revfx.errors import BudgetError
from revfx.fit.budget import Budget, as_memory
from revfx.fit.choose import Planner
from revfx.fit.holders import layer_at_peak, list_holders
from revfx.fit.plan import Plan
from revfx.fit.simulate import OVERHEAD, Load, Model
from revfx.units import size


USED = 0.9  # of a budget, by a plan that is carried over to other sizes, at least
DEAR = 0.25  # of a step's time: what inverting takes at least


class Chosen(NamedTuple):
    """A plan for one of the ways, what it holds, the seconds that it takes more than the plain step, and the step for a
    caller who holds the outputs and computes a large loss.
    """

    way: str
    plan: Plan
    load: Load
    seconds: float
    model: Model

    @property
    def holders(self) -> list[str]:
        """What is there at its peak, largest first."""
        return list_holders(self.model, self.plan, self.load)


@dataclass
class Survey:
    """The planner of the plain way, and what returns that of the reversible one, if there is any.

    `margin`: the least budget that is told is larger by this part, as other steps may differ by some bytes.
    """

    plain: Planner
    reversible: Callable[[], Planner | None]
    margin: float = 0.0

    @property
    def peak(self) -> int:
        """Return the most bytes that the plain step holds."""
        return self.plain.plain[1].peak

    def best(self, budget: Budget) -> Chosen | None:
        """Return the fastest plan that is found to stay within the budget; None if none does.

        A budget in bytes holds for any caller if that is possible. A share is compared with the plain step of the same
        caller, and so are bytes that are too few for any caller: both are refused at the same point.
        """
        asked, plain = budget.of(self.peak), self._chosen("plain", self.plain, self.plain.plain)
        if budget.share == 1:
            return plain
        found = None if budget.share is not None else self._fastest(asked, lambda planner: planner)
        if found is None:
            found = self._fastest(asked, lambda planner: planner.with_credit(asked, self.plain))
        return plain if found is None and asked >= self.peak else found

    def carried(self, known: Chosen, budget: Budget) -> Chosen | None:
        """Return the plan of a step that is the same but for sizes; None if it exceeds the budget, or leaves much."""
        asked = budget.of(self.peak)
        planner = self.plain if budget.share is None else self.plain.with_credit(asked, self.plain)
        plan, needs = replace(known.plan, needs=planner.needs), planner.needs
        if not (plan.marks <= needs.marks and plan.coins <= needs.coins.keys()):
            return None
        try:
            load = planner.model.load(plan)
        except LookupError:
            return None
        if not USED * asked <= load.peak_with(planner.model.credit, needs.tape.turn) <= asked:
            return None
        return self._chosen("plain", planner, (plan, load))

    def _fastest(self, asked: int, version: Callable[[Planner], Planner]) -> Chosen | None:
        """Return the fastest plan of both ways, by one version of their planners.

        Inverting runs functions again, so it is not looked for where the plain way takes less than that.
        """
        found = self._chosen("plain", self.plain, version(self.plain).best(asked))
        if (found is None or found.seconds > DEAR * self.plain.seconds) and (other := self.reversible()) is not None:
            both = found, self._chosen("reversible", other, version(other).best(asked))
            found = min(filter(None, both), key=lambda c: c.seconds, default=None)
        return found

    def _chosen(self, way: str, planner: Planner, found: tuple[Plan, Load] | None) -> Chosen | None:
        ops = len(planner.needs.tape.ops) - len(self.plain.needs.tape.ops)
        more = planner.seconds - self.plain.seconds + OVERHEAD * ops
        return None if found is None else Chosen(way, *found, found[1].seconds + more, planner.model)

    def least(self) -> Chosen:
        """Return the plan with the smallest peak."""
        found = [self._chosen("plain", self.plain, f) for f in (self.plain.plain, self.plain.least())]
        if (other := self.reversible()) is not None:
            found.append(self._chosen("reversible", other, other.least()))
        return min(filter(None, found), key=lambda c: c.load.peak)

    def refusal(self, name: str, inputs: str, budget: Budget, when: str, forwards: int = 1) -> BudgetError:
        """Return the error that says that no plan stays within the budget.

        Args:
            name: the model's class.
            inputs: the shapes of its inputs, as text.
            budget: the budget that is refused.
            when: a sentence that says what of the step has run.
            forwards: how many share what was asked; the budget is what each has.
        """
        chosen = self.least()
        least, asked = forwards * int(chosen.load.peak * (1 + self.margin)), forwards * budget.of(self.peak)
        limit = size(asked)
        if budget.share is not None:
            limit = f"{budget.share:.0%} of {size(self.peak)}, {limit}"
        layer = layer_at_peak(chosen.model, chosen.load)
        text = (
            f"`convert({name}, {budget.text})`: no plan for {inputs} stays within {limit}. The least feasible budget is"
            f" {least} bytes ({size(least)}, {least / self.peak:.1%} of the plain model's {size(self.peak)})."
            f" {when}"
            f' Write `revfx.convert(model, memory="{as_memory(least)}")`, or make'
            f" {f'`{layer}`' if layer else 'the model itself'} smaller, which holds the peak of the smallest plan:"
        )
        return BudgetError("\n  ".join([text, *chosen.holders[:3]]), least, asked)

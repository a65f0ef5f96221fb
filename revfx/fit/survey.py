"""The ways to run a forward, each with its planner: the fastest plan of all for a budget, and the least budget."""

from __future__ import annotations

from collections.abc import Callable, Reversible
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

from revfx.errors import BudgetError
from revfx.fit.bound import least_seconds
from revfx.fit.budget import Budget, as_memory
from revfx.fit.inverted import Inverted, InvertedStep
from revfx.fit.peak_report import layer_at_peak, list_holders
from revfx.fit.plan import Plan
from revfx.fit.planner import Planner
from revfx.fit.simulate import Load, Model
from revfx.units import size


USED = 0.9  # of a budget, by a plan that is carried over to other sizes, at least
DEAR = 0.25  # of a step's time: inverting takes at least so much
NOTHING = Inverted()


class Chosen(NamedTuple):
    """A plan for a step.

    Attributes:
        inverted: couplings that are inverted in it.
        plan: for all other saved tensors.
        load: the bytes of the step, and its seconds beyond the plain one.
        seconds: that it takes more than the plain step.
        model: the step for a caller who holds the outputs and computes a large loss.
    """

    inverted: Inverted
    plan: Plan
    load: Load
    seconds: float
    model: Model

    @property
    def holders(self) -> list[str]:
        """The tensors at its peak, largest first."""
        return list_holders(self.model, self.plan, self.load)


@dataclass
class Survey:
    """The planner of a step, and those of the same step with couplings inverted.

    `margin`: the least budget in messages is larger by this part, as other steps may differ by some bytes.
    """

    plain: Planner
    inverting: Reversible[InvertedStep] = ()
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
        asked, plain = budget.of(self.peak), self._without(self.plain.plain)
        if budget.share == 1:
            return plain
        found = None if budget.share is not None else self._fastest(asked, lambda planner: planner)
        if found is None:
            credit = self.plain.credit(asked)
            found = self._fastest(asked, lambda planner: planner.with_credit(credit))
        return plain if found is None and asked >= self.peak else found

    def fits(self, budget: Budget) -> bool:
        """Return whether `best` finds a plan, without a search for a fast one."""
        asked = budget.of(self.peak)
        credit = self.plain.credit(asked)
        if asked >= self.peak or self.plain.small.within(asked, credit) is not None:
            return True
        small = [(step, step.planner.small.within(asked, credit)) for step in islice(self.inverting, 1)]
        return any(plan is not None and step.can_follow(plan) for step, plan in small)

    def carried(self, known: Chosen, budget: Budget) -> Chosen | None:
        """Return the plan of a step that is the same but for sizes; None if it exceeds the budget, or leaves much."""
        asked = budget.of(self.peak)
        planner = self.plain if budget.share is None else self.plain.with_credit(self.plain.credit(asked))
        plan, needs = replace(known.plan, needs=planner.needs), planner.needs
        if known.inverted.units or not (
            plan.compressed <= needs.compressed and plan.dropout_masks <= needs.dropout_masks.keys()
        ):
            return None
        try:
            load = planner.model.load(plan)
        except LookupError:
            return None
        if not USED * asked <= load.peak_with(planner.model.credit, needs.tape.backward_start) <= asked:
            return None
        return Chosen(NOTHING, plan, load, load.seconds, planner.model)

    def _fastest(self, asked: int, version: Callable[[Planner], Planner]) -> Chosen | None:
        """Return the fastest plan of all, by one version of the planners.

        Inverting runs functions again, so it is not looked for where a plan without takes less than that.
        """
        found = self._without(version(self.plain).best(asked))
        if found is not None and found.seconds <= DEAR * self.plain.seconds:
            return found
        if found is None:
            for step in self.inverting:
                best = version(step.planner).best(asked)
                if best is None:  # with less inverted, a step holds more
                    break
                found = min(filter(None, (found, self._with(step, best))), key=lambda c: c.seconds, default=None)
            return found
        for step in reversed(self.inverting):
            other = self._with(step, version(step.planner).best(asked))
            if other is not None:
                if other.seconds >= found.seconds:  # with more inverted, a step rarely gets faster again
                    break
                found = other
        return found

    def _without(self, found: tuple[Plan, Load] | None) -> Chosen | None:
        """Return a plan in which nothing is inverted."""
        return None if found is None else Chosen(NOTHING, *found, found[1].seconds, self.plain.model)

    def _with(self, step: InvertedStep, found: tuple[Plan, Load] | None) -> Chosen | None:
        """Return a plan of a step in which couplings are inverted; None if the engine can't carry it out."""
        if found is None or not step.can_follow(found[0]):
            return None
        more = step.planner.seconds - self.plain.seconds
        return Chosen(step.inverted, *found, found[1].seconds + more, step.planner.model)

    def bound(self, chosen: Chosen, budget: Budget) -> float:
        """Return seconds more than the plain step that no plan within a budget is below.

        It holds for plans with the same inverted couplings as `chosen`, which is within the budget.

        Raises:
            ImportError: scipy is missing.
        """
        asked, model = budget.of(self.peak), chosen.model
        if budget.share is not None or model.load(chosen.plan).peak > asked:
            model = replace(model, credit=self.plain.credit(asked))
        inverting = chosen.seconds - chosen.load.seconds
        return inverting + least_seconds(model, asked)

    def least(self) -> Chosen:
        """Return the plan with the smallest peak."""
        found = [*map(self._without, (self.plain.plain, self.plain.least()))]
        for step in islice(self.inverting, 1):
            found.append(self._with(step, step.planner.least()))
        return min(filter(None, found), key=lambda c: c.load.peak)

    def refusal(self, name: str, inputs: str, budget: Budget, when: str, forwards: int = 1) -> BudgetError:
        """Return the error that says that no plan stays within the budget.

        Args:
            name: the model's class.
            inputs: the shapes of its inputs, as text.
            budget: the budget that is refused.
            when: a sentence that says which part of the step has run.
            forwards: how many share the budget that was asked for; `budget` is the part of one.
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

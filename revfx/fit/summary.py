"""Summaries of budget plans."""

from __future__ import annotations

from collections.abc import Collection

from revfx.fit.needs import Needs
from revfx.fit.survey import Chosen, Survey
from revfx.info import Amount, BudgetPlan


def summarize(survey: Survey, chosen: Chosen, inputs: str, budget: int, planning: float) -> BudgetPlan:
    """Summarize a plan.

    Args:
        survey: the planners of which one made the plan.
        chosen: the plan.
        inputs: the model's class and the shapes of its inputs, as text.
        budget: bytes.
        planning: seconds that the search took.
    """
    plan, needs = chosen.plan, chosen.plan.needs
    saved, coins = _saved(needs), {needs.coins[v] for v in plan.coins}
    kept = saved & plan.kept
    marked = {v for v in saved - kept if v in coins or plan.marks.issuperset(needs.wanted[v])}
    ways = [_amount(needs, values) for values in (kept, saved - kept - marked, marked)]
    plain, mine = _amount(survey.plain.needs, _saved(survey.plain.needs)), _amount(needs, saved)
    ways.append(Amount(max(0, plain.tensors - mine.tensors), max(0, plain.bytes - mine.bytes)))
    time = 1 + chosen.seconds / max(survey.plain.seconds, 1e-9)
    return BudgetPlan(inputs, budget, chosen.load.peak, survey.peak, time, planning, *ways)


def _saved(needs: Needs) -> set[int]:
    """Return the saved values, without arguments of compiled parts."""
    return {v for v, packs in needs.wanted.items() if packs}


def _amount(needs: Needs, values: Collection[int]) -> Amount:
    return Amount(len(values), sum(map(needs.tape.size, values)))

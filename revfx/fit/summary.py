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
    saved, dropout_masks = _saved(needs), {needs.dropout_masks[v] for v in plan.dropout_masks}
    kept = saved & plan.kept
    compressed = {v for v in saved - kept if v in dropout_masks or plan.compressed.issuperset(needs.keepable[v])}
    ways = [_amount(needs, values) for values in (kept, saved - kept - compressed, compressed)]
    plain, mine = _amount(survey.plain.needs, _saved(survey.plain.needs)), _amount(needs, saved)
    ways.append(Amount(max(0, plain.tensors - mine.tensors), max(0, plain.bytes - mine.bytes)))
    time = 1 + chosen.seconds / max(survey.plain.seconds, 1e-9)
    return BudgetPlan(inputs, budget, chosen.load.peak, survey.peak, time, planning, *ways)


def _saved(needs: Needs) -> set[int]:
    """Return the saved values, without arguments of compiled parts."""
    return {v for v, saved in needs.keepable.items() if saved}


def _amount(needs: Needs, values: Collection[int]) -> Amount:
    return Amount(len(values), sum(map(needs.tape.size, values)))

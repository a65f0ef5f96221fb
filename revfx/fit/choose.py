"""The planner for a budget: a dynamic program over the blocks of the forward, with plans that are simulated whole.

The blocks before a block hold H bytes beside its own. The least seconds of the first j blocks with H bytes held are

    time[j][H] = min over runs of blocks i..j and their entries of time[i][H - held] + seconds,
                 where H - held + peak <= budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, product

import torch

from revfx.fit.costs import Cost
from revfx.fit.needs import Needs
from revfx.fit.plan import Plan
from revfx.fit.polish import Found, lower_peak, polished
from revfx.fit.runs import Entry, Runs
from revfx.fit.simulate import Credit, Load, Model


BINS = 512  # of the budget, in which held bytes are counted
NESTED = (2, 4, 8, 16, 32)  # blocks in a row of which none is kept but the input
LOSS = 4  # times the outputs: the bytes of a loss like `(y - 1).square().mean()`, beside outputs and gradient
TRIES = 10  # budgets that are given to the dynamic program until its plans, simulated, are as near as they get
NEAR = 1 / 256  # of the budget: how near that is

_NO_CREDIT = Credit()


class Planner:
    """Plans of one step.

    `any_caller`: plans stay within a budget for any caller, who may hold the outputs until the backward ends, and may
    compute a loss of `LOSS` times their bytes. `like`: another planner of the same step, for its results. `credit`: see
    `Credit`.
    """

    def __init__(
        self,
        needs: Needs,
        costs: Sequence[Cost],
        any_caller: bool = False,
        like: Planner | None = None,
        credit: Credit = _NO_CREDIT,
    ) -> None:
        self.needs, self.costs, self.seconds = needs, costs, needs.tape.seconds + sum(c.seconds for c in costs)
        self.model = Model(needs, costs, any_caller, LOSS * needs.tape.loss * any_caller, credit)
        self.runs = Runs(self.model, {} if like is None else like.runs.entries)
        self.small = SmallPlans(self.runs) if like is None else like.small
        everything = Plan(needs, frozenset(needs.wanted), frozenset(), frozenset(), [0] * needs.tape.turn)
        self.plain = everything, Model(needs, costs).load(everything)

    def credit(self, budget: int) -> Credit:
        """Return what a budget allows beyond it if it is compared with this plain step of the same caller."""
        turn, peak = self.needs.tape.turn, self.plain[1].peak
        load = self.model.load(self.plain[0])  # of the plain step of a caller who takes the most
        backward = load.live[2 * turn : 2 * turn + 1] + load.live[2 * turn + 2 :]
        share = min(1.0, max(0.0, budget / peak))
        return Credit(int(share * max(0, load.live[2 * turn + 1] - peak)), int(share * max(0, max(backward) - peak)))

    def with_credit(self, credit: Credit) -> Planner:
        """Return a planner of the same step whose plans may take a credit."""
        return Planner(self.needs, self.costs, True, self, credit)

    def best(self, budget: int) -> tuple[Plan, Load] | None:
        """Return the fastest known plan within the budget, and its load.

        Return None if the budget is infeasible; that does not depend on measured times.
        """
        fallback = self.small.within(budget, self.model.credit)
        if fallback is None:
            return None
        load = self.model.load(self.plain[0])
        if load.peak <= budget:
            return self.plain[0], load
        found: tuple[Plan, Load] | None = None
        asked, low, high = budget, 0, 2 * budget  # the program does not see the bytes between runs
        for n in range(TRIES):
            tried = plan_of_runs(self.runs, asked)
            over = 0 if tried is None else tried[1].peak - budget
            if over > 0:
                high = asked
            else:
                low = asked
                found = min(filter(None, (found, tried)), key=lambda f: f[1].seconds, default=None)
            near = asked - over * (2**n if over > 0 else 1)  # further down each time, as plans come in steps
            asked = near if low < near < high else (low + high) // 2
            if high - low <= budget * NEAR or (tried is not None and 0 <= -over <= budget * NEAR):
                break
        found = found or (fallback, self.model.load(fallback))
        needs, everything = self.needs, self.plain[0]
        by_blocks = replace(everything, block_of=self.runs.blocks.of_operators())
        told = {v for v, packs in needs.wanted.items() if packs and needs.marks >= {*packs}}
        kept = everything.kept.difference(told, needs.coins.values())
        masked = replace(everything, kept=kept, marks=frozenset(needs.marks), coins=frozenset(needs.coins))
        return polished(self.model, (everything, by_blocks, masked), found, budget)

    def least(self) -> tuple[Plan, Load]:
        """Return the known plan with the smallest peak, and its load."""
        plan = self.small.least
        return plan, self.model.load(plan)


class SmallPlans:
    """A search for plans with small peaks, which always finds the same ones for a model and its inputs.

    It does not look at times, which differ from run to run. A budget is feasible if one of its plans stays within it.
    """

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.found: list[Found] = []  # so far, in the order of the search, which is the same for all budgets
        self.rest = self._plans()

    def within(self, budget: int, credit: Credit) -> Plan | None:
        """Return the first plan that stays within the budget; None if none does."""
        for plan, load in chain(self.found, self._more()):
            if load.peak_with(credit, plan.needs.tape.turn) <= budget:
                return plan
        return None

    @property
    def least(self) -> Plan:
        """Return the plan with the smallest peak."""
        self.found += self.rest
        return min(self.found, key=lambda f: f[1].peak)[0]

    def _more(self) -> Iterator[Found]:
        for found in self.rest:
            self.found.append(found)
            yield found

    def _plans(self) -> Iterator[Found]:
        model, needs = self.runs.model, self.runs.needs
        everything = Plan(needs, frozenset(needs.wanted), frozenset(), frozenset(), [0] * needs.tape.turn)
        best = everything, model.load(everything)
        yield best
        low, high = 0, best[1].peak
        while high - low > max(1, high * NEAR):
            asked = (low + high) // 2
            tried = plan_of_runs(self.runs, asked, timed=False)
            if tried is None:
                low = asked
                continue
            high = asked
            best = min(best, tried, key=lambda f: f[1].peak)
            yield tried
        yield lower_peak(model, best)


def plan_of_runs(runs: Runs, budget: int, timed: bool = True) -> Found | None:
    """Return the fastest plan of runs that fit one by one, and its load; None if there is none.

    If it is not `timed`, it is the fastest one by estimates from sizes, which is always the same one.
    """
    unit, n = max(1, -(-budget // BINS)), len(runs.blocks)
    kinds = [(x, False) for x in range(1, runs.merged + 1)] + [(x, True) for x in NESTED]
    # the least seconds by borders and held bins, and how they come about: the earlier border, its bins, the entry
    times = torch.full((n + 1, BINS + 1), math.inf, dtype=torch.float64)
    back: list[dict[int, tuple[int, int, Entry]]] = [{} for _ in range(n + 1)]
    times[0, 0] = 0.0
    for i, (length, nested) in product(range(n), kinds):
        j = i + length
        for e, peak in runs[i, j, nested][1] if j <= n and times[i].isfinite().any() else ():
            held = -(-e.held // unit)
            stop = min((budget - peak) // unit, BINS - held) + 1
            if stop > 0 and (timed or e.is_untimed):
                new = times[i, :stop] + (e.seconds if timed else e.estimate)
                old = times[j, held : held + stop]
                for h in (new < old).nonzero().flatten().tolist():
                    back[j][h + held] = i, h, e
                torch.minimum(new, old, out=old)
    held = int(times[n].argmin())
    if math.isinf(times[n, held]):
        return None
    chosen, j = list[tuple[int, int, Entry]](), n
    while j:
        i, held, e = back[j][held]
        chosen.append((i, j, e))
        j = i
    plan = _whole(runs, chosen)
    try:
        return plan, runs.model.load(plan)
    except LookupError:
        return None


def _whole(runs: Runs, chosen: Sequence[tuple[int, int, Entry]]) -> Plan:
    borders, own = runs.blocks.borders, runs.blocks.of_operators()
    kept = {v for v in runs.needs.wanted if runs.needs.tape.made_by[v] is None}
    marks, coins = set[int](), set[int]()
    for i, j, e in chosen:
        run = runs[i, j, e.nested][0]
        c = e.choice.renamed(dict(enumerate(run.values)), dict(enumerate(run.packs)))
        kept, marks, coins = kept | c.kept, marks | c.marks, coins | c.coins
        if not e.nested:
            own[borders[i] : borders[j]] = [i] * (borders[j] - borders[i])
    return Plan(runs.needs, frozenset(kept), frozenset(marks), frozenset(coins), own)

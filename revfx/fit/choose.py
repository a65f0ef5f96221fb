"""Choosing a plan for a budget: a dynamic program over the blocks of the forward, whose plans are simulated whole.

Beside what a block needs itself lies what the blocks before it hold, H bytes. The least seconds that the first j blocks
can take so that H bytes are held are

    time[j][H] = min over runs of blocks i..j and their entries of time[i][H - held] + seconds,
                 where H - held + peak <= budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import torch

from revfx.fit.budget import Budget
from revfx.fit.costs import Cost
from revfx.fit.needs import Needs
from revfx.fit.plan import Plan
from revfx.fit.polish import polished
from revfx.fit.runs import MERGED, Entry, Runs
from revfx.fit.simulate import Load, Model


BINS = 512  # of the budget, in which held bytes are counted
NESTED = (2, 3, 4, 6, 8, 12, 16, 24, 32)  # blocks in a row of which none is kept but the input
LOSS = 4  # times what the forward returns is what a loss makes of it at most: `y.square().mean()` in its backward
TRIES = 10  # budgets that are given to the dynamic program until its plans, simulated, are as near as they get
NEAR = 1 / 256  # of the budget: how near that is


class Planner:
    """Plans of one step."""

    def __init__(self, needs: Needs, costs: Sequence[Cost]) -> None:
        self.needs, self.seconds, self.runs = needs, sum(c.seconds for c in costs), Runs(needs, costs)
        self.model = self.runs.model
        everything = Plan(needs, frozenset(needs.wanted), frozenset(), frozenset(), [0] * needs.tape.turn)
        self.plain = everything, self.model.load(everything)

    def bytes_of(self, budget: Budget, plain: Planner) -> int:
        """Return what a plan may take, and have simulations count what is not known: whether the caller holds what the
        forward returns until the backward ends, and what a loss outside takes.

        Of a share, both the plain step and that of the plan are those of one caller, whichever it is.
        """
        tape, load, turn = self.needs.tape, plain.plain[1], 2 * plain.needs.tape.turn + 1
        returned, loss = sum(m.size for m in tape.returned), LOSS * tape.loss
        if budget.share is not None:
            holding = max(load.peak, max(load.live[turn:]) + plain.model.returned)
            returned = max(0, returned - int(budget.share * (holding - load.peak)))
            more = loss - (load.peak - load.live[turn])  # by which the loss may raise the plain peak as well
            loss -= max(0, int(budget.share * more))
        self.model = self.runs.model = Model(self.needs, self.model.costs, returned, loss)
        self.runs.found.clear()
        return budget.of(load.peak)

    def best(self, budget: int) -> tuple[Plan, Load] | None:
        """Return the fastest plan that is found to stay within the budget, and what it holds; None if none does."""
        load = self.model.load(self.plain[0])
        if load.peak <= budget:
            return self.plain[0], load
        found: tuple[Plan, Load] | None = None
        asked, low, high = budget, 0, 2 * budget  # the program knows nothing of what lies between runs
        for n in range(TRIES):
            tried = self.plan(asked)
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
        if found is None:
            least = self.least()
            found = least if least[1].peak <= budget else None
        needs, everything = self.needs, self.plain[0]
        by_blocks = replace(everything, block_of=self.runs.blocks.of_operators())
        told = {v for v, packs in needs.wanted.items() if packs and needs.marks.keys() >= {*packs}}
        kept = everything.kept.difference(told, needs.coins.values())
        masked = replace(everything, kept=kept, marks=frozenset(needs.marks), coins=frozenset(needs.coins))
        return polished(self.model, (everything, by_blocks, masked), found, budget)

    def least(self) -> tuple[Plan, Load]:
        """Return the plan with the least peak that is found, and what it holds."""
        found = self.plain[0], self.model.load(self.plain[0])
        low, high = 0, found[1].peak
        while high - low > max(1, high * NEAR):
            asked = (low + high) // 2
            tried = self.plan(asked)
            if tried is None:
                low = asked
            else:
                high, found = asked, min(found, tried, key=lambda f: f[1].peak)
        return found

    def plan(self, budget: int) -> tuple[Plan, Load] | None:
        """Return the fastest plan of runs that fit, each for itself, and what it holds; None if there is none."""
        unit, n = max(1, -(-budget // BINS)), len(self.runs.blocks)
        kinds = [(x, False) for x in range(1, MERGED + 1)] + [(x, True) for x in NESTED]
        # the least seconds by borders and held bins, and how they come about: the earlier border, its bins, the entry
        times = torch.full((n + 1, BINS + 1), math.inf, dtype=torch.float64)
        back: list[dict[int, tuple[int, int, Entry]]] = [{} for _ in range(n + 1)]
        times[0, 0] = 0.0
        for i, (length, nested) in product(range(n), kinds):
            j = i + length
            if length > 1 and j <= n and len(self.runs.units(i, j)) > 1:
                continue
            for e, peak in self.runs[i, j, nested][1] if j <= n and times[i].isfinite().any() else ():
                held = -(-e.held // unit)
                stop = min((budget - peak) // unit, BINS - held) + 1
                if stop > 0:
                    new, old = times[i, :stop] + e.seconds, times[j, held : held + stop]
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
        plan = self._whole(chosen)
        try:
            return plan, self.model.load(plan)
        except LookupError:
            return None

    def _whole(self, chosen: Sequence[tuple[int, int, Entry]]) -> Plan:
        borders, own = self.runs.blocks.borders, self.runs.blocks.of_operators()
        kept = {v for v in self.needs.wanted if self.needs.tape.made_by[v] is None}
        marks, coins = set[int](), set[int]()
        for i, j, e in chosen:
            run = self.runs[i, j, e.nested][0]
            c = e.choice.renamed(dict(enumerate(run.values)), dict(enumerate(run.packs)))
            kept, marks, coins = kept | c.kept, marks | c.marks, coins | c.coins
            if not e.nested:
                own[borders[i] : borders[j]] = [i] * (borders[j] - borders[i])
        return Plan(self.needs, frozenset(kept), frozenset(marks), frozenset(coins), own)

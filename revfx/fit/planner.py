"""The planner for a budget: a dynamic program over the blocks of the forward, whose plans are then simulated.

Let H be the bytes that the first j blocks hold for the backward. Their least time is

    time[j][H] = min over ranges of blocks i..j and their entries of time[i][H - held] + seconds,
                 where H - held + peak <= budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, product

import torch

from revfx.fit.block_ranges import BlockRanges, Entry
from revfx.fit.costs import Cost
from revfx.fit.local_search import LocalSearch, SimulatedPlan, search_locally
from revfx.fit.needs import Needs
from revfx.fit.plan import Plan
from revfx.fit.simulate import Credit, Load, Model


BINS = 512  # parts of the budget in which held bytes are counted
NESTED_BLOCKS = (2, 4, 8, 16, 32)  # lengths of ranges of blocks of which only the input is kept
LOSS_RATIO = (
    4  # bytes of a loss such as `(y - 1).square().mean()`, beside outputs and gradient, by those of the outputs
)
MAX_TRIES = 10  # budgets that the dynamic program is run for, until its simulated plans come near the one asked for
NEAR = 1 / 256  # share of the budget that is near enough

_NO_CREDIT = Credit()


class Planner:
    """The search for plans of one step.

    Args:
        any_caller: plans hold for any caller, who may hold the outputs until the backward ends, and may compute a loss
            of `LOSS_RATIO` times their bytes.
        like: another planner of the same step, whose results are used.
        credit: see `Credit`.
    """

    def __init__(
        self,
        needs: Needs,
        costs: Sequence[Cost],
        any_caller: bool = False,
        like: Planner | None = None,
        credit: Credit = _NO_CREDIT,
    ) -> None:
        self.needs: Needs = needs
        self.costs: Sequence[Cost] = costs
        self.seconds: float = needs.tape.seconds + sum(c.seconds for c in costs)
        self.model: Model = Model(needs, costs, any_caller, LOSS_RATIO * needs.tape.output_bytes * any_caller, credit)
        self.ranges: BlockRanges = BlockRanges(self.model, {} if like is None else like.ranges.entries)
        self.small: SmallPlans = SmallPlans(self.ranges) if like is None else like.small
        everything = Plan(needs, frozenset(needs.keepable), frozenset(), frozenset(), [0] * needs.tape.backward_start)
        # The load as measured: without the loss and the outputs of a caller, which `self.model` adds.
        self.plain: tuple[Plan, Load] = everything, Model(needs, costs).load(everything)

    def credit(self, budget: int) -> Credit:
        """Return the plain step's excess for this caller over the plain peak, scaled by budget / peak."""
        backward_start, peak = self.needs.tape.backward_start, self.plain[1].peak
        load = self.model.load(self.plain[0])  # of the plain step of a caller who takes the most
        backward = load.live[2 * backward_start : 2 * backward_start + 1] + load.live[2 * backward_start + 2 :]
        share = min(1.0, max(0.0, budget / peak))
        return Credit(
            int(share * max(0, load.live[2 * backward_start + 1] - peak)), int(share * max(0, max(backward) - peak))
        )

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
        asked, low, high = budget, 0, 2 * budget  # simulated peaks differ from the dynamic program's
        for n in range(MAX_TRIES):
            simulated = plan_of_ranges(self.ranges, asked)
            over = 0 if simulated is None else simulated[1].peak - budget
            if over > 0:
                high = asked
            else:
                low = asked
                found = min(filter(None, (found, simulated)), key=lambda f: f[1].seconds, default=None)
            near = asked - over * (2**n if over > 0 else 1)  # further down each time, as plans come in steps
            asked = near if low < near < high else (low + high) // 2
            if high - low <= budget * NEAR or (simulated is not None and 0 <= -over <= budget * NEAR):
                break
        found = found or (fallback, self.model.load(fallback))
        needs, everything = self.needs, self.plain[0]
        # Also start from keeping everything: as one unit, by blocks, and with bits in place of values.
        by_blocks = replace(everything, block_of=self.ranges.blocks.of_operators())
        as_bits = {v for v, saved in needs.keepable.items() if saved and needs.compressed >= {*saved}}
        kept = everything.kept.difference(as_bits, needs.dropout_masks.values())
        masked = replace(
            everything, kept=kept, compressed=frozenset(needs.compressed), dropout_masks=frozenset(needs.dropout_masks)
        )
        return search_locally(self.model, (everything, by_blocks, masked), found, budget)

    def least(self) -> tuple[Plan, Load]:
        """Return the known plan with the smallest peak, and its load."""
        plan = self.small.least
        return plan, self.model.load(plan)


class SmallPlans:
    """A search for plans with small peaks, which always finds the same ones for a model and its inputs.

    It does not look at times, which differ from run to run. A budget is feasible if one of its plans stays within it.
    """

    def __init__(self, ranges: BlockRanges) -> None:
        self.ranges = ranges
        self.found: list[SimulatedPlan] = []  # so far, in the order of the search, which is the same for all budgets
        self.rest: Iterator[SimulatedPlan] = self._plans()

    def within(self, budget: int, credit: Credit) -> Plan | None:
        """Return the first plan that stays within the budget; None if none does."""
        for plan, load in chain(self.found, self._more()):
            if load.peak_with(credit, plan.needs.tape.backward_start) <= budget:
                return plan
        return None

    @property
    def least(self) -> Plan:
        """Return the plan with the smallest peak."""
        self.found += self.rest
        return min(self.found, key=lambda f: f[1].peak)[0]

    def _more(self) -> Iterator[SimulatedPlan]:
        for found in self.rest:
            self.found.append(found)
            yield found

    def _plans(self) -> Iterator[SimulatedPlan]:
        model, needs = self.ranges.model, self.ranges.needs
        everything = Plan(needs, frozenset(needs.keepable), frozenset(), frozenset(), [0] * needs.tape.backward_start)
        best = everything, model.load(everything)
        yield best
        low, high = 0, best[1].peak
        while high - low > max(1, high * NEAR):
            asked = (low + high) // 2
            simulated = plan_of_ranges(self.ranges, asked, timed=False)
            if simulated is None:
                low = asked
                continue
            high = asked
            best = min(best, simulated, key=lambda f: f[1].peak)
            yield simulated
        yield LocalSearch.of(model, 0).reduce_peak(best)


def plan_of_ranges(ranges: BlockRanges, budget: int, timed: bool = True) -> SimulatedPlan | None:
    """Return the fastest plan of ranges, each of which fits within the budget, and its load; None if there is none.

    Unless `timed`, times are estimated from sizes, so the result is the same in every run.
    """
    unit, n = max(1, -(-budget // BINS)), len(ranges.blocks)
    kinds = [(x, False) for x in range(1, ranges.merged + 1)] + [(x, True) for x in NESTED_BLOCKS]
    # times[j, h]: the least seconds of the first j blocks with h bins held; back[j, h]: the step that ends there
    times = torch.full((n + 1, BINS + 1), math.inf, dtype=torch.float64)
    back = torch.full((n + 1, BINS + 1), -1)
    steps = list[tuple[int, int, int, Entry]]()  # from one border to another, with the bins that the entry holds
    times[0, 0] = 0.0
    for i, (length, nested) in product(range(n), kinds):
        j = i + length
        if j > n or not times[i].isfinite().any():
            continue
        for e, peak in ranges[i, j, nested][1]:
            held = -(-e.held // unit)
            stop = min((budget - peak) // unit, BINS - held) + 1
            if stop > 0 and (timed or e.is_untimed):
                new = times[i, :stop] + (e.seconds if timed else e.estimate)
                is_faster = new < times[j, held : held + stop]
                back[j, held : held + stop].masked_fill_(is_faster, len(steps))
                torch.minimum(new, times[j, held : held + stop], out=times[j, held : held + stop])
                steps.append((i, j, held, e))
    held = int(times[n].argmin())
    if math.isinf(times[n, held]):
        return None
    # Follow the steps back from the last border.
    chosen, j = list[tuple[int, int, Entry]](), n
    while j:
        i, j, own, e = steps[int(back[j, held])]
        chosen.append((i, j, e))
        j, held = i, held - own
    plan = _combine_entries(ranges, chosen)
    try:
        return plan, ranges.model.load(plan)
    except LookupError:
        return None


def _combine_entries(ranges: BlockRanges, chosen: Sequence[tuple[int, int, Entry]]) -> Plan:
    borders, own = ranges.blocks.borders, ranges.blocks.of_operators()
    kept = {v for v in ranges.needs.keepable if ranges.needs.tape.made_by[v] is None}
    compressed, dropout_masks = set[int](), set[int]()
    for i, j, e in chosen:
        block_range = ranges[i, j, e.nested][0]
        c = e.choice.renamed(dict(enumerate(block_range.values)), dict(enumerate(block_range.saved)))
        kept, compressed, dropout_masks = kept | c.kept, compressed | c.compressed, dropout_masks | c.dropout_masks
        if not e.nested:
            own[borders[i] : borders[j]] = [i] * (borders[j] - borders[i])
    return Plan(ranges.needs, frozenset(kept), frozenset(compressed), frozenset(dropout_masks), own)

"""Local search over plans, each simulated as a whole.

The planner chooses among a few minimum cuts for each range of blocks; this search changes single choices of its plans.
For steps of few operators the result is near the optimum (see `tests/fit/test_oracle.py`); for long ones there is time
for few simulations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from revfx.fit.plan import Plan
from revfx.fit.simulate import Load, Model


MAX_SIMULATED_OPERATORS = 100_000  # of the forward, in all plans of a search together
MAX_EXCHANGES = 12  # faster plans over the budget that `shrink` is tried on, in each round

SimulatedPlan = tuple[Plan, Load]


@dataclass
class LocalSearch:
    """A search for faster plans within a budget of bytes; `left` is the number of simulations that remain."""

    model: Model
    budget: int
    left: int

    @classmethod
    def of(cls, model: Model, budget: int) -> LocalSearch:
        """Return a search with as many simulations as the size of the forward allows.

        The backward does not count: it is longer where gradients are added to earlier ones. Plans should not differ.
        """
        return cls(model, budget, MAX_SIMULATED_OPERATORS // (1 + model.needs.tape.backward_start))

    def simulate(self, plans: Iterable[Plan]) -> Iterator[SimulatedPlan]:
        """Yield the feasible plans with their loads, while simulations are left."""
        for plan in plans:
            if self.left <= 0:
                return
            with suppress(LookupError):
                yield plan, self.model.load(plan)
                self.left -= 1

    def shrink(self, found: SimulatedPlan) -> SimulatedPlan | None:
        """Return a plan within the budget; None if the search, or its simulations, end before.

        Each round makes the change with the least time per freed byte: it drops a value, or keeps its bits instead.
        """
        while (over := found[1].peak - self.budget) > 0:
            seconds = found[1].seconds
            best, least_rate = None, float("inf")
            for smaller in self.simulate(smaller_variants(found[0])):
                freed = over - max(0, smaller[1].peak - self.budget)
                if freed > 0:
                    rate = (smaller[1].seconds - seconds) / freed
                    if best is None or rate < least_rate:
                        best, least_rate = smaller, rate
            if best is None or self.left <= 0:
                return None
            found = best
        return found

    def speed_up(self, found: SimulatedPlan) -> SimulatedPlan:
        """Change one choice, or keep one value and drop others, until the plan gets no faster, or simulations end."""

        def is_faster(plan: SimulatedPlan, other: SimulatedPlan) -> bool:
            return plan[1].peak <= self.budget and plan[1].seconds < other[1].seconds

        while True:
            faster = self._faster_variants(found)
            if not faster:
                return found
            found = self._combined(faster, found[0], is_faster)

    def reduce_peak(self, found: SimulatedPlan) -> SimulatedPlan:
        """Return a plan with a small peak, by changes that make its soft peak smaller (see `Load.soft_peak`).

        Where several moments of the step are full, most changes lower only some of them, and so not the peak itself.
        """

        def is_smaller(plan: SimulatedPlan, other: SimulatedPlan) -> bool:
            return plan[1].soft_peak < other[1].soft_peak

        start = found
        while True:
            smaller = [f for f in self.simulate(variants(found[0])) if is_smaller(f, found)]
            if not smaller:
                return min(start, found, key=lambda f: f[1].peak)
            smaller.sort(key=lambda f: f[1].soft_peak)
            found = self._combined(smaller, found[0], is_smaller)

    def _combined(
        self, better: Sequence[SimulatedPlan], start: Plan, is_better: Callable[[SimulatedPlan, SimulatedPlan], bool]
    ) -> SimulatedPlan:
        """Return the first of some variants of a plan, with the choices of the others that make it better still.

        Args:
            better: the variants, best first; each differs from `start` in one choice.
            start: the plan.
            is_better: whether a plan is better than another one.
        """
        found = better[0]
        for plan, _ in better[1:]:
            for both in self.simulate([combine(found[0], start, plan)]):
                if is_better(both, found):
                    found = both
        return found

    def _faster_variants(self, found: SimulatedPlan) -> list[SimulatedPlan]:
        """Return the faster variants within the budget, fastest first; if there are none, one that is made to fit."""
        seconds = found[1].seconds
        faster = [f for f in self.simulate(quicker_variants(found[0])) if f[1].seconds < seconds]
        within = [f for f in faster if f[1].peak <= self.budget]
        if within:
            return sorted(within, key=lambda f: f[1].seconds)
        for near in sorted(faster, key=lambda f: f[1].peak)[:MAX_EXCHANGES]:
            smaller = self.shrink(near)
            if smaller is not None and smaller[1].seconds < seconds:
                return [smaller]
        return []


def combine(plan: Plan, start: Plan, other: Plan) -> Plan:
    """Return a plan with the change that `other` makes to `start`; a change that `plan` has already is taken back."""
    return replace(
        plan,
        kept=plan.kept ^ start.kept ^ other.kept,
        compressed=plan.compressed ^ start.compressed ^ other.compressed,
        dropout_masks=plan.dropout_masks ^ start.dropout_masks ^ other.dropout_masks,
    )


def variants(plan: Plan) -> Iterator[Plan]:
    """Yield plans in which one value more is kept, or one less."""
    yield from larger_variants(plan)
    yield from smaller_variants(plan)


def quicker_variants(plan: Plan) -> Iterator[Plan]:
    """Yield the variants that may be faster: those that still keep what the plan keeps."""
    yield from larger_variants(plan)
    for smaller in smaller_variants(plan):
        if smaller.kept == plan.kept:  # a recomputed value is stored as bits, or follows from a dropout mask
            yield smaller


def larger_variants(plan: Plan) -> Iterator[Plan]:
    """Yield plans in which one value more is kept; late ones first, as they are held shortest."""
    needs = plan.needs
    for v, saved in reversed(needs.keepable.items()):
        if v not in plan.kept and needs.tape.made_by[v] is not None:
            yield replace(plan, kept=plan.kept | {v}, compressed=plan.compressed.difference(saved))


def smaller_variants(plan: Plan) -> Iterator[Plan]:
    """Yield plans in which one value is not kept, or bits in its place, or the dropout mask that it follows from."""
    needs = plan.needs
    for v, saved in reversed(needs.keepable.items()):
        kept = plan.kept - {v}
        if needs.compressed >= {*saved} and not plan.compressed.issuperset(saved):
            yield replace(plan, kept=kept, compressed=plan.compressed.union(saved))
        if v in plan.kept and needs.tape.made_by[v] is not None:
            yield replace(plan, kept=kept)
    for mask, v in needs.dropout_masks.items():
        if mask not in plan.dropout_masks:
            yield replace(plan, kept=plan.kept - {v}, dropout_masks=plan.dropout_masks | {mask})


def search_locally(
    model: Model, starts: Sequence[Plan], found: SimulatedPlan | None, budget: int
) -> SimulatedPlan | None:
    """Return the fastest plan of a search from `found`, and for small steps from each of `starts` as well."""
    search = LocalSearch.of(model, budget)
    choices = sum(1 for _ in smaller_variants(starts[0]))  # to shrink a plan takes up to half the square of them
    if len(starts) * choices * choices // 2 < search.left:
        for start in starts:
            smaller = search.shrink((start, model.load(start)))
            if smaller is not None:
                faster = search.speed_up(smaller)
                found = min(filter(None, (found, faster)), key=lambda f: f[1].seconds)
    return None if found is None else search.speed_up(found)

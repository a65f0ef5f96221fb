"""Local search over plans, each simulated whole: the menus of the dynamic program hold one plan for each price of time
only. Small steps find the optimum in most of them; of large ones there is time for few choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from revfx.fit.plan import Plan
from revfx.fit.simulate import Load, Model


SIMULATED = 200_000  # operators, in all plans that are tried
PAIRS = 12  # values that there is no room for, which are tried in the place of another one

Found = tuple[Plan, Load]


@dataclass
class Search:
    """A search for faster plans within a budget, of so many simulations."""

    model: Model
    budget: int
    left: int

    def tried(self, plans: Iterator[Plan]) -> Iterator[Found]:
        """Yield feasible plans with their loads, as many as the search may simulate."""
        for plan in plans:
            if self.left <= 0:
                return
            with suppress(LookupError):
                yield plan, self.model.load(plan)
                self.left -= 1

    def brought_down(self, found: Found) -> Found | None:
        """Return a plan within the budget: values with the least time per freed byte are dropped first."""
        while (over := found[1].peak - self.budget) > 0:
            seconds = found[1].seconds
            rates = [
                ((f[1].seconds - seconds) / (over - now), n, f)
                for n, f in enumerate(self.tried(less(found[0])))
                if (now := max(0, f[1].peak - self.budget)) < over
            ]
            if not rates or self.left <= 0:
                return None
            found = min(rates)[2]
        return found

    def made_faster(self, found: Found) -> Found:
        """Return a plan that no single choice makes faster, nor a value kept in the place of others."""
        while True:
            faster = [f for f in self.tried(changed(found[0])) if f[1].seconds < found[1].seconds]
            fits = sorted((f for f in faster if f[1].peak <= self.budget), key=lambda f: f[1].seconds)
            if not fits:
                near = sorted(faster, key=lambda f: f[1].peak)[:PAIRS]
                down = (self.brought_down(f) for f in near)
                fits = [f for f in down if f is not None and f[1].seconds < found[1].seconds][:1]
            if not fits:
                return found
            start, found = found[0], fits[0]
            for plan, _ in fits[1:]:  # as many of them as there is room for
                for both in self.tried(iter([joined(found[0], start, plan)])):
                    if both[1].peak <= self.budget and both[1].seconds < found[1].seconds:
                        found = both


def lower_peak(model: Model, found: Found) -> Found:
    """Return a plan that no single choice gives a smaller peak, as far as the simulations suffice."""
    search = Search(model, 0, SIMULATED // len(model.needs.tape.ops))
    while True:
        lower = min(search.tried(changed(found[0])), key=lambda f: f[1].peak, default=found)
        if lower[1].peak >= found[1].peak:
            return found
        found = lower


def joined(plan: Plan, start: Plan, other: Plan) -> Plan:
    """Return a plan with the choices of `other` that differ from `start`."""
    kept, marks, coins = start.kept ^ other.kept, start.marks ^ other.marks, start.coins ^ other.coins
    return replace(plan, kept=plan.kept ^ kept, marks=plan.marks ^ marks, coins=plan.coins ^ coins)


def changed(plan: Plan) -> Iterator[Plan]:
    """Yield plans in which one value more is kept, or one less; late ones first, as they are held shortest."""
    needs = plan.needs
    for v, packs in reversed(needs.wanted.items()):
        if v not in plan.kept and needs.tape.made_by[v] is not None:
            yield replace(plan, kept=plan.kept | {v}, marks=plan.marks.difference(packs))
    yield from less(plan)


def less(plan: Plan) -> Iterator[Plan]:
    """Yield plans in which one value less is kept: none of it, or its mark, or its coin."""
    needs = plan.needs
    for v, packs in reversed(needs.wanted.items()):
        kept = plan.kept - {v}
        if needs.marks >= {*packs} and not plan.marks.issuperset(packs):
            yield replace(plan, kept=kept, marks=plan.marks.union(packs))
        if v in plan.kept and needs.tape.made_by[v] is not None:
            yield replace(plan, kept=kept)
    for coin, v in needs.coins.items():
        if coin not in plan.coins:
            yield replace(plan, kept=plan.kept - {v}, coins=plan.coins | {coin})


def polished(model: Model, starts: Sequence[Plan], found: Found | None, budget: int) -> Found | None:
    """Return the fastest plan that is found from all sides: from `found`, if that is one, and from keeping all."""
    search = Search(model, budget, SIMULATED // len(model.needs.tape.ops))
    choices = sum(1 for _ in less(starts[0]))
    if len(starts) * choices * choices // 2 < search.left:  # a small step
        for start in starts:
            down = search.brought_down((start, model.load(start)))
            down = None if down is None else search.made_faster(down)
            found = min(filter(None, (found, down)), key=lambda f: f[1].seconds, default=None)
    return None if found is None else search.made_faster(found)

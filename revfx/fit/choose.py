"""Choosing a plan for a budget: a dynamic program over the blocks of the forward, whose plans are simulated whole.

Above each block lies what the blocks before it keep, H bytes, and the most that it needs itself must fit in what is
left. So the least seconds in which the first j blocks can be run with H bytes kept are

    time[j][H] = min over runs of blocks i..j and what can be kept of them, of time[i][H - held] + seconds
                 where H - held + peak <= budget.

A run is one block as far as its backward is concerned, or each of its blocks is computed again from the one before
(`nested`), with nothing kept in between.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from revfx.fit.blocks import Blocks, blocks_of
from revfx.fit.costs import Cost, signature
from revfx.fit.menu import Choice, Menu
from revfx.fit.needs import Needs
from revfx.fit.plan import Plan
from revfx.fit.simulate import Load, Model
from revfx.fit.tape import Spot, running


BINS = 512  # of the budget: bytes that blocks keep are counted in these
MERGED = 4  # blocks that are treated as one at most
NESTED = (2, 3, 4, 6, 8, 12, 16, 24, 32)
TRIES = 10  # budgets that are given to the dynamic program


@dataclass(frozen=True)
class Entry:
    """A choice for a run, and what it comes to: the bytes held after it, and in its own part of the step, relative to
    its first operators in the forward and in the backward; what is there for a moment beside what was before.
    """

    choice: Choice
    nested: bool
    seconds: float
    held: int
    extra: tuple[Sequence[int], Sequence[int]]
    spikes: tuple[Sequence[tuple[int, int]], Sequence[tuple[int, int]]]


@dataclass
class Run:
    """Some blocks in a row: their operators, their part of the backward, values in the order in which they are made."""

    start: int
    stop: int
    back: tuple[int, int]
    values: list[int]
    packs: list[int]


class Planner:
    """Plans of one step; `masks` and `nested` are there to be left out, to see what they bring."""

    def __init__(self, needs: Needs, costs: Sequence[Cost], *, masks: bool = True, nested: bool = True) -> None:
        self.needs, self.costs, self.masks, self.nested = needs, costs, masks, nested
        self.model = Model(needs, costs)
        self.blocks: Blocks = blocks_of(needs, costs)
        self.entries: dict[Hashable, list[Entry]] = {}
        self.keys = [signature(needs.tape, op) for op in needs.tape.ops]
        self.runs: dict[tuple[int, int], tuple[Run, list[tuple[Entry, int]]]] = {}

    # --- runs and what can be kept of them
    def run(self, i: int, j: int) -> Run:
        """Return the blocks from `i` to `j` as a run."""
        tape, start, stop = self.needs.tape, self.blocks.borders[i], self.blocks.borders[j]
        values = [v for o in range(start, stop) for v in tape.ops[o].makes]
        packs = [k for v in values for k in self.needs.wanted.get(v, ())]
        times = [(p.unpacked, p.released) for k in packs if (p := tape.packs[k]).unpacked is not None]
        back = (min(u for u, _ in times), max(r or 0 for _, r in times)) if times else (tape.turn, tape.turn)
        return Run(start, stop, back, values, packs)

    def key(self, run: Run, given: frozenset[int]) -> Hashable:
        """Return what runs have in common whose entries are the same."""
        tape = self.needs.tape
        place = {v: n for n, v in enumerate(run.values)}
        others: dict[int, int] = {}

        def name(s: Spot) -> Any:
            if s.value in place:
                return place[s.value]
            if self.needs.is_there(s.value):
                return "there"
            return "other", others.setdefault(s.value, len(others)), s.value in self.needs.wanted

        ops = tuple(
            (self.keys[o], tuple(map(name, tape.ops[o].reads)), self.needs.replayed[o] is None)
            for o in range(run.start, run.stop)
        )
        first = run.back[0]
        packs = tuple(
            (place[p.spot.value], p.packed - run.start, (p.unpacked or 0) - first, (p.released or 0) - first)
            for p in (tape.packs[k] for k in run.packs)
        )
        deaths = tuple(
            min(dead - run.start, run.stop - run.start + 1) if (dead := tape.memories[tape.memory_of[v]].dead) else -1
            for v in run.values
        )
        return ops, packs, deaths, tuple(sorted(place[v] for v in given)), run.back[1] - first

    def menu(self, i: int, j: int) -> tuple[Run, list[tuple[Entry, int]]]:
        """Return a run with its entries, and the most bytes of each, with what is there in any case."""
        if (i, j) not in self.runs:
            run = self.run(i, j)
            place = set(run.values)
            given = frozenset(v for v in self.blocks.over[j] if v in place) if j < len(self.blocks) else frozenset[int]()
            key = self.key(run, given)
            if key not in self.entries:
                self.entries[key] = [*self._entries(run, i, j, given)]
            self.runs[i, j] = run, [(e, self._peak(run, e)) for e in self.entries[key]]
        return self.runs[i, j]

    def _entries(self, run: Run, i: int, j: int, given: frozenset[int]) -> Iterator[Entry]:
        menu = Menu(self.needs, self.costs, run.start, run.stop, given, self.masks)
        if j - i <= MERGED:
            choices = [*menu.choices()]
        else:
            choices = []
        for c in choices:
            yield self._entry(run, c, given, i, None)
        if j - i > 1 and self.nested:
            yield self._entry(run, menu.choice(0.0), given, i, (i, j))

    def _entry(self, run: Run, choice: Choice, given: frozenset[int], i: int, nested: tuple[int, int] | None) -> Entry:
        needs, tape = self.needs, self.needs.tape
        mine = {v for v in run.values if v in needs.wanted}
        kept = frozenset(needs.wanted.keys() - mine) | choice.kept | given
        plan = Plan(needs, kept, choice.signs, choice.coins, self.block_of([nested or (i, 0)] if False else None, i, run, nested))
        held, spikes, seconds = self.model.changes(plan, mine)
        extra = running(held)
        rel = (run.start, run.back[0])
        spans = (range(run.start, run.stop + 1), range(run.back[0], run.back[1] + 1))
        place = {v: n for n, v in enumerate(run.values)}
        number = {k: n for n, k in enumerate(run.packs)}
        relative = Choice(
            frozenset(place[v] for v in choice.kept | given),
            frozenset(number[k] for k in choice.signs),
            frozenset(place[v] for v in choice.coins),
        )
        return Entry(
            relative, nested is not None, seconds, extra[tape.turn],
            (extra[run.start : run.stop + 1], extra[run.back[0] : run.back[1] + 1]),
            tuple([[(t - first, extra[t - 1] + b) for t, b in spikes.items() if t in span] for first, span in zip(rel, spans, strict=True)]),  # type: ignore[arg-type]
        )  # fmt: skip

    def block_of(self, _: Any, i: int, run: Run, nested: tuple[int, int] | None) -> list[int]:
        """Return the block of each operator, where those of a run are one, or stay as they are."""
        found: list[int] = []
        for n in range(len(self.blocks)):
            start, stop = self.blocks.borders[n], self.blocks.borders[n + 1]
            inside = run.start <= start < run.stop and nested is None
            found += [i if inside else n] * (stop - start)
        return found

    def _peak(self, run: Run, e: Entry) -> int:
        m, most = self.model, 0
        for first, extra, spikes in zip((run.start, run.back[0]), e.extra, e.spikes, strict=True):
            most = max(most, *(m.during[first + t] + x for t, x in enumerate(extra)))
            most = max([most, *(m.before[first + t] + x for t, x in spikes)])
        return most

    # --- the dynamic program
    def plan(self, budget: int) -> Plan | None:
        """Return the fastest plan whose runs fit, each for itself; None if none does."""
        unit, n = max(1, -(-budget // BINS)), len(self.blocks)
        inf = float("inf")
        time = [torch.full((BINS + 1,), inf, dtype=torch.float64) for _ in range(n + 1)]
        back: list[list[Any]] = [[None] * (BINS + 1) for _ in range(n + 1)]
        time[0][0] = 0.0
        for i in range(n):
            if not torch.isfinite(time[i]).any():
                continue
            lengths = [1, *range(2, MERGED + 1), *(x for x in NESTED if x > MERGED and self.nested)]
            for j in (i + x for x in lengths if i + x <= n):
                run, entries = self.menu(i, j)
                for e, peak in entries:
                    most = (budget - peak) // unit
                    if most < 0:
                        continue
                    up = -(-e.held // unit)
                    stop = min(most, BINS - up) + 1
                    if stop <= 0:
                        continue
                    new = time[i][:stop] + e.seconds
                    old = time[j][up : up + stop]
                    better = new < old
                    for h in better.nonzero().flatten().tolist():
                        back[j][h + up] = i, h, e
                    time[j][up : up + stop] = torch.minimum(new, old)
        best = int(time[n].argmin())
        if time[n][best] == inf:
            return None
        chosen: list[tuple[int, int, Entry]] = []
        j, h = n, best
        while j:
            i, before, e = back[j][h]
            chosen.append((i, j, e))
            j, h = i, before
        return self._whole(chosen)

    def _whole(self, chosen: Sequence[tuple[int, int, Entry]]) -> Plan:
        kept, signs, coins = set[int](), set[int](), set[int]()
        block_of = [0] * self.needs.tape.turn
        kept.update(v for v in self.needs.wanted if self.needs.tape.made_by[v] is None)
        for i, j, e in chosen:
            run = self.runs[i, j][0]
            kept.update(run.values[n] for n in e.choice.kept)
            signs.update(run.packs[n] for n in e.choice.signs)
            coins.update(run.values[n] for n in e.choice.coins)
            for b in range(i, j):
                for o in range(self.blocks.borders[b], self.blocks.borders[b + 1]):
                    block_of[o] = b if e.nested else i
        return Plan(self.needs, frozenset(kept), frozenset(signs), frozenset(coins), block_of)

    def best(self, budget: int) -> tuple[Plan, Load] | None:
        """Return the fastest plan found whose simulated peak is within the budget, and what it holds; None if none is."""
        found: tuple[Plan, Load] | None = None
        asked, low, high = budget, 0, 2 * budget
        for _ in range(TRIES):
            plan = self.plan(asked)
            load = None if plan is None else self.model.load(plan)
            if plan is None:
                low = asked
            elif load.peak <= budget:
                if found is None or load.seconds < found[1].seconds:
                    found = plan, load
                low = asked
            else:
                high = asked
            if high - low <= budget // 256:
                break
            asked = (low + high) // 2
        return found

    def least(self) -> tuple[Plan, Load]:
        """Return the plan with the least peak that is found."""
        high = self.model.load(self.everything()).peak
        best = (self.everything(), self.model.load(self.everything()))
        low = 0
        while high - low > max(1, high // 256):
            asked = (low + high) // 2
            plan = self.plan(asked)
            if plan is None:
                low = asked
                continue
            load = self.model.load(plan)
            if load.peak < best[1].peak:
                best = plan, load
            high = asked
        return best

    def everything(self) -> Plan:
        """Return the plan that keeps all, as autograd does."""
        return Plan(self.needs, frozenset(self.needs.wanted), frozenset(), frozenset(), [0] * self.needs.tape.turn)

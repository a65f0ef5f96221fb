"""The least extra time that any plan can take within a budget, by mixed-integer programming (HiGHS, through scipy).

After Checkmate (Jain et al. 2020, arXiv:1910.02653): before each read t of the backward, R[t, o] says that operator o
runs again, S[t, v] that value v is there from before. They run in the order of the forward. While one runs its operands
and results are there, what later ones of this read take, and what is there after it. A value may be let go of after any
read, and made again as often as that pays. So the optimum is a bound from below: no plan is faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from revfx.fit.costs import Cost
from revfx.fit.needs import Needs
from revfx.fit.simulate import BITS, MORE, OVERHEAD, Model


Term = tuple[float, tuple[Any, ...]]


@dataclass
class Program:
    """Binary variables by name, their costs, and rows `sum of terms <= bound`."""

    number: dict[tuple[Any, ...], int] = field(default_factory=dict[tuple[Any, ...], int])
    cost: dict[int, float] = field(default_factory=dict[int, float])
    rows: list[tuple[dict[int, float], float]] = field(default_factory=list[tuple[dict[int, float], float]])

    def __getitem__(self, name: tuple[Any, ...]) -> int:
        return self.number.setdefault(name, len(self.number))

    def most(self, bound: float, *terms: Term) -> None:
        """Add a row."""
        row: dict[int, float] = {}
        for factor, name in terms:
            row[self[name]] = row.get(self[name], 0.0) + factor
        self.rows.append((row, bound))

    def least(self, seconds: float) -> float:
        """Return a bound from below for the cost, found in so many seconds; infinity if nothing is feasible."""
        n = len(self.number)
        cost = np.array([self.cost.get(i, 0.0) for i in range(n)])
        entries = [(r, i, f) for r, (row, _) in enumerate(self.rows) for i, f in row.items()]
        at = [e[0] for e in entries], [e[1] for e in entries]
        matrix = csr_array(([e[2] for e in entries], at), shape=(len(self.rows), n))
        upper: Any = np.array([b for _, b in self.rows])
        rows = LinearConstraint(matrix, ub=upper)
        options: dict[str, Any] = {"time_limit": seconds, "mip_rel_gap": 0.01}
        kinds = np.array([name[0] in ("R", "S", "bits", "mask") for name in self.number], dtype=float)
        found = milp(cost, constraints=rows, integrality=kinds, bounds=Bounds(0, 1), options=options)
        return float("inf") if found.status == 2 else float(found.mip_dual_bound)


def bound(needs: Needs, costs: Sequence[Cost], budget: int, seconds: float = 60.0) -> float:
    """Return seconds that no plan within `budget` bytes is faster than."""
    tape, program = needs.tape, Program()
    reads = sorted((p.read_order, k) for k, p in enumerate(tape.saved) if p.read_at is not None and _wanted(needs, k))
    events = [k for _, k in reads]
    ops = [o for o, op in enumerate(tape.ops[: tape.backward_start]) if op.makes]
    values = [v for o in ops for v in tape.ops[o].makes if not needs.is_outside(v)]
    unit = 2.0**20

    def is_free(v: int) -> bool:
        return v in needs.there

    model = Model(needs, costs)
    for k in events:
        if k in needs.compressed:
            program.cost[program["bits", k]] = model.bits_seconds(needs.value(k))
    for t, k in enumerate(events, 1):
        v = needs.value(k)
        there = [(-1.0, ("S", t, v)), (-1.0, ("R", t, tape.made_by[v]))]
        program.most(-1, *there, *([(-1.0, ("bits", k))] if k in needs.compressed else []))
        for o in ops:
            drawn = [v for v in tape.ops[o].makes if v in needs.dropout_masks]
            again = OVERHEAD + (model.bits_seconds(drawn[0]) if drawn else costs[o].seconds)
            program.cost[program["R", t, o]] = again
            op = needs.replayed[o]
            if op is None:
                program.most(
                    0, (1.0, ("R", t, o)), *((-1.0, ("mask", v)) for v in tape.ops[o].makes if v in needs.dropout_masks)
                )
                continue
            for r in {s.value for s in op.reads if not is_free(s.value)}:
                program.most(0, (1.0, ("R", t, o)), (-1.0, ("S", t, r)), (-1.0, ("R", t, tape.made_by[r])))
        for v in values:
            program.most(0, (1.0, ("S", t + 1, v)), (-1.0, ("S", t, v)), (-1.0, ("R", t, tape.made_by[v])))
    for v in values:
        if v not in needs.keepable:
            program.most(0, (1.0, ("S", 1, v)))
    for t in range(1, len(events) + 2):
        for v in values:
            program.most(0, (1.0, ("S", t, v)), (-1.0, ("W", t, tape.allocation_of[v])))
    allocations = {tape.allocation_of[v] for v in values}
    size = {m: tape.allocations[m].size / unit for m in allocations}

    def gone(slot: int) -> set[int]:
        return {m for m in allocations if (end := tape.allocations[m].end) is not None and end <= slot}

    def handed(slot: int, of: Sequence[int]) -> set[int]:
        return {tape.allocation_of[needs.value(k)] for k in of if (tape.saved[k].end or 0) > slot}

    def room(slot: int, held: set[int]) -> float:
        return (budget - model.natural[slot]) / unit - sum(size[m] for m in held & gone(slot))

    compressed = {k: needs.elements(needs.value(k)) / unit for k in events if k in needs.compressed}

    def held_bits(slot: int) -> list[Term]:
        """Return the bytes of compressed tensors that are held."""
        held = {k: (2 * tape.saved[k].saved_at + 1, tape.saved[k].end or 0) for k in compressed}
        return [(n / BITS, ("bits", k)) for k, n in compressed.items() if held[k][0] <= slot < held[k][1]]

    dropout_masks = {
        v: (needs.elements(v) / unit, tape.saved[needs.keepable[later][0]].saved_at)
        for v, later in needs.dropout_masks.items()
    }
    for q in range(len(tape.ops)):
        done = [k for k in events if (tape.saved[k].read_at or 0) <= q]
        for slot in (2 * q + 1, 2 * q) if q <= tape.backward_start else (2 * q + 1,):
            there = handed(slot, done)
            kept = [(size[m], ("W", len(done) + 1, m)) for m in gone(slot) - there]
            bits = [(n / 8, ("K", len(done) + 1, v)) for v, (n, at) in dropout_masks.items() if 2 * at < slot]
            more = [(2 * n, ("mask", v)) for v, (n, at) in dropout_masks.items() if 2 * at == slot]
            more += [(MORE * n, ("bits", k)) for k, n in compressed.items() if 2 * tape.saved[k].saved_at == slot]
            for spike in [(term,) for term in more] or [()]:
                program.most(room(slot, there), *kept, *held_bits(slot), *bits, *spike)
    for t, k in enumerate(events, 1):
        slot = 2 * (tape.saved[k].read_at or 0)
        there = handed(slot, events[: t - 1])
        passing = gone(slot) - there
        base = room(slot, there)
        program.most(base, *((size[m], ("W", t, m)) for m in passing))
        for v in values:
            program.most(1, (1.0, ("S", t, v)), (1.0, ("S", t + 1, v)), (-1.0, ("P", t, tape.allocation_of[v])))
        if k in compressed:
            spike = (size[tape.allocation_of[needs.value(k)]] + MORE * compressed[k], ("bits", k))
            program.most(base, *((size[m], ("P", t, m)) for m in passing), spike)
        later = [(o, {s.value for s in op.reads}) for o in ops if (op := needs.replayed[o]) is not None]
        for o in ops:
            op = needs.replayed[o]
            near = {*tape.ops[o].makes} | {s.value for s in (op.reads if op is not None else ())}
            own: list[Term] = [(size[m], ("Z", t, o, m)) for m in passing]
            for m in passing:
                program.most(0, (1.0, ("P", t, m)), (-1.0, ("Z", t, o, m)))
            for v in values:
                if (m := tape.allocation_of[v]) not in passing:
                    continue
                if v in near:
                    program.most(0, (1.0, ("R", t, o)), (-1.0, ("Z", t, o, m)))
                elif (tape.made_by[v] or 0) < o:
                    for j in [("R", t, j) for j, read in later if j > o and v in read] + [("S", t + 1, v)]:
                        program.most(1, (1.0, ("R", t, o)), (1.0, j), (-1.0, ("Z", t, o, m)))
                    if v == needs.value(k):
                        bits_instead = [(-1.0, ("bits", k))] * (k in compressed)
                        program.most(0, (1.0, ("R", t, o)), (-1.0, ("Z", t, o, m)), *bits_instead)
            for v in set(tape.ops[o].makes) & dropout_masks.keys():
                own.append((2 * dropout_masks[v][0], ("R", t, o)))
                program.most(0, (1.0, ("R", t, o)), (-1.0, ("K", t, v)))
                program.most(0, (1.0, ("K", t + 1, v)), (-1.0, ("K", t, v)))
            program.most(base, *own)
    return program.least(seconds)


def _wanted(needs: Needs, k: int) -> bool:
    view = needs.tape.saved[k].view
    return view is not None and k in needs.keepable.get(view.value, ())


def made_up(needs: Needs) -> list[Cost]:
    """Return what operators of a tape might take: 10 GB and 100 GFLOP a second."""

    def seconds(o: int) -> float:
        op = needs.tape.ops[o]
        views = [*op.reads, *(s for s in op.outs if s is not None)]
        sizes = [float(np.prod(s.shape)) for s in views]
        product = any(word in str(op.func) for word in ("mm", "conv", "attention"))
        flops = 2 * float(np.prod(sizes[:3])) ** 0.5 if product and len(sizes) >= 3 else 0.0
        return sum(4 * n for n in sizes) / 1e10 + flops / 1e11

    return [Cost(seconds(o)) for o in range(len(needs.tape.ops))]

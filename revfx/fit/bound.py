"""A lower bound of the time that plans within a budget take: the linear relaxation of the choice of kept values.

Each saved value is kept, stored as bits, or recomputed at least once. Operands of a recomputed operator are kept or
recomputed, and drawn zeros and ones may be decoded from bits. Parts of a value may be kept, and parts of an operator
run. A choice is charged only in slots in which every plan that makes it holds those bytes. Checkmate's mixed-integer
program (Jain et al., 2020, arXiv:1910.02653) is relaxed in the same way; that one decides anew at every operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch

from revfx.fit.simulate import BITS, OVERHEAD, Model


ROUNDS = 30  # of the solver, each with the slots that the last solution overfilled
SLOTS = 8  # that are added in a round
NEAR = 1e-3  # of the budget: what a solution may hold more

Terms = dict[int, float]  # a linear form: the factor of each variable


@dataclass
class Relaxation:
    """A linear program: minimise `costs` where each of `rows` is at least its bound, and variables lie in [0, 1].

    Attributes:
        kept, compressed, decoded, reruns: the variables: by value, whether it is kept whole, as bits, or decoded as a
            dropout mask; by operator, whether it runs again.
        sizes: bytes of variables, each from one slot up to another.
    """

    model: Model
    costs: list[float] = field(default_factory=list[float])
    rows: list[tuple[Terms, float]] = field(default_factory=list[tuple[Terms, float]])
    sizes: list[tuple[int, float, int, int]] = field(default_factory=list[tuple[int, float, int, int]])
    kept: dict[int, int] = field(default_factory=dict[int, int])
    compressed: dict[int, int] = field(default_factory=dict[int, int])
    decoded: dict[int, int] = field(default_factory=dict[int, int])
    reruns: dict[int, int] = field(default_factory=dict[int, int])

    def __post_init__(self) -> None:
        needs = self.model.needs
        self.live: torch.Tensor = torch.tensor(self.model.natural, dtype=torch.float64)
        self._add_operators()
        for v in needs.keepable:
            if needs.tape.made_by[v] is not None:
                self._add_value(v)
        self._add_operands()
        for v, saved in needs.keepable.items():
            if saved and v in self.kept:
                there = {self.kept[v]: 1.0} | self._again(v)
                if v in self.compressed:
                    there[self.compressed[v]] = 1.0
                self.rows.append((there, 1.0))

    def _variable(self, cost: float) -> int:
        self.costs.append(cost)
        return len(self.costs) - 1

    def _add_operators(self) -> None:
        """Add a variable for each operator that may run again; that of a dropout mask decodes it."""
        needs = self.model.needs
        for o, op in enumerate(needs.replayed):
            if op is not None:
                self.reruns[o] = self._variable(self.model.costs[o].seconds + OVERHEAD)
        for v in needs.dropout_masks:
            made = needs.tape.made_by[v]
            assert made is not None
            dropout_mask = self.decoded[v] = self._variable(self.model.bits_seconds(v) + OVERHEAD)
            self._hold_bits(dropout_mask, v, 2 * made + 3, 2 * needs.tape.backward_start + 1)

    def _add_value(self, value: int) -> None:
        """Add a variable for a value that may be kept, and one for its bits."""
        needs, backward_start = self.model.needs, self.model.needs.tape.backward_start
        saved, size = needs.keepable[value], needs.tape.size(value)
        kept = self.kept[value] = self._variable(0.0)
        dead = self.model.end(needs.tape.allocation(value))
        until = self.model.through(saved) if saved else 2 * backward_start + 1
        if dead is not None and dead < until:
            self.sizes.append((kept, size, dead, until))
        read = [needs.tape.saved[k] for k in saved]
        for start, stop in _union((2 * (p.read_at or 0) + 1, p.end or 0) for p in read):
            # The backward reads it here. If it is kept, its bytes are those from `dead` on, so they are subtracted.
            self.live[start:stop] += size
            self.sizes.append((kept, -size, start, stop))
        if saved and needs.compressed >= set(saved):
            seconds = len(saved) * self.model.bits_seconds(value)
            mark = self.compressed[value] = self._variable(seconds)
            for p in read:
                start = 2 * max(1 + (needs.tape.made_by[value] or 0), p.made) + 1
                self._hold_bits(mark, value, start, p.end or start)

    def _hold_bits(self, variable: int, value: int, start: int, stop: int) -> None:
        """Hold a bit an element: before the tensor is dead, a plan may have the tensor itself instead."""
        dead = self.model.end(self.model.needs.tape.allocation(value))
        if dead is not None and max(start, dead) < stop:
            self.sizes.append((variable, self.model.needs.elements(value) / BITS, max(start, dead), stop))

    def _again(self, value: int) -> Terms:
        """Return the part of a value that is recomputed."""
        made = self.model.needs.tape.made_by[value]
        found: Terms = {}
        if value in self.decoded:
            found[self.decoded[value]] = 1.0
        if made in self.reruns:
            found[self.reruns[made]] = 1.0
        return found

    def _add_operands(self) -> None:
        """Require the operands of each recomputed operator to be kept or recomputed."""
        needs = self.model.needs
        for o, run in self.reruns.items():
            op = needs.replayed[o]
            assert op is not None
            for v in {s.value for s in op.reads}:
                if v not in needs.there and needs.tape.made_by[v] is not None:
                    kept = {self.kept[v]: 1.0} if v in self.kept else {}
                    self.rows.append(({run: -1.0} | kept | self._again(v), 0.0))

    def usage(self, x: torch.Tensor) -> torch.Tensor:
        """Return the bytes in each slot of a solution."""
        if not self.sizes:
            return self.live
        change = torch.zeros(len(self.live) + 1, dtype=torch.float64)
        at, size, start, stop = (torch.tensor(column) for column in zip(*self.sizes, strict=True))
        bytes_of = x[at] * size.double()
        last = len(self.live)
        change.index_add_(0, start.clamp(max=last), bytes_of)
        change.index_add_(0, stop.clamp(max=last), -bytes_of)
        return self.live + change.cumsum(0)[:-1]

    def in_slot(self, slot: int) -> Terms:
        """Return the bytes of the variables in a slot."""
        found: Terms = {}
        for variable, size, start, stop in self.sizes:
            if start <= slot < stop:
                found[variable] = found.get(variable, 0.0) + size
        return found


def least_seconds(model: Model, budget: int) -> float:
    """Return seconds beyond the plain step that no plan within a budget is below; infinity if none can be within it.

    Raises:
        ImportError: scipy is missing.
    """
    from scipy.optimize import linprog
    from scipy.sparse import csr_array

    program, slots = Relaxation(model), set[int]()
    x, found = torch.zeros(len(program.costs), dtype=torch.float64), 0.0
    x[[*program.kept.values()]] = 1.0
    dearest = max(program.costs, default=1.0) or 1.0  # the solver's tolerances are absolute
    for _ in range(ROUNDS):
        live = program.usage(x)
        new = [*_fullest(live, budget)][:SLOTS]
        if not new:
            break
        if not program.sizes:
            return inf
        slots.update(new)
        rows = [({k: -v for k, v in terms.items()}, -bound) for terms, bound in program.rows]
        for slot in slots:
            scaled = {k: v / budget for k, v in program.in_slot(slot).items()}
            rows.append((scaled, 1 - float(program.live[slot]) / budget))
        entries = [(n, k, v) for n, (terms, _) in enumerate(rows) for k, v in terms.items()]
        at, column, factor = zip(*entries, strict=True)
        matrix: Any = csr_array((factor, (at, column)), shape=(len(rows), len(x)))
        solved: Any = linprog(
            [cost / dearest for cost in program.costs], A_ub=matrix, b_ub=[bound for _, bound in rows], bounds=(0, 1)
        )
        if solved.status == 2:
            return inf
        if solved.status:  # the bound of fewer slots is one as well
            break
        x, found = torch.from_numpy(solved.x), dearest * float(solved.fun)
    return found


def _fullest(live: torch.Tensor, budget: int) -> Iterator[int]:
    """Yield the slots over a budget that are the fullest of their neighbours, fullest first."""
    over = (live > budget * (1 + NEAR)).nonzero().flatten().tolist()
    peaks = [t for t in over if live[t] >= live[max(0, t - 16) : t + 17].max()]
    yield from sorted(peaks, key=lambda t: -float(live[t]))


def _union(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the slots that lie in any of some spans, as spans that don't overlap."""
    last = 0
    for start, stop in sorted(spans):
        if stop > max(start, last):
            yield max(start, last), stop
            last = stop

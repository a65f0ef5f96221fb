"""Linear elimination: several sums are solved together for the several unknown values in them.

Reversible Heun (Kidger et al., 2021, https://arxiv.org/abs/2105.13493), `z1 = 2*y - z + f*dt; g = f(z1);
y1 = y + (f + g)*dt/2`, has the inverse `z = 2*y1 - z1 - g*dt`: `2*y + f*dt` cancels. No single operation has it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from typing import Any

from torch import Tensor

from revfx.passes.program import Arc, Program


MAX_UNKNOWNS = 8  # unknown values in one sum
NEGLIGIBLE = 2.0**-20  # times the largest factor: a smaller one is the rounding error of numbers that cancel

Row = dict[int, float]  # a sum that is zero: the factor of each value, and a number at the key `ONE`
ONE = -1


class Elimination:
    """The sums of the operations added so far, each solved for one unknown value that no other sum holds.

    `known` holds the values that are known by now.
    """

    def __init__(self, program: Program, known: Container[int]) -> None:
        self._program, self._known = program, known
        self._rows: dict[int, Row] = {}  # by pivot, the value that the sum is solved for
        self._holders: dict[int, set[int]] = {}  # for each unknown value, the pivots of the sums that hold it

    def add(self, index: int) -> Iterator[Arc]:
        """Yield the inverses that are solved when operation `index` is added."""
        op = self._program.ops[index]
        if op.terms:
            row = {op.outs[0]: -1.0, **dict(op.terms)}
            # never divide by a factor like the cosine of a right angle
            yield from self._insert(_drop_negligible(row, _largest(row)))

    def learn(self, value: int) -> Iterator[Arc]:
        """Yield the inverses that are solved when another value becomes known."""
        for pivot in tuple(self._holders.pop(value, ())):
            if pivot in self._rows:
                yield from self._insert(self._remove(pivot))

    def has_ties(self) -> bool:
        """Return whether unsolved sums hold two known values: further sums may then be solved together with them."""
        known: set[int] = set()
        for row in self._rows.values():
            for v in row.keys() - {ONE}:
                if v in self._known and not self._program.values[v].source:
                    known.add(v)
        return len(known) > 1

    def _insert(self, row: Row) -> Iterator[Arc]:
        """Add a sum, less its multiples of the others; yield the inverses that are solved."""
        while (pivot := next((v for v in row if v in self._rows), None)) is not None:
            row = _cancel(row, self._rows[pivot], pivot)
        unknown: list[int] = []
        for v in row:
            if v != ONE and v not in self._known:
                unknown.append(v)
        if len(unknown) == 1 and row.keys() - {ONE, unknown[0]}:  # a constant is no function of known values
            yield self._solve(row, unknown[0])
        elif 1 < len(unknown) <= MAX_UNKNOWNS:
            pivot = max(unknown, key=lambda v: abs(row[v]))
            self._rows[pivot] = row
            for v in unknown:
                self._holders.setdefault(v, set()).add(pivot)
            for other in self._holders[pivot] - {pivot}:
                if other in self._rows:
                    yield from self._insert(self._remove(other))

    def _remove(self, pivot: int) -> Row:
        row = self._rows.pop(pivot)
        for v in row:
            self._holders.get(v, set()).discard(pivot)
        return row

    def _solve(self, row: Row, head: int) -> Arc:
        """Return the inverse that computes `head` from the other values of a sum."""
        values = self._program.values
        weights: Row = {}
        terms: list[str] = []
        for v, factor in row.items():
            if v not in (head, ONE):
                weights[v] = -factor / row[head]
                terms.append(f"{weights[v]:g}*{values[v].name}")
        number = -row.get(ONE, 0.0) / row[head]
        return Arc(
            head,
            tuple(weights),
            _weighted_sum(tuple(weights.values()), number),
            exact=False,
            factor=1 / max(1.0, _largest(weights)),
            text=f"{values[head].name} <- {' + '.join(terms)}  (solved together)",
        )


def _cancel(row: Row, other: Row, pivot: int) -> Row:
    """Return a sum less the multiple of another one that removes `pivot`."""
    times = row[pivot] / other[pivot]
    difference: Row = {}
    for v in {**row, **other}:
        difference[v] = row.get(v, 0.0) - times * other.get(v, 0.0)
    del difference[pivot]
    return _drop_negligible(difference, max(_largest(row), abs(times) * _largest(other)))


def _drop_negligible(row: Row, largest: float) -> Row:
    """Return a sum without the terms that are negligible beside the `largest` factor."""
    return {v: factor for v, factor in row.items() if abs(factor) > NEGLIGIBLE * largest}


def _largest(row: Row) -> float:
    """Return the largest magnitude of a factor."""
    return max(map(abs, row.values()))


def _weighted_sum(weights: tuple[float, ...], number: float) -> Callable[..., Tensor]:
    def solve(*tail: Tensor) -> Tensor:
        total: Any = tail[0] * weights[0]
        for t, w in zip(tail[1:], weights[1:], strict=True):
            total = total.add(t, alpha=w)
        return total + number if number else total

    return solve

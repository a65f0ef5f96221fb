"""Linear elimination: where several sums tie several unknown values, they are solved together.

Reversible Heun (Kidger et al., 2021, https://arxiv.org/abs/2105.13493), `z1 = 2*y - z + f*dt; g = f(z1);
y1 = y + (f + g)*dt/2`, has `z = 2*y1 - z1 - g*dt`, as `2*y + f*dt` cancels: no single operation gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from typing import Any

from torch import Tensor

from revfx.passes.program import Arc, Program


WIDTH = 8  # unknown values in one sum
NEGLIGIBLE = 2.0**-20  # of the largest factor: the rest of numbers that cancel up to rounding

Row = dict[int, float]  # by value the factor in a sum that is zero; by `ONE` the number in it
ONE = -1


class Elimination:
    """The sums of the operations added so far, each solved for one unknown value, which no other one holds.

    `known` holds the values that are known by now.
    """

    def __init__(self, program: Program, known: Container[int]) -> None:
        self._program, self._known = program, known
        self._rows: dict[int, Row] = {}  # by the value that it is solved for
        self._holding: dict[int, set[int]] = {}  # for each unknown value the rows that hold it

    def add(self, index: int) -> Iterator[Arc]:
        """Yield the values that are solved when operation `index` is added."""
        op = self._program.ops[index]
        if op.terms:
            yield from self._put(_without_small({op.outs[0]: -1.0, **dict(op.terms)}))

    def learn(self, value: int) -> Iterator[Arc]:
        """Yield the values that are solved when another one becomes known."""
        for pivot in tuple(self._holding.pop(value, ())):
            if pivot in self._rows:
                yield from self._put(self._take(pivot))

    def ties(self) -> bool:
        """Return whether more may be solved together, as two known values are in sums that are not solved."""
        values = self._program.values
        known = {v for r in self._rows.values() for v in r if v != ONE and v in self._known and not values[v].source}
        return len(known) > 1

    def _put(self, row: Row) -> Iterator[Arc]:
        while (pivot := next((v for v in row if v in self._rows), None)) is not None:
            row = _subtract_row(row, self._rows[pivot], pivot)
        unknown = [v for v in row if v != ONE and v not in self._known]
        if len(unknown) == 1 and len(row) > 1:
            yield self._solved(row, unknown[0])
        elif 1 < len(unknown) <= WIDTH:
            pivot = max(unknown, key=lambda v: abs(row[v]))
            self._rows[pivot] = row
            for v in unknown:
                self._holding.setdefault(v, set()).add(pivot)
            for other in self._holding[pivot] - {pivot}:
                if other in self._rows:
                    yield from self._put(self._take(other))

    def _take(self, pivot: int) -> Row:
        row = self._rows.pop(pivot)
        for v in row:
            self._holding.get(v, set()).discard(pivot)
        return row

    def _solved(self, row: Row, head: int) -> Arc:
        weights = {v: -w / row[head] for v, w in row.items() if v not in (head, ONE)}
        values, number = self._program.values, -row.get(ONE, 0.0) / row[head]
        said = " + ".join(f"{w:g}*{values[v].name}" for v, w in weights.items())
        solve, factor = _weighted_sum(tuple(weights.values()), number), 1 / max(1.0, *map(abs, weights.values()))
        text = f"{values[head].name} <- {said}  (solved together)"
        return Arc(head, tuple(weights), solve, exact=False, factor=factor, text=text)


def _subtract_row(row: Row, other: Row, pivot: int) -> Row:
    """Return a sum less so much of another one that `pivot` cancels."""
    times = row[pivot] / other[pivot]
    sums = {v: row.get(v, 0.0) - times * other.get(v, 0.0) for v in {**row, **other} if v != pivot}
    least = NEGLIGIBLE * max([abs(w) for m, r in ((1.0, row), (times, other)) for w in (m * x for x in r.values())])
    return {v: w for v, w in sums.items() if abs(w) > least}


def _without_small(row: Row) -> Row:
    """Return a sum without negligible terms, such as the cosine of a right angle: nothing is divided by them."""
    largest = max(map(abs, row.values()))
    return {v: w for v, w in row.items() if abs(w) > NEGLIGIBLE * largest}


def _weighted_sum(weights: tuple[float, ...], number: float) -> Callable[..., Tensor]:
    def solve(*tail: Tensor) -> Tensor:
        total: Any = tail[0] * weights[0]
        for t, w in zip(tail[1:], weights[1:], strict=True):
            total = total.add(t, alpha=w)
        return total + number if number else total

    return solve

"""The closure of known values: forward chaining over arcs, in time linear in the arcs that are added."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from revfx.passes.elimination import Elimination
from revfx.passes.program import Arc, Program


@dataclass(frozen=True, slots=True)
class Forward:
    """A derivation that recomputes operation `op`, with all its outputs."""

    op: int


@dataclass(frozen=True, slots=True)
class Invert:
    """A derivation that solves `arc`, an inverse of operation `op`, for the arc's head."""

    op: int
    arc: Arc


Derivation = Forward | Invert


def read_by(program: Program, derivation: Derivation) -> tuple[int, ...]:
    """Return the values that a derivation reads."""
    return program.ops[derivation.op].ins if isinstance(derivation, Forward) else derivation.arc.tail


def made_by(program: Program, derivation: Derivation) -> tuple[int, ...]:
    """Return the values that a derivation computes."""
    return program.ops[derivation.op].outs if isinstance(derivation, Forward) else (derivation.arc.head,)


class Closure:
    """The values derivable from `known` with the operations added so far.

    A value becomes known with the whole tail of one of its arcs. Recomputing has priority over inverting: the
    difference of two large streams has fewer digits of an addend than the function that computed the addend. Barred
    arcs come last, as their heads must be saved rather than regenerated.

    Args:
        program: the program.
        known: the values that are known at first.
        trusted: use no barred arcs.
        solve_sums: also solve several sums together for several unknown values.
        once: operations that can be inverted, but not recomputed.
    """

    def __init__(
        self,
        program: Program,
        known: Iterable[int],
        trusted: bool = False,
        solve_sums: bool = True,
        once: Collection[int] = (),
    ) -> None:
        self._program, self._known = program, set(known)
        self._trusted, self._solve_sums, self._once = trusted, solve_sums, once
        # Derivations by number: each waits for the unknown values that it reads.
        self._derivations: list[Derivation] = []
        self._missing: list[int] = []  # the number of these values
        self._waiting: dict[int, list[int]] = {}  # the derivations that wait for a value
        self._ready: tuple[list[int], ...] = ([], [], [], [])  # by `_rank`
        self.elimination: Elimination = Elimination(program, self)
        self.has_solved_sums: bool = False
        self.order: list[Derivation] = []

    def __contains__(self, value: int) -> bool:
        v = self._program.values[value]
        return value in self._known or v.source or v.kept

    def covers(self, values: Iterable[int]) -> bool:
        """Return whether all of `values` are known."""
        return all(v in self for v in values)

    def add(self, indices: Iterable[int]) -> list[int]:
        """Add operations, and return the values that become known, in order.

        Chains of derivations run one after the other: side by side, their values would be alive at the same time.
        """
        indices = tuple(indices)
        for index in indices:
            if index not in self._once:
                self._offer(Forward(index))
            for arc in self._program.ops[index].arcs:
                if not (self._trusted and arc.barred):
                    self._offer(Invert(index, arc))
        new = self._derive(min(indices, default=0))
        if self._solve_sums:
            for index in reversed(indices):  # the operations near the known values first: sums stay short
                new += self._derive(index, self.elimination.add(index))
        return new

    def run(self, indices: Iterable[int]) -> list[int]:
        """Add operations that can be recomputed, but not inverted; return the values that become known, in order."""
        for index in indices:
            self._offer(Forward(index))
        return self._derive(0)

    def _derive(self, index: int, solved: Iterable[Arc] = ()) -> list[int]:
        """Derive values from the offered arcs and from `solved` sums until nothing more becomes known."""
        found: list[int] = []
        arcs = list(solved)
        while True:
            for arc in arcs:
                self._offer(Invert(index, arc))
                self.has_solved_sums = True
            new = self._drain()
            found += new
            arcs = []
            for v in new:
                arcs += self.elimination.learn(v)
            if not arcs:
                return found

    def _offer(self, derivation: Derivation) -> None:
        number = len(self._derivations)
        self._derivations.append(derivation)
        missing = [v for v in dict.fromkeys(read_by(self._program, derivation)) if v not in self]
        self._missing.append(len(missing))
        for v in missing:
            self._waiting.setdefault(v, []).append(number)
        if not missing:
            self._ready[_rank(derivation)].append(number)

    def _drain(self) -> list[int]:
        """Run the derivations that are ready, those of the lowest rank first; return the values that become known."""
        new: list[int] = []
        while queue := next(filter(None, self._ready), None):
            derivation = self._derivations[queue.pop()]
            fresh = [v for v in made_by(self._program, derivation) if v not in self]
            if not fresh:
                continue
            self.order.append(derivation)
            self._known.update(fresh)
            new += fresh
            for v in fresh:
                for waiting in self._waiting.pop(v, ()):
                    self._missing[waiting] -= 1
                    if self._missing[waiting] == 0:
                        self._ready[_rank(self._derivations[waiting])].append(waiting)
        return new


def _rank(derivation: Derivation) -> int:
    """Return the rank of a derivation: those that give the bits of the forward come before those that round."""
    if isinstance(derivation, Forward):
        return 0
    if derivation.arc.barred is not None:
        return 3
    return 1 if derivation.arc.exact else 2

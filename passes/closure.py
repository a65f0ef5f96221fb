"""The closure of known values: forward chaining over arcs, in time linear in the arcs that are added."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from revfx.passes.elimination import Elimination
from revfx.passes.program import Arc, Program


@dataclass(frozen=True, slots=True)
class Forward:
    """A derivation: run operation `op` again; it gives all its outputs."""

    op: int


@dataclass(frozen=True, slots=True)
class Invert:
    """A derivation: solve `arc`, an inverse of operation `op`; it gives the arc's head."""

    op: int
    arc: Arc


Derivation = Forward | Invert


def read_by(program: Program, derivation: Derivation) -> tuple[int, ...]:
    """Return the values that a derivation reads."""
    return program.ops[derivation.op].ins if isinstance(derivation, Forward) else derivation.arc.tail


def made_by(program: Program, derivation: Derivation) -> tuple[int, ...]:
    """Return the values that a derivation gives."""
    return program.ops[derivation.op].outs if isinstance(derivation, Forward) else (derivation.arc.head,)


class Closure:
    """The values derivable from `known` with the operations added so far.

    A value is known when every tail of one of its arcs is. What can be computed again is: the difference of two large
    streams has fewer digits of what was added than the function that gave it. Arcs barred for the head's sake are used
    only when nothing else gives anything new: what they give must be saved rather than regenerated. `trusted`: they are
    not used at all. `sums`: solve those together that tie several values. `once`: operations that are only inverted.
    """

    def __init__(
        self,
        program: Program,
        known: Iterable[int],
        trusted: bool = False,
        sums: bool = True,
        once: Collection[int] = (),
    ) -> None:
        self._trusted, self._once = trusted, once
        self._program = program
        self._known = set(known)
        self._waiting: dict[int, list[int]] = {}
        self._missing: list[int] = []
        self._pending: list[Derivation] = []
        self._ready: tuple[list[int], ...] = ([], [], [], [])  # by `_rank`
        self.sums = Elimination(program, self)  # which holds none unless `sums`
        self._adds_sums = sums
        self.together = False  # whether sums were solved together
        self.order: list[Derivation] = []

    def __contains__(self, value: int) -> bool:
        v = self._program.values[value]
        return value in self._known or v.source or v.kept

    def add(self, indices: Iterable[int]) -> list[int]:
        """Return the values that become known, in order, when some operations are added at once.

        One chain of operations runs after the other: side by side their values would be there at the same time.
        """
        indices = tuple(indices)
        for index in indices:
            op = self._program.ops[index]
            if index not in self._once:
                self._offer(Forward(index))
            for arc in (a for a in op.arcs if not (self._trusted and a.barred)):
                self._offer(Invert(index, arc))
        new = self._derive(min(indices, default=0))
        for index in reversed(indices) if self._adds_sums else ():  # near the known values first: sums stay short
            new += self._derive(index, self.sums.add(index))
        return new

    def run(self, indices: Iterable[int]) -> list[int]:
        """Return the values that become known, in order, when some operations can be run again, but not inverted."""
        for index in indices:
            self._offer(Forward(index))
        return self._derive(0)

    def _derive(self, index: int, solved: Iterable[Arc] = ()) -> list[int]:
        """Return the values that become known by the offered arcs, and by solved sums."""
        found: list[int] = []
        arcs = [*solved]
        while True:
            for arc in arcs:
                self._offer(Invert(index, arc))
            self.together |= bool(arcs)
            found += (new := self._drain())
            arcs = [arc for v in new for arc in self.sums.learn(v)]
            if not arcs:
                return found

    def _offer(self, derivation: Derivation) -> None:
        number = len(self._pending)
        self._pending.append(derivation)
        missing = [v for v in dict.fromkeys(read_by(self._program, derivation)) if v not in self]
        self._missing.append(len(missing))
        for v in missing:
            self._waiting.setdefault(v, []).append(number)
        if not missing:
            self._ready[_rank(derivation)].append(number)

    def _drain(self) -> list[int]:
        new: list[int] = []
        while queue := next(filter(None, self._ready), None):
            derivation = self._pending[queue.pop()]
            fresh = [v for v in made_by(self._program, derivation) if v not in self]
            if not fresh:
                continue
            self.order.append(derivation)
            for v in fresh:
                self._known.add(v)
                new.append(v)
                for waiting in self._waiting.pop(v, ()):
                    self._missing[waiting] -= 1
                    if self._missing[waiting] == 0:
                        self._ready[_rank(self._pending[waiting])].append(waiting)
        return new


def _rank(derivation: Derivation) -> int:
    """Return which derivations come first: those that give the bits of the forward, then those that round."""
    if isinstance(derivation, Forward):
        return 0
    return 3 if derivation.arc.barred is not None else 1 if derivation.arc.exact else 2

"""Where to cut: from one cut, the nearest earlier one from which everything between can be derived backwards.

The live set at a point holds the data values made before it and read after it (outputs are read at the end). From the
cut at `stop` the operations above it are added to an incremental closure one by one; the first point whose live set
the closure contains is the next cut. Any arc that crosses a point goes through its live set, so the nearest derivable
cut is the best one, and when nothing of a live set is known no earlier point can be reached either.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from revfx.errors import Cause
from revfx.passes.closure import Closure, Derivation, Forward, Invert, made_by, read_by
from revfx.passes.program import Arc, Program


PATIENCE = 200  # operations without a newly known value after which a search gives up
BEYOND = 3  # times as many operations are looked at for a cut that needs nothing from above it
ABOVE = 64  # operations above a cut that are run again for it
FURTHER = 64  # operations above a cut that are searched for sums alone
MOST_FAILED = 16  # searches for sums without success, after which there are no more

Values = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """Operations start..stop-1, the live values before (`entry`) and after (`exit`), and how to go from exit to entry.

    `derive` lists derivations in an order in which each can run, given `exit`, `saved` and the region's side inputs.
    `saved` values are kept: those that a rounding inverse would spoil, and operands of exact ones. `arcs` are
    the inverses that reach the entry. Some may run operations above `start`, where a function's result is in the entry
    beside its operand. `again`: values of `exit` that were selected from others of the step: they are not taken as
    known, but computed again from the regenerated operand.
    """

    start: int
    stop: int
    entry: Values
    exit: Values
    saved: Values
    derive: tuple[Derivation, ...]
    arcs: tuple[Arc, ...]
    again: Values = ()

    @property
    def inverts(self) -> bool:
        """Return whether the step needs an inverse that rounds; without one, recomputing frees as much."""
        return any(not arc.exact for arc in self.arcs)

    @property
    def above(self) -> frozenset[int]:
        """The operations before `start` that are run again."""
        return frozenset(d.op for d in self.derive if isinstance(d, Forward) and d.op < self.start)


@dataclass(slots=True)
class SumSearches:
    """Searches for sums that tie several values, over one search for regions: too many failures end them.

    `steps`: the operations that all searches have looked at so far.
    """

    failed: int = 0
    steps: int = 0

    @property
    def are_worth_it(self) -> bool:
        """Whether another one is made."""
        return self.failed < MOST_FAILED


@dataclass(frozen=True, slots=True)
class Stuck:
    """A cut from which no earlier one is derivable: operations start..stop-1 were tried, `unknown` stayed unknown.

    `nearest` is the first point at which as few values were unknown as ever: (its operation, those values). Where what
    is known at every point (a mask, a target) lets the search go on to the model's inputs, the reason lies there.
    """

    start: int
    stop: int
    unknown: Values
    barrier: Cause | None = None
    nearest: tuple[int, Values] | None = None


def live_before(program: Program, live: Iterable[int], index: int) -> dict[int, None]:
    """Return the live set before operation `index`, from the one after it; ordered."""
    op = program.ops[index]
    before = {v: None for v in live if v not in op.outs}
    before.update(dict.fromkeys(program.data(op.ins)))
    return before


def find_step(
    program: Program, stop: int, exit: Values, side: frozenset[int], patience: int, searches: SumSearches
) -> Step | Stuck:
    """Return the step that ends at the cut before operation `stop`, or why there is none."""
    closure = Closure(program, (*exit, *side), sums=searches.are_worth_it)
    live: dict[int, None] = dict.fromkeys(exit)
    unknown: set[int] = set()
    nearest: tuple[int, Values] | None = None
    nearer: Step | None = None
    blocked: Stuck | None = None
    start, idle, touch = stop, 0, program.first_touch
    reach = min((touch[v] for v in (*exit, *side)), default=stop)
    for start in range(stop - 1, -1, -1):
        op, searches.steps = program.ops[start], searches.steps + 1
        if op.barrier is not None:
            return nearer or blocked or Stuck(start, stop, tuple(v for v in live if v in unknown), op.barrier)
        for v in op.outs:
            live.pop(v, None)
            unknown.discard(v)
        for v in program.data(op.ins):
            if v not in live:
                live[v] = None
                if v not in closure:
                    unknown.add(v)
        new = closure.add((start,))
        unknown.difference_update(new)
        if not unknown and not _parts_selected(program, start, live):
            if (step := _step(program, closure, start, stop, tuple(live), exit, side)) is not None:
                return step
        if unknown and nearer is None and new and closure.together:
            nearer = _with_above(program, start, stop, tuple(live), exit, side)
        if nearer is not None and stop - start > BEYOND * (stop - nearer.start):
            return nearer
        idle = 0 if new else idle + 1
        reach = min((reach, *(touch[v] for v in new)))
        blind = start <= reach and program.always.isdisjoint(unknown)
        if unknown and (nearest is None or len(unknown) < len(nearest[1])):
            nearest = start, tuple(v for v in live if v in unknown)
        if blind and len(unknown) == len(live):
            blocked = blocked or Stuck(start, stop, tuple(v for v in live if v in unknown))
            if not closure.sums.ties():
                return nearer or blocked
        if blocked is not None and nearer is None and blocked.start - start > FURTHER:
            searches.failed += 1
            return blocked
        if idle > patience:
            break
    return nearer or blocked or Stuck(start, stop, tuple(v for v in live if v in unknown), nearest=nearest)


def _step(
    program: Program, closure: Closure, start: int, stop: int, entry: Values, exit: Values, side: frozenset[int]
) -> Step | None:
    chosen = {v: program.selected[v] for v in exit if v in program.selected}
    again = tuple(v for v, s in chosen.items() if start <= s.first)
    if any(s.first < start <= s.last for s in chosen.values()):
        return None
    known = {*exit, *side}.difference(again)
    # The search meets readers of a value before its maker, so it solves for it first, although it may be recomputed.
    if again or any(program.made_at[arc.head] >= start for arc in _inverses(closure.order)):
        closure = Closure(program, known)
        closure.add(range(start, stop))
        if any(v not in closure for v in entry):
            return None
    saved: list[int] = []
    for arc in _inverses(needed(program, closure.order, entry)):
        if arc.barred:
            saved.append(arc.head)
    if any(arc.barred for arc in _inverses(closure.order)):
        # Derive again from the saved values by trusted arcs alone: a value that a barred arc gave first may have
        # another derivation.
        closure = Closure(program, known.union(saved), trusted=True)
        closure.add(range(start, stop))
    saved += _kept_results(program, start, stop)
    derive = tuple(closure.order)
    return Step(start, stop, entry, exit, tuple(saved), derive, _inverses(needed(program, derive, entry)), again)


def _with_above(
    program: Program, start: int, stop: int, entry: Values, exit: Values, side: frozenset[int]
) -> Step | None:
    """Return a step with an entry that takes operations above it; None if that fails as well."""
    if any(v in program.selected for v in exit):
        return None
    closure = Closure(program, {*exit, *side}, trusted=True)
    closure.add(range(start, stop))
    while any([closure.run(_made_of(program, v, closure)) for v in entry if v not in closure]):
        pass  # until nothing more becomes known
    order = tuple(closure.order)
    if any(v not in closure for v in entry):
        return None
    arcs = _inverses(needed(program, order, entry))
    return Step(start, stop, entry, exit, _kept_results(program, start, stop), order, arcs)


def _inverses(order: Iterable[Derivation]) -> tuple[Arc, ...]:
    """The inverse arcs among some derivations, in order."""
    return tuple(d.arc for d in order if isinstance(d, Invert))


def _kept_results(program: Program, start: int, stop: int) -> Values:
    """The kept results of operations start..stop-1."""
    found: list[int] = []
    for op in program.ops[start:stop]:
        for v in op.outs:
            if program.values[v].kept:
                found.append(v)
    return tuple(found)


def _made_of(program: Program, value: int, known: Closure) -> list[int]:
    """Return the operations that give a value from known ones; none if there are too many, or barriers."""
    found, wanted = set[int](), [value]
    while wanted:
        v = wanted.pop()
        at = program.made_at[v]
        if v in known or at in found:
            continue
        if at < 0 or program.ops[at].barrier is not None or len(found) == ABOVE:
            return []
        found.add(at)
        wanted += program.ops[at].ins
    return sorted(found)


def _parts_selected(program: Program, start: int, live: Collection[int]) -> bool:
    """Return whether a cut before `start` would hold both a selected value and its source.

    Operations below the cut may compare them, so they must be regenerated together.
    """
    chosen = [v for v in live if v in program.selected and program.made_at[v] < start]
    return any(not program.selected[v].roots.isdisjoint(live) for v in chosen)


def needed(program: Program, order: Sequence[Derivation], wanted: Iterable[int]) -> list[Derivation]:
    """Return those of `order` that deriving `wanted` takes, in order; a barred inverse counts as a saved value."""
    made: dict[int, int] = {}
    for i, d in enumerate(order):
        for v in made_by(program, d):
            made.setdefault(v, i)
    keep: set[int] = set()
    stack = [v for v in wanted if v in made]
    while stack:
        i = made[stack.pop()]
        if i in keep:
            continue
        keep.add(i)
        d = order[i]
        tail = () if isinstance(d, Invert) and d.arc.barred else read_by(program, d)
        stack.extend(v for v in tail if v in made and made[v] not in keep)
    return [order[i] for i in sorted(keep)]

"""Cuts: the points between operations from which the backward regenerates the program, step by step.

*Above* means earlier in the program, *below* means later. The *live set* at a point holds the data values made above it
and read below it (outputs are read at the end). A cut is a point with a derivable live set. The operations between two
neighbouring cuts are a step.

Objective: the backward holds the values that a region keeps, and regenerates one step at a time. So its peak is the
bytes of the kept values plus the bytes of the largest step. The search approximates the minimum greedily: from one cut
it takes the nearest earlier cut that is derivable. This loses nothing further up, as any arc that crosses a point goes
through its live set. Barred arcs, with heads that must be kept, are used only where nothing else derives a value. Two
heuristics depart from the rule:

- A cut that needs operations above it recomputed is used only if no other cut lies within `MAX_DETOUR` times its
  distance.
- Values that many steps read (side inputs) are kept if that saves more bytes than it takes; `revfx.passes.regions`
  chooses them and weighs them by `_peak_bytes`.

The operations above a cut are added one by one to an incremental closure, until it contains a live set. The search ends
where nothing of a live set is known: no earlier point is derivable then, unless sums tie known values to unknown ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from revfx.errors import Cause
from revfx.passes.closure import Closure, Derivation, Forward, Invert, made_by, read_by
from revfx.passes.program import Arc, Program


PATIENCE = 200  # operations without a newly known value after which a search gives up
MAX_DETOUR = 3  # size of a step without reruns, relative to one that reruns operations above it
MAX_RERUN_OPS = 64  # operations above a cut that are recomputed for it
MAX_SUM_OPS = 64  # operations above a cut that are searched for sums alone
MAX_FAILED_SEARCHES = 16  # searches for sums without success, after which there are no more

Values = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """Operations start..stop-1, and the derivations from the cut below them to the cut above.

    Attributes:
        start, stop: the operations.
        entry, exit: the live values before and after.
        saved: kept values: heads of barred inverses, and results that are kept in any case.
        derive: derivations in an order in which each can run, given `exit`, `saved` and the region's side inputs. Some
            recompute operations above `start`, if a function's result is in the entry beside its operand.
        arcs: the inverses that reach the entry.
        reselected: values of `exit` that were selected from others of the step. They are not known, but recomputed
            from the regenerated operand.
    """

    start: int
    stop: int
    entry: Values
    exit: Values
    saved: Values
    derive: tuple[Derivation, ...]
    arcs: tuple[Arc, ...]
    reselected: Values = ()

    @property
    def is_inverted(self) -> bool:
        """Whether the step needs an inverse that rounds; without one, recomputing frees as much."""
        return any(not arc.exact for arc in self.arcs)

    @property
    def first_run(self) -> int:
        """The first operation that the step recomputes, if that lies above `start`; else `start`."""
        return min((d.op for d in self.derive if isinstance(d, Forward)), default=self.start)


@dataclass(slots=True)
class SearchCounts:
    """Counts over one search for regions: the operations looked at, and the failed searches for sums."""

    operations: int = 0
    failed_sums: int = 0


@dataclass(frozen=True, slots=True)
class DeadEnd:
    """A cut from which no earlier one is derivable.

    Attributes:
        start, stop: the operations that were tried.
        unknown: the live values that stayed unknown.
        barrier: the cause that no region may contain operation `start`.
        fewest_unknown: the first point with the fewest unknown values: its operation, and these values. The search goes
            on above it while a mask or a target stays known, but this point shows why it fails.
    """

    start: int
    stop: int
    unknown: Values
    barrier: Cause | None = None
    fewest_unknown: tuple[int, Values] | None = None


def live_before(program: Program, live: Iterable[int], index: int) -> dict[int, None]:
    """Return the live set before operation `index`, from the one after it; ordered."""
    op = program.ops[index]
    before = {v: None for v in live if v not in op.outs}
    before.update(dict.fromkeys(program.data(op.ins)))
    return before


def find_step(
    program: Program, stop: int, exit: Values, side: frozenset[int], patience: int, counts: SearchCounts
) -> Step | DeadEnd:
    """Find the step that ends at a cut, or the reason why there is none.

    Args:
        program: the program.
        stop: the operation after the cut.
        exit: the live set of the cut.
        side: side inputs.
        patience: operations without a newly known value after which the search gives up.
        counts: updated by the search.
    """
    closure = Closure(program, (*exit, *side), solve_sums=counts.failed_sums < MAX_FAILED_SEARCHES)
    live: dict[int, None] = dict.fromkeys(exit)
    unknown: set[int] = set()
    fewest: tuple[int, Values] | None = None
    rerunning: Step | None = None  # the nearest step that reruns operations above it
    blocked: DeadEnd | None = None  # the nearest point at which nothing is known
    start, idle = stop, 0
    first_touch = program.first_touch
    reach = min(map(first_touch.__getitem__, (*exit, *side)), default=stop)  # no arc from a known value lies above
    for start in range(stop - 1, -1, -1):
        op = program.ops[start]
        counts.operations += 1
        if op.barrier is not None:
            return rerunning or blocked or DeadEnd(start, stop, _unknown_in_order(live, unknown), op.barrier)

        # Move the point above the operation.
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

        # The live set is derivable: this is the nearest cut.
        if not unknown and not _splits_selection(program, start, live):
            step = _make_step(program, closure, start, stop, tuple(live), exit, side)
            if step is not None:
                return step

        # It may be derivable from operations above it. Then go on for a while, as a cut without these is better.
        if unknown and rerunning is None and new and closure.has_solved_sums:
            rerunning = _make_rerunning_step(program, start, stop, tuple(live), exit, side)
        if rerunning is not None and stop - start > MAX_DETOUR * (stop - rerunning.start):
            return rerunning

        # Nothing is known and no arc from a known value is left, so only sums can tie known values to unknown ones.
        for v in new:
            reach = min(reach, first_touch[v])
        if unknown and (fewest is None or len(unknown) < len(fewest[1])):
            fewest = start, _unknown_in_order(live, unknown)
        if len(unknown) == len(live) and start <= reach and program.always.isdisjoint(unknown):
            if blocked is None:
                blocked = DeadEnd(start, stop, _unknown_in_order(live, unknown))
            if not closure.elimination.has_ties():
                return rerunning or blocked
        if blocked is not None and rerunning is None and blocked.start - start > MAX_SUM_OPS:
            counts.failed_sums += 1
            return blocked

        idle = 0 if new else idle + 1
        if idle > patience:
            break
    return rerunning or blocked or DeadEnd(start, stop, _unknown_in_order(live, unknown), fewest_unknown=fewest)


def _unknown_in_order(live: Iterable[int], unknown: Collection[int]) -> Values:
    return tuple(v for v in live if v in unknown)


def _make_step(
    program: Program, closure: Closure, start: int, stop: int, entry: Values, exit: Values, side: frozenset[int]
) -> Step | None:
    """Return the step between two cuts, given the closure that contains the entry; None if it cuts a selection."""
    reselected: list[int] = []
    for v in exit:
        selection = program.selected.get(v)
        if selection is None:
            continue
        if selection.first < start <= selection.last:
            return None
        if start <= selection.first:
            reselected.append(v)
    known = {*exit, *side}.difference(reselected)

    # The search meets the readers of a value before its maker, so it may solve for a value that can be recomputed.
    if reselected or any(program.made_at[arc.head] >= start for arc in _inverses(closure.order)):
        closure = Closure(program, known)
        closure.add(range(start, stop))
        if not closure.covers(entry):
            return None

    # The heads of barred inverses are saved. Other values may be derivable from these heads by trusted arcs, so a
    # second closure starts from them and uses no barred arcs.
    saved = _barred_heads(needed(program, closure.order, entry))
    if _barred_heads(closure.order):
        closure = Closure(program, known.union(saved), trusted=True)
        closure.add(range(start, stop))
    saved += _kept_results(program, start, stop)
    derive = tuple(closure.order)
    arcs = _inverses(needed(program, derive, entry))
    return Step(start, stop, entry, exit, tuple(saved), derive, arcs, tuple(reselected))


def _make_rerunning_step(
    program: Program, start: int, stop: int, entry: Values, exit: Values, side: frozenset[int]
) -> Step | None:
    """Return a step with an entry that is derived from operations above it as well; None if that fails."""
    if not program.selected.keys().isdisjoint(exit):
        return None
    closure = Closure(program, {*exit, *side}, trusted=True)
    closure.add(range(start, stop))
    has_progress = True
    while has_progress:
        has_progress = False
        for v in entry:
            if v not in closure and closure.run(_find_makers(program, v, closure)):
                has_progress = True
    if not closure.covers(entry):
        return None
    order = tuple(closure.order)
    arcs = _inverses(needed(program, order, entry))
    return Step(start, stop, entry, exit, _kept_results(program, start, stop), order, arcs)


def _inverses(order: Iterable[Derivation]) -> tuple[Arc, ...]:
    return tuple(d.arc for d in order if isinstance(d, Invert))


def _barred_heads(order: Iterable[Derivation]) -> list[int]:
    return [arc.head for arc in _inverses(order) if arc.barred]


def _kept_results(program: Program, start: int, stop: int) -> Values:
    return tuple(v for v in program.results(start, stop) if program.values[v].kept)


def _find_makers(program: Program, value: int, known: Closure) -> list[int]:
    """Return the operations that compute a value from known ones; none if there are too many, or barriers."""
    found: set[int] = set()
    todo = [value]
    while todo:
        v = todo.pop()
        made = program.made_at[v]
        if v in known or made in found:
            continue
        if made < 0 or program.ops[made].barrier is not None or len(found) == MAX_RERUN_OPS:
            return []
        found.add(made)
        todo += program.ops[made].ins
    return sorted(found)


def _splits_selection(program: Program, start: int, live: Collection[int]) -> bool:
    """Return whether a cut before `start` would hold both a selected value and its source.

    Operations below the cut may compare them, so they must be regenerated together.
    """
    for v in live:
        selection = program.selected.get(v)
        if selection is not None and program.made_at[v] < start and not selection.roots.isdisjoint(live):
            return True
    return False


def needed(program: Program, order: Sequence[Derivation], wanted: Iterable[int]) -> list[Derivation]:
    """Return the derivations that `wanted` depends on, in order; a barred inverse counts as a saved value."""
    made: dict[int, int] = {}
    for i, d in enumerate(order):
        for v in made_by(program, d):
            made.setdefault(v, i)
    found: set[int] = set()
    todo = list(wanted)
    while todo:
        i = made.get(todo.pop())
        if i is None or i in found:
            continue
        found.add(i)
        d = order[i]
        if not (isinstance(d, Invert) and d.arc.barred):
            todo += read_by(program, d)
    return [order[i] for i in sorted(found)]

"""Regions: maximal runs of steps with activations that are freed, and the places where the search got stuck."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from revfx.errors import Cause, Reason
from revfx.passes.closure import Forward, Invert
from revfx.passes.cuts import PATIENCE, Step, Stuck, SumSearches, find_step, live_before, needed
from revfx.passes.program import Program


RETRIES = 8  # starts of a search within operations that an earlier one passed over
RERUNS = 32  # starts one operation further up, in the head and the loss of a model whose input is its target


@dataclass(frozen=True, slots=True)
class Region:
    """A run of steps in program order. Kept: the last cut, the first one, `saved` values and `side` inputs.

    `kept_bytes` is their size; `freed_bytes` is a lower bound of the bytes that the backward regenerates.
    """

    steps: tuple[Step, ...]
    saved: tuple[int, ...]
    side: tuple[int, ...]
    kept_bytes: int
    freed_bytes: int

    @property
    def start(self) -> int:
        """The index of the first operation."""
        return self.steps[0].start

    @property
    def stop(self) -> int:
        """One past the index of the last operation."""
        return self.steps[-1].stop

    @property
    def entry(self) -> tuple[int, ...]:
        """The first cut."""
        return self.steps[0].entry

    @property
    def exit(self) -> tuple[int, ...]:
        """The last cut."""
        return self.steps[-1].exit


@dataclass(frozen=True, slots=True)
class RegionSummary:
    """A region for people: its first and last line (`file:line`), its steps, and bytes kept and regenerated."""

    where: tuple[str, str]
    steps: int
    inverted: int
    kept_cuts: int
    kept_bytes: int
    freed_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.where[0]} .. {self.where[1]}: {self.steps} steps, {self.inverted} inverted, {self.kept_cuts} cuts"
            f" kept ({self.kept_bytes:,} bytes), {self.freed_bytes:,} bytes regenerated"
        )


def summary(program: Program, region: Region, kept_cuts: int, freed_bytes: int) -> RegionSummary:
    """Summarize a region of which so many cuts are kept and so many bytes are freed."""
    where = program.ops[region.start].where, program.ops[region.stop - 1].where
    inverted = sum(step.inverts for step in region.steps)
    return RegionSummary(where, len(region.steps), inverted, kept_cuts, region.kept_bytes, freed_bytes)


@dataclass(frozen=True, slots=True)
class Walk:
    """The steps found upwards from one cut (last one first), the side inputs they took, and where it ended."""

    steps: tuple[Step, ...]
    side: frozenset[int]
    stuck: Stuck


def find_regions(program: Program, patience: int | None = None) -> tuple[tuple[Region, ...], tuple[Stuck, ...]]:
    """Return the regions of a program in order, and the stuck points between them (nearest the end first).

    Where there are no regions at all, these hold also what would have had to be kept. A region must free more bytes
    than it keeps. The search ends after `patience` operations that it looked at, if it has found no region by then.
    """
    regions: list[Region] = []
    stuck: list[Stuck] = []
    kept: list[Stuck] = []
    stop, retries, reruns = len(program.ops), RETRIES, RERUNS
    live: dict[int, None] = dict.fromkeys(program.data(program.outputs))
    searches = SumSearches()
    while stop > 0 and (regions or patience is None or searches.steps < patience):
        walk = _walk(program, stop, tuple(live), searches)
        region = _region(program, walk)
        if walk.stuck.stop > 0:
            stuck.append(walk.stuck)
        kept += _kept_instead(program, walk) if region is None else ()
        if region is not None:
            regions.append(region)
            stop, live = region.start, dict.fromkeys(region.entry)
        elif walk.steps and not (reruns and _ends_at_input(program, walk.steps[-1])):
            # It may be one step of all, as something made above it is read again below it: try again from there.
            top = walk.steps[-1]
            again = max((u for v in top.entry for u in program.users[v] if top.start < u < stop), default=-1)
            if again < 0 or retries == 0:
                stop, live, retries = top.start, dict.fromkeys(top.entry), RETRIES
            else:
                retries -= 1
                while stop > again:
                    stop -= 1
                    live = live_before(program, live, stop)
        else:  # nothing was found, or it ends by running all again from an input that is read below it, as a target is
            reruns -= bool(walk.steps)
            stop -= 1
            live = live_before(program, live, stop)
    last = {program.ops[s.start].where: s for s in sorted(kept, key=lambda s: s.start)}  # one for each line of code
    once = sorted(last.values(), key=lambda s: -s.start)
    return tuple(reversed(regions)), tuple(stuck if regions else (*stuck, *once))


def _ends_at_input(program: Program, top: Step) -> bool:
    """Return whether a step goes up to the program's inputs, from which all can be run again."""
    return top.start == 0 and (not top.inverts or all(program.values[v].given for v in top.entry))


def _kept_instead(program: Program, walk: Walk) -> Iterator[Stuck]:
    """Yield the places where the steps of a walk keep values because their inverses round."""
    for step in walk.steps:
        for i in range(step.start, step.stop):
            for arc in (a for a in program.ops[i].arcs if a.barred is not None and a.tail and a.head in step.saved):
                text = f"`{program.values[arc.head].name}` has to be kept: {arc.barred}"
                yield Stuck(i, i + 1, (arc.head,), Cause(Reason.ROUNDING, text))


def extend(
    program: Program, stop: int, live: tuple[int, ...], side: frozenset[int], searches: SumSearches
) -> tuple[list[Step], Stuck]:
    """Return all steps upwards from one cut with given side inputs, and the reason why there is no further one."""
    steps: list[Step] = []
    while stop > 0:
        patience = max(PATIENCE, 5 * (steps[-1].stop - steps[-1].start)) if steps else PATIENCE
        found = find_step(program, stop, live, side, patience, searches)
        if isinstance(found, Stuck):
            return steps, found
        steps.append(found)
        stop, live = found.start, found.entry
    return steps, Stuck(0, 0, ())


def _walk(program: Program, stop: int, live: tuple[int, ...], searches: SumSearches) -> Walk:
    found = _climb_across(program, stop, live, frozenset(), searches)
    steps = [*found.steps]
    while found.stuck.stop > 0 and found.stuck.barrier is None:
        top = steps[-1].entry if steps else live
        for candidates in _side_candidates(program, found.stuck, found.side):
            more = _climb_across(program, found.stuck.stop, top, found.side | candidates, searches)
            if _pays(program, more.steps, more.side - found.side):
                steps, found = [*steps, *more.steps], more
                break
        else:
            break
    return Walk(tuple(steps), found.side, found.stuck)


def _climb_across(
    program: Program, stop: int, live: tuple[int, ...], side: frozenset[int], searches: SumSearches
) -> Walk:
    """Return all steps upwards from one cut with given side inputs, and with those that are `_shared` within the
    largest step where it takes less memory to keep them.

    Only the maker of such a value tells: a step that reads it goes up to there, past every coupling between.
    """
    steps, stuck = extend(program, stop, live, side, searches)
    while inverting := [s for s in steps if s.inverts]:
        largest = max(inverting, key=lambda s: _made_bytes(program, s.start, s.stop))
        shared = frozenset(_shared(program, largest, side))
        if not shared:
            break
        with_all, _ = extend(program, largest.stop, largest.exit, side | shared, searches)
        across = shared.intersection(v for s in with_all for v in s.entry)
        if not across:
            break
        more, then = extend(program, largest.stop, largest.exit, side | across, searches)
        instead = [*(s for s in steps if s.start >= largest.stop), *more]
        takes = _region_bytes(program, steps, side, largest.start)
        if not _pays(program, more, across) or _region_bytes(program, instead, side | across, largest.start) >= takes:
            break
        steps, stuck, side = instead, then, side | across
    return Walk(tuple(steps), side, stuck)


def _shared(program: Program, step: Step, side: frozenset[int]) -> Iterator[int]:
    """Yield candidates for side inputs.

    A step computes them from sources (a slice of a table, a mask), side inputs or other live values (a condition made
    of the model's input, if that is returned). They are read before and after an inverse.
    """
    inverted = sorted(d.op for d in step.derive if isinstance(d, Invert) and not d.arc.exact)
    alive = side.union(v for v in step.entry if v in step.exit)
    for v in _recomputable(program, [step], alive.union(step.saved)) - alive if inverted else ():
        users = program.users[v]
        if users and bisect_right(inverted, users[0]) < bisect_left(inverted, users[-1]):
            yield v


def _region_bytes(program: Program, steps: Sequence[Step], side: frozenset[int], start: int) -> int:
    """Return the bytes of kept values, of the largest step, and of the values above the steps from `start` on."""
    kept = [*side, *(v for s in steps for v in s.saved)]
    storage = {program.values[v].storage for v in kept}
    inverting = [s for s in steps if s.inverts]
    above = _made_bytes(program, start, min(s.start for s in inverting), storage)
    return program.nbytes(kept) + above + max(_made_bytes(program, s.start, s.stop, storage) for s in inverting)


def _side_candidates(program: Program, stuck: Stuck, side: frozenset[int]) -> list[frozenset[int]]:
    """Return sets worth trying as side inputs: values read repeatedly above the stuck cut, then the long-lived ones."""
    readers = {v: [u for u in program.users[v] if u < stuck.stop] for v in stuck.unknown if v not in side}
    several = sorted((v for v, u in readers.items() if len(u) >= 2), key=lambda v: -len(readers[v]))
    window = stuck.stop - stuck.start
    lasting = frozenset(v for v in several if readers[v][-1] - readers[v][0] > 2 * window)
    singles = [frozenset((v,)) for v in several[:3]]
    return singles + ([lasting] if len(lasting) > 1 else [])


def _pays(program: Program, steps: Sequence[Step], side: frozenset[int]) -> bool:
    """Return whether keeping `side` buys more bytes than it takes, by inverses in at least two steps that read it.

    Results of running forwards from `side` alone do not count: that is checkpointing, which needs no inverse.
    """
    given = _recomputable(program, steps, side)
    readers = 0
    freed: dict[int, int] = {}
    for s in steps:
        inverts = any(not a.exact and a.head not in given for a in s.arcs)
        readers += inverts and not side.isdisjoint(_read(program, s.start, s.stop))
        for v in s.entry:
            if v not in given:
                freed[program.values[v].storage] = program.values[v].nbytes
    return readers >= 2 and sum(freed.values()) > program.nbytes(tuple(side))


def _recomputable(program: Program, steps: Sequence[Step], side: frozenset[int]) -> set[int]:
    """Return `side`, and the results of operations of `steps` (last one first) from it and from sources."""
    known = set(side)
    for i in range(steps[-1].start, steps[0].stop) if steps else ():
        op = program.ops[i]
        if all(v in known or program.values[v].source for v in op.ins):
            known.update(op.outs)
    return known


def _region(program: Program, walk: Walk) -> Region | None:
    """Return a walk's region, trimmed of steps that invert nothing at both ends; None where it would not pay."""
    steps = list(reversed(walk.steps))
    while out := [k for k, s in enumerate(steps) if k and any(i < steps[0].start for i in s.above)]:
        del steps[: out[-1]]  # recomputed operations must lie in the region; its first step runs forwards
    trusted = [i for i, s in enumerate(steps) if s.inverts]
    if not trusted:
        return None
    calls = [sum(program.ops[i].opaque for i in range(s.start, s.stop)) for s in steps]
    spanned = sum(calls[trusted[0] : trusted[-1] + 1])  # operations within the span of inverses run again above them
    above = [i for i in range(trusted[0] + 1) if sum(calls[i : trusted[0]]) <= spanned]
    low = min(above, key=lambda i: (program.nbytes(steps[i].entry), -i))
    high = min(range(trusted[-1], len(steps)), key=lambda i: (program.nbytes(steps[i].exit), -i))
    steps = steps[low : high + 1]
    saved = tuple(dict.fromkeys(v for s in steps for v in s.saved))
    side = tuple(sorted(walk.side.intersection(_read(program, steps[0].start, steps[-1].stop))))
    kept = (*steps[0].entry, *steps[-1].exit, *saved, *side)
    kept_storage = {program.values[v].storage for v in kept}
    freed = [_made_bytes(program, s.start, s.stop, kept_storage) for s in steps]
    kept_bytes, freed_bytes = program.nbytes(kept), sum(freed)
    # Of what runs again though nothing is inverted, and nothing but indices kept, as in a checkpoint, the step below
    # alone counts, whose exit is regenerated.
    keeps = {i for i, s in enumerate(steps, low) if not all(program.values[v].kept for v in s.saved)}
    by_inverses = [f for i, f in enumerate(freed, low) if trusted[0] - 1 <= i <= trusted[-1] or i in keeps]
    alone = all(_is_carrier(program, s) for s in steps if s.inverts)
    if alone or sum(by_inverses) - max(by_inverses) <= kept_bytes:
        return None  # one step is alive at a time: that much plain checkpointing saves too
    return Region(tuple(steps), saved, side, kept_bytes, freed_bytes)


def _is_carrier(program: Program, step: Step) -> bool:
    """Return whether codes must make up for all that a step inverts, as for matrices and `tanh`, or it inverts without
    computing anything, as parts of an activation that is spelled out: what carries a region on from coupling to
    coupling, but is not worth one of its own.
    """
    computes = any(isinstance(d, Forward) for d in needed(program, step.derive, step.entry))
    return not computes or all(a.coded for a in step.arcs if not a.exact)


def _read(program: Program, start: int, stop: int) -> Iterator[int]:
    """Return the values that operations start..stop-1 read."""
    return (v for op in program.ops[start:stop] for v in op.ins)


def _made_bytes(program: Program, start: int, stop: int, kept: Container[int] = ()) -> int:
    """Return bytes that operations start..stop-1 make, besides the storage that is kept."""
    made: dict[int, int] = {}
    for op in program.ops[start:stop]:
        for v in op.outs:
            value = program.values[v]
            if value.storage not in kept:
                made[value.storage] = value.nbytes
    return sum(made.values())

"""Regions: runs of steps whose activations can be freed, and the places where the search got stuck."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from revfx.errors import Cause, Reason
from revfx.passes.closure import Forward, Invert
from revfx.passes.cuts import PATIENCE, DeadEnd, SearchCounts, Step, find_step, live_before, needed
from revfx.passes.program import Program


MAX_RETRIES = 8  # searches that begin among operations which an earlier search passed over
MAX_RERUNS = 32  # searches that begin one operation earlier than the last one: of losses that read the input, too


@dataclass(frozen=True, slots=True)
class Region:
    """A run of steps in program order. It keeps its first and last cut, `saved` values and `side` inputs.

    `kept_bytes` is the size of these; `freed_bytes` is the sum over its steps of the allocations that each makes.
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
    """Summarize a region, given the number of its kept cuts and the bytes that it frees."""
    where = program.ops[region.start].where, program.ops[region.stop - 1].where
    inverted = sum(step.is_inverted for step in region.steps)
    return RegionSummary(where, len(region.steps), inverted, kept_cuts, region.kept_bytes, freed_bytes)


@dataclass(frozen=True, slots=True)
class Walk:
    """The steps found upwards from one cut (last one first), their side inputs, and the place where they end."""

    steps: tuple[Step, ...]
    side: frozenset[int]
    stuck: DeadEnd

    @property
    def inverting(self) -> list[Step]:
        """The steps that invert."""
        return [step for step in self.steps if step.is_inverted]


def find_regions(program: Program, max_searched: int | None = None) -> tuple[tuple[Region, ...], tuple[DeadEnd, ...]]:
    """Find the regions of a program.

    A region must free more bytes than it keeps, without those of its largest step, which is there at once. The search
    ends if it has looked at `max_searched` operations (None: it does not), and has found no region.

    Returns:
        The regions in order, and the stuck points between them (nearest the end first). If there are no regions, the
        latter also name values that would have to be kept.
    """
    regions: list[Region] = []
    stuck: list[DeadEnd] = []
    kept: list[DeadEnd] = []
    stop, retries, reruns = len(program.ops), MAX_RETRIES, MAX_RERUNS
    live: dict[int, None] = dict.fromkeys(program.data(program.outputs))
    counts = SearchCounts()
    while stop > 0 and (regions or max_searched is None or counts.operations < max_searched):
        walk = _walk(program, stop, tuple(live), counts)
        region = _make_region(program, walk)
        if walk.stuck.stop > 0:
            stuck.append(walk.stuck)
        if region is not None:
            regions.append(region)
            stop, live = region.start, dict.fromkeys(region.entry)
            continue

        # Without a region, choose a cut further up for the next search.
        kept += _find_kept_heads(program, walk)
        top = walk.steps[-1] if walk.steps else None
        if top is None:
            start = stop - 1
        elif reruns > 0 and _ends_at_input(program, top):
            # Everything is recomputed from an input that is also read at the end, such as a target.
            start = stop - 1
            reruns -= 1
        else:
            # The step may be that large only because a value made above it is read below: start from there.
            reader = _last_reader(program, top, stop)
            if reader >= 0 and retries > 0:
                start = reader
                retries -= 1
            else:
                start = top.start
                retries = MAX_RETRIES
        while stop > start:
            stop -= 1
            live = live_before(program, live, stop)

    if not regions:
        by_line = {program.ops[s.start].where: s for s in sorted(kept, key=lambda s: s.start)}
        stuck += sorted(by_line.values(), key=lambda s: -s.start)
    return tuple(reversed(regions)), tuple(stuck)


def _last_reader(program: Program, step: Step, stop: int) -> int:
    """Return the last operation after the first one of a step and before `stop` that reads the step's entry, or -1."""
    last = -1
    for v in step.entry:
        for user in program.users[v]:
            if step.start < user < stop:
                last = max(last, user)
    return last


def _ends_at_input(program: Program, top: Step) -> bool:
    """Return whether a step goes up to the program's inputs, from which everything can be recomputed."""
    return top.start == 0 and (not top.is_inverted or all(program.values[v].given for v in top.entry))


def _find_kept_heads(program: Program, walk: Walk) -> Iterator[DeadEnd]:
    """Yield the places where the steps of a walk keep values because their inverses round."""
    for step in walk.steps:
        for i in range(step.start, step.stop):
            for arc in program.ops[i].arcs:
                if arc.barred is not None and arc.tail and arc.head in step.saved:
                    text = f"`{program.values[arc.head].name}` has to be kept: {arc.barred}"
                    yield DeadEnd(i, i + 1, (arc.head,), Cause(Reason.ROUNDING, text))


def _walk(program: Program, stop: int, live: tuple[int, ...], counts: SearchCounts) -> Walk:
    """Find the steps upwards from one cut, with the side inputs that pay."""
    walk = _extend_with_shared(program, stop, live, frozenset(), counts)
    while (longer := _continue_walk(program, walk, live, counts)) is not None:
        walk = longer
    return walk


def _continue_walk(program: Program, walk: Walk, live: tuple[int, ...], counts: SearchCounts) -> Walk | None:
    """Return a walk that further side inputs continue above the stuck cut; None if no side inputs pay."""
    stuck = walk.stuck
    if stuck.stop == 0 or stuck.barrier is not None:
        return None
    top = walk.steps[-1].entry if walk.steps else live
    for candidates in _side_candidates(program, stuck, walk.side):
        more = _extend_with_shared(program, stuck.stop, top, walk.side | candidates, counts)
        if _pays(program, more.steps, more.side - walk.side):
            return Walk((*walk.steps, *more.steps), more.side, more.stuck)
    return None


def _extend(program: Program, stop: int, live: tuple[int, ...], side: frozenset[int], counts: SearchCounts) -> Walk:
    """Find all steps upwards from one cut with given side inputs."""
    steps: list[Step] = []
    patience = PATIENCE
    while stop > 0:
        found = find_step(program, stop, live, side, patience, counts)
        if isinstance(found, DeadEnd):
            return Walk(tuple(steps), side, found)
        steps.append(found)
        stop, live = found.start, found.entry
        patience = max(PATIENCE, 5 * (found.stop - found.start))
    return Walk(tuple(steps), side, DeadEnd(0, 0, ()))


def _extend_with_shared(
    program: Program, stop: int, live: tuple[int, ...], side: frozenset[int], counts: SearchCounts
) -> Walk:
    """Find all steps upwards from one cut; keep shared values as further side inputs where this lowers the peak."""
    walk = _extend(program, stop, live, side, counts)
    while (smaller := _keep_shared(program, walk, counts)) is not None:
        walk = smaller
    return walk


def _keep_shared(program: Program, walk: Walk, counts: SearchCounts) -> Walk | None:
    """Return a walk that keeps values shared within the largest step; None if its peak is not lower."""
    if not walk.inverting:
        return None
    largest = max(walk.inverting, key=lambda s: _made_bytes(program, s.start, s.stop))
    shared = frozenset(_shared_values(program, largest, walk.side))
    if not shared:
        return None
    # A step that reads a shared value goes up to its maker, past every coupling between. So the values that matter are
    # those that cross a cut once all of them are kept.
    crossing: set[int] = set()
    for step in _extend(program, largest.stop, largest.exit, walk.side | shared, counts).steps:
        crossing.update(step.entry)
    kept = shared & crossing
    if not kept:
        return None
    more = _extend(program, largest.stop, largest.exit, walk.side | kept, counts)
    if not _pays(program, more.steps, kept):
        return None
    below = [step for step in walk.steps if step.start >= largest.stop]
    smaller = Walk((*below, *more.steps), walk.side | kept, more.stuck)
    if _peak_bytes(program, smaller, largest.start) >= _peak_bytes(program, walk, largest.start):
        return None
    return smaller


def _shared_values(program: Program, step: Step, side: frozenset[int]) -> Iterator[int]:
    """Yield candidates for side inputs: values computed in `step`, and read on both sides of an inverted operation.

    They follow from sources (a slice of a table, a mask), from side inputs or from other live values. An example of the
    last is a condition computed from the model's input, if that is returned.
    """
    inverted: list[int] = []
    for d in step.derive:
        if isinstance(d, Invert) and not d.arc.exact:
            inverted.append(d.op)
    if not inverted:
        return
    inverted.sort()
    alive = side.union({*step.entry}.intersection(step.exit))
    for v in _recomputable(program, [step], alive.union(step.saved)) - alive:
        users = program.users[v]
        if users and bisect_right(inverted, users[0]) < bisect_left(inverted, users[-1]):
            yield v


def _peak_bytes(program: Program, walk: Walk, start: int) -> int:
    """Return the bytes to be small: kept values, the largest step, and values from `start` to the first inverse."""
    kept = set(walk.side)
    for step in walk.steps:
        kept.update(step.saved)
    storages = program.storages(kept)
    above = _made_bytes(program, start, walk.inverting[-1].start, storages)
    return program.nbytes(kept) + above + max(_made_bytes(program, s.start, s.stop, storages) for s in walk.inverting)


def _side_candidates(program: Program, stuck: DeadEnd, side: frozenset[int]) -> list[frozenset[int]]:
    """Return sets worth trying as side inputs: values read repeatedly above the stuck cut, then the long-lived ones."""
    readers: dict[int, list[int]] = {}
    for v in stuck.unknown:
        above = [u for u in program.users[v] if u < stuck.stop]
        if v not in side and len(above) >= 2:
            readers[v] = above
    repeated = sorted(readers, key=lambda v: -len(readers[v]))
    candidates = [frozenset((v,)) for v in repeated[:3]]
    window = stuck.stop - stuck.start
    lasting = frozenset(v for v in repeated if readers[v][-1] - readers[v][0] > 2 * window)
    if len(lasting) > 1:
        candidates.append(lasting)
    return candidates


def _pays(program: Program, steps: Sequence[Step], side: frozenset[int]) -> bool:
    """Return whether keeping `side` saves more bytes than it takes, by inverses in at least two steps that read it.

    Values recomputed from `side` alone do not count: that is checkpointing, which needs no inverse.
    """
    recomputable = _recomputable(program, steps, side)
    readers = 0
    freed: dict[int, int] = {}
    for step in steps:
        inverted = {arc.head for arc in step.arcs if not arc.exact}
        if inverted - recomputable and not side.isdisjoint(program.operands(step.start, step.stop)):
            readers += 1
        for v in step.entry:
            if v not in recomputable:
                freed[program.values[v].storage] = program.values[v].nbytes
    return readers >= 2 and sum(freed.values()) > program.nbytes(side)


def _recomputable(program: Program, steps: Sequence[Step], side: frozenset[int]) -> set[int]:
    """Return `side`, and the values that operations of `steps` (last one first) compute from it and from sources."""
    known = set(side)
    if steps:
        for op in program.ops[steps[-1].start : steps[0].stop]:
            if all(v in known or program.values[v].source for v in op.ins):
                known.update(op.outs)
    return known


def _make_region(program: Program, walk: Walk) -> Region | None:
    """Return the region of a walk, without the steps at its ends that only cost; None if it does not pay."""
    steps = _drop_rerunning(walk.steps[::-1])
    inverting = [i for i, step in enumerate(steps) if step.is_inverted]
    if not inverting:
        return None
    first, last = inverting[0], inverting[-1]

    # Trim the steps around the inverses to the smallest cuts. The steps above the first inverse may recompute no more
    # operations than the steps between the inverses.
    opaque_ops: list[int] = []
    for step in steps:
        opaque_ops.append(sum(op.opaque for op in program.ops[step.start : step.stop]))
    spanned = sum(opaque_ops[first : last + 1])
    starts = [i for i in range(first + 1) if sum(opaque_ops[i:first]) <= spanned]
    low = min(starts, key=lambda i: (program.nbytes(steps[i].entry), -i))
    high = min(range(last, len(steps)), key=lambda i: (program.nbytes(steps[i].exit), -i))
    steps = steps[low : high + 1]

    # Count the bytes. One step is alive at a time. Steps outside of the inverses only recompute, as a checkpoint does:
    # they count where they keep data, and directly above the first inverse, which regenerates their exit.
    saved: dict[int, None] = {}
    for step in steps:
        saved.update(dict.fromkeys(step.saved))
    side = tuple(sorted(walk.side.intersection(program.operands(steps[0].start, steps[-1].stop))))
    kept = (*steps[0].entry, *steps[-1].exit, *saved, *side)
    kept_bytes, kept_storages = program.nbytes(kept), program.storages(kept)
    freed_bytes = 0
    by_inverses: list[int] = []
    for i, step in enumerate(steps, low):
        freed = _made_bytes(program, step.start, step.stop, kept_storages)
        freed_bytes += freed
        if first - 1 <= i <= last or not all(program.values[v].kept for v in step.saved):
            by_inverses.append(freed)
    if sum(by_inverses) - max(by_inverses) <= kept_bytes:
        return None
    if all(_is_not_worthwhile(program, step) for step in steps if step.is_inverted):
        return None
    return Region(steps, tuple(saved), side, kept_bytes, freed_bytes)


def _drop_rerunning(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Drop steps at the start until no later step reruns operations from before the region."""
    i = len(steps) - 1
    while i > 0:
        if steps[i].first_run < steps[0].start:
            steps = steps[i:]
            i = len(steps)
        i -= 1
    return steps


def _is_not_worthwhile(program: Program, step: Step) -> bool:
    """Return whether a step continues a region from coupling to coupling, but is not worth a region of its own.

    Either it inverts without computing anything, as in the parts of an activation written as several operators. Or
    all of its inverses that round need codes, as for matrices and `tanh`.
    """
    computes = any(isinstance(d, Forward) for d in needed(program, step.derive, step.entry))
    return not computes or all(arc.coded for arc in step.arcs if not arc.exact)


def _made_bytes(program: Program, start: int, stop: int, kept: Container[int] = ()) -> int:
    """Return the bytes that operations start..stop-1 make, besides the allocations that are kept."""
    made: dict[int, int] = {}
    for v in program.results(start, stop):
        value = program.values[v]
        if value.storage not in kept:
            made[value.storage] = value.nbytes
    return sum(made.values())

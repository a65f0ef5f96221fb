"""The load of a step under a plan: the bytes in every slot of its forward and its backward, and the extra seconds."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from revfx.fit.costs import Cost, bit_seconds, estimated_seconds
from revfx.fit.needs import Needs
from revfx.fit.plan import Plan, Segment
from revfx.fit.progress import note_simulation
from revfx.fit.tape import Memory


BITS = 8  # in a byte
MORE = 2  # bytes an element that are there while bits are made, or made use of
NOTED, EACH = 2**16, 1024  # bytes at most that are noted for replays: random states; and of each dropped tensor
OVERHEAD = 1e-5  # seconds that it takes to have an operator run again

Hold = Callable[[int, int, int | None], None]  # so many bytes from one slot up to another


@dataclass(frozen=True)
class Credit:
    """Bytes that a plan may take above its budget, as the plain step of the same caller takes more as well: when the
    caller's loss is computed (`turn`), and in the rest of the backward.
    """

    turn: int = 0
    backward: int = 0


@dataclass(frozen=True)
class Load:
    """Bytes in each slot, and the seconds beyond plain autograd."""

    live: list[int]
    seconds: float

    @property
    def peak(self) -> int:
        """Return the most bytes."""
        return max(self.live)

    def peak_with(self, credit: Credit, turn: int) -> int:
        """Return the most bytes above a credit; the backward begins with operator `turn`."""
        at = 2 * turn + 1
        backward = max((*self.live[2 * turn : at], *self.live[at + 1 :]), default=0)
        return max(max(self.live[: 2 * turn], default=0), self.live[at] - credit.turn, backward - credit.backward)


class Units:
    """The runs of operators of which the engine drops saved tensors when the last operator has run."""

    def __init__(self, plan: Plan, segments: Iterable[Segment]) -> None:
        self.plan = plan
        spans: list[tuple[int, int]] = []
        for segment in segments:
            of_block: dict[int, list[int]] = {}
            for rerun in segment.reruns:
                of_block.setdefault(plan.block_of[rerun.op], []).append(rerun.op)
            spans += [self._span(block, ops) for block, ops in of_block.items()]
            made_by = plan.needs.tape.made_by[plan.needs.value(segment.pack)]
            made = plan.needs.tape.packs[segment.pack].made
            spans.append((made_by or 0, max(made_by or 0, made - 1)))
        joined = join(spans)
        self._starts, self._ends = [first for first, _ in joined], [last for _, last in joined]

    def _span(self, block: int, ops: list[int]) -> tuple[int, int]:
        """Return the first and the last of some operators, and of those in their block that they read from."""
        first = min(ops)
        for op in ops:
            for v in self.plan.reads[op]:
                made = self.plan.needs.tape.made_by[v]
                if made is not None and self.plan.block_of[made] == block and not self.plan.is_base(v):
                    first = min(first, made)
        return first, max(ops)

    def end(self, value: int) -> int:
        """Return the number of the operator after the run in which a value is made."""
        op = self.plan.needs.tape.made_by[value] or 0
        at = bisect_right(self._starts, op) - 1
        return 1 + (self._ends[at] if at >= 0 and op <= self._ends[at] else op)


def join(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return runs of operators, joined where they overlap."""
    found: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(last, found[-1][1])
        else:
            found.append((first, last))
    return found


@dataclass
class Model:
    """A step, the costs of its operators, and the bytes that are there in any case.

    `held`: the caller holds the outputs until the backward ends. `loss`: bytes that are there while the
    caller's loss is computed, beside outputs and their gradient. `credit` is taken off.
    """

    needs: Needs
    costs: Sequence[Cost]
    held: bool = False
    loss: int = 0
    credit: Credit = Credit()

    @cached_property
    def bit(self) -> float:
        """Return the seconds an element that a bit in its place takes."""
        return bit_seconds(self.needs.tape.memories[0].device)

    @cached_property
    def estimates(self) -> list[float]:
        """Return the seconds of each operator of the forward that follow from sizes."""
        return [estimated_seconds(op) for op in self.needs.tape.ops[: self.needs.tape.turn]]

    def end(self, memory: Memory) -> int | None:
        """Return the slot from which on nobody but autograd holds an allocation; None: it is held beyond the step."""
        return None if self.held and memory.returned else memory.end

    def bits_seconds(self, value: int) -> float:
        """Return the seconds to keep a bit for each element."""
        return self.bit * self.needs.elements(value)

    @cached_property
    def natural(self) -> list[int]:
        """Return the bytes in each slot that are there under any plan."""
        tape, until = self.needs.tape, dict[int, int]()
        end = 2 * len(tape.ops) + 2
        change = [0] * (end + 1)

        def hold(size: int, start: int, stop: int) -> None:
            change[start] += size
            change[stop] -= size

        for k in self.needs.stuck:
            m, stop = tape.memory_of[self.needs.value(k)], tape.packs[k].end
            until[m] = max(until.get(m, 0), end if stop is None else stop)
        for n, m in enumerate(tape.memories):
            if not m.is_outside:
                gone = self.end(m)
                hold(m.size, 2 * m.born + 1, end if gone is None else max(gone, until.get(n, 0)))
            elif m.end is not None and m.end < until.get(n, 0):
                hold(m.size, m.end, until[n])
        for o, c in enumerate(self.costs):
            hold(c.scratch, 2 * o + 1, 2 * o + 2)
        for size, start, stop in tape.held:
            hold(size, start, min(stop, end))
        hold(-self.credit.backward, 2 * tape.turn, end)
        hold(self.loss - self.credit.turn + self.credit.backward, 2 * tape.turn + 1, 2 * tape.turn + 2)
        return [*accumulate(change[:end])]

    def load(self, plan: Plan) -> Load:
        """Return the load of the step under `plan`.

        Raises:
            LookupError: something in it can't be computed again.
        """
        held, seconds = self.changes(plan, self.needs.wanted)
        noted = NOTED * bool(plan.dropped) + EACH * len(plan.dropped)
        return Load([a + b + noted for a, b in zip(self.natural, held, strict=True)], seconds)

    def changes(self, plan: Plan, values: Iterable[int]) -> tuple[list[int], float]:
        """Return the bytes in each slot that `plan` takes for some values, and the seconds."""
        note_simulation()
        tape, end = self.needs.tape, 2 * len(self.needs.tape.ops) + 2
        change, spikes = [0] * (end + 1), dict[int, int]()  # bytes for a moment, by slot

        def hold(size: int, start: int, stop: int | None) -> None:
            if stop is None or stop > start:
                change[start] += size
                change[end if stop is None else stop] -= size

        seconds = 0.0
        until, dropped = dict[int, int](), list[int]()  # by value that is kept: when the last that needs it is through
        for v in values:
            packs = self.needs.wanted[v]
            if v in plan.kept:
                until[v] = self.through(packs)
            dropped += [k for k in packs if k in plan.dropped]
        segments = [*plan.segments(dropped)]
        units = Units(plan, segments)
        for v in values:
            for k in self.needs.wanted[v]:
                if k in plan.marks and v not in plan.kept:
                    p = tape.packs[k]
                    self._marks(hold, spikes, v, max(units.end(v), p.made), p.end)
                    if p.unpacked is not None:
                        hold(tape.size(v), 2 * p.unpacked + 1, p.end)
                        spike = tape.size(v) + MORE * self.needs.elements(v)
                        spikes[2 * p.unpacked] = max(spikes.get(2 * p.unpacked, 0), spike)
                    seconds += self.bits_seconds(v)
        for block in dict.fromkeys(plan.dropped[k] for k in dropped):
            for v in plan.bases[block]:
                until[v] = max(until.get(v, 0), self.through(plan.asked[block]))
        for v, stop in until.items():
            if v in plan.coins:
                self._marks(hold, spikes, v, units.end(v), stop)
            elif (dead := self.end(tape.memory(v))) is not None:
                hold(tape.size(v), dead, stop)
        self._await_drops(values, plan, units, hold)
        seconds += self._replay(plan, segments, hold, spikes)
        held = [*accumulate(change[:end])]
        for slot, size in spikes.items():
            held[slot] += size
        return held, seconds

    def through(self, packs: Iterable[int]) -> int:
        """Return from which slot on autograd has let go of the last of some packs."""
        return max((self.needs.tape.packs[k].end or 0 for k in packs), default=0)

    def _marks(self, hold: Hold, spikes: dict[int, int], value: int, start: int, stop: int | None) -> None:
        """Hold a bit an element from an operator on, and `MORE` bytes of each while they are made."""
        elements = self.needs.elements(value)
        hold(-(-elements // BITS), 2 * start + 1, stop)
        spikes[2 * start] = max(spikes.get(2 * start, 0), elements * MORE)

    def _await_drops(self, values: Iterable[int], plan: Plan, units: Units, hold: Hold) -> None:
        """Hold dropped values until their unit ends."""
        until = dict[int, int]()  # by memory
        for v in values:
            if v not in plan.kept and self.needs.tape.made_by[v] is not None:
                m = self.needs.tape.memory_of[v]
                made = max((self.needs.tape.packs[k].made for k in self.needs.wanted[v]), default=0)
                until[m] = max(until.get(m, 0), 2 * max(units.end(v), made) + 1)
        for m, stop in until.items():
            dead = self.end(self.needs.tape.memories[m])
            if dead is not None:
                hold(self.needs.tape.memories[m].size, dead, stop)

    def _replay(self, plan: Plan, segments: Iterable[Segment], hold: Hold, spikes: dict[int, int]) -> float:
        """Return the seconds of the operators that run again; `hold` their results from one slot to another."""
        tape = self.needs.tape
        since, taken = dict[int, int](), set[int]()  # by value: since when; values that were written over
        handed = dict[int, int]()  # by value: until when autograd holds it
        now = most = at = 0
        seconds = 0.0

        def drop(v: int, until: int) -> None:
            nonlocal now
            if v in taken:
                taken.discard(v)
            else:
                stop = max(until, handed.pop(v, 0))
                now -= tape.size(v) if since[v] == stop == at else 0
                hold(tape.size(v), since[v], stop)

        for segment in segments:
            p, value = tape.packs[segment.pack], self.needs.value(segment.pack)
            if p.unpacked is not None and at != 2 * p.unpacked + 1:
                at, now, most = 2 * p.unpacked + 1, 0, 0
            for rerun in segment.reruns:
                op, cost = tape.ops[rerun.op], self.costs[rerun.op]
                for v in op.makes:
                    if (was := tape.before(v)) in rerun.goes:
                        taken.add(was)
                        since[v] = since[was]
                    else:
                        now += tape.size(v)
                        since[v] = at
                coins = [v for v in op.makes if v in plan.coins]
                seconds += OVERHEAD + (self.bits_seconds(coins[0]) if coins else cost.seconds)
                most = max(most, now + (MORE * self.needs.elements(coins[0]) if coins else cost.scratch))
                for v in rerun.drops:
                    drop(v, at)
            spikes[at - 1] = max(spikes.get(at - 1, 0), most)
            handed[value] = max(p.end or at, at)
            for v in segment.drops:
                drop(v, handed[value])
        return seconds

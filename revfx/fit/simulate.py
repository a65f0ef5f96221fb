"""The load of a step under a plan: the bytes in every slot of its forward and its backward, and the extra seconds."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

from revfx.fit.costs import Cost, bit_seconds, estimated_seconds
from revfx.fit.needs import Needs
from revfx.fit.plan import Plan, Segment
from revfx.fit.progress import note_simulation
from revfx.fit.tape import StepAllocation


BITS = 8  # in a byte
MORE = 2  # bytes per element that live while bits are encoded or decoded
STATE_BYTES = 2**16  # at most, of random states that replays need
RECORD_BYTES = 1024  # at most, of Python objects per dropped tensor
OVERHEAD = 1e-5  # seconds of the host per operator that runs again
UNIT_OVERHEAD = 1.5e-4  # seconds of the host per unit: to complete its match, to begin its replay, and to check it
SOFT_PEAK_ORDER = 64  # of the norm

Hold = Callable[[int, int, int | None], None]  # adds bytes from one slot up to another


@dataclass(frozen=True)
class Credit:
    """Bytes that a plan may take above its budget, because the plain step of the same caller takes more as well.

    `loss` counts while the caller's loss is computed, `backward` in the rest of the backward.
    """

    loss: int = 0
    backward: int = 0


@dataclass(frozen=True)
class Load:
    """Bytes in each slot, and the seconds beyond plain autograd."""

    live: list[int]
    seconds: float

    @cached_property
    def peak(self) -> int:
        """Return the most bytes."""
        return max(self.live)

    @cached_property
    def soft_peak(self) -> float:
        """Return a norm of the live bytes: little more than the peak, by how many other slots are about as full."""
        live = torch.tensor(self.live, dtype=torch.float64)
        return float(self.peak * torch.linalg.vector_norm(live / self.peak, SOFT_PEAK_ORDER))

    def peak_with(self, credit: Credit, backward_start: int) -> int:
        """Return the most bytes above a credit; the backward begins with operator `backward_start`."""
        at = 2 * backward_start + 1
        backward = max((*self.live[2 * backward_start : at], *self.live[at + 1 :]), default=0)
        return max(
            max(self.live[: 2 * backward_start], default=0), self.live[at] - credit.loss, backward - credit.backward
        )


class Units:
    """The ranges of operators whose saved tensors the engine drops when the last operator has run."""

    def __init__(self, plan: Plan, segments: Iterable[Segment]) -> None:
        self.plan = plan
        spans: list[tuple[int, int]] = []
        for segment in segments:
            of_block: dict[int, list[int]] = {}
            for rerun in segment.reruns:
                of_block.setdefault(plan.block_of[rerun.op], []).append(rerun.op)
            spans += [self._span(block, ops) for block, ops in of_block.items()]
            made_by = plan.needs.tape.made_by[plan.needs.value(segment.saved_index)]
            made = plan.needs.tape.saved[segment.saved_index].made
            spans.append((made_by or 0, max(made_by or 0, made - 1)))
        joined = join(spans)
        self._starts, self._ends = [first for first, _ in joined], [last for _, last in joined]

    def __len__(self) -> int:
        return len(self._starts)

    def _span(self, block: int, ops: list[int]) -> tuple[int, int]:
        """Return the first and the last of some operators, and of those in their block that they read from."""
        first = min(ops)
        for op in ops:
            for v in self.plan.reads[op]:
                made = self.plan.needs.tape.made_by[v]
                if made is not None and self.plan.block_of[made] == block and v not in self.plan.available:
                    first = min(first, made)
        return first, max(ops)

    def end(self, value: int) -> int:
        """Return the number of the operator after the run in which a value is made."""
        op = self.plan.needs.tape.made_by[value] or 0
        at = bisect_right(self._starts, op) - 1
        return 1 + (self._ends[at] if at >= 0 and op <= self._ends[at] else op)


def join(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges of operators, merged where they overlap."""
    found: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(last, found[-1][1])
        else:
            found.append((first, last))
    return found


@dataclass
class Model:
    """A step, the costs of its operators, and the bytes that live under any plan.

    Attributes:
        held: whether the caller holds the outputs until the backward ends.
        loss: bytes that the caller's loss takes beside outputs and their gradient.
        credit: bytes that do not count.
    """

    needs: Needs
    costs: Sequence[Cost]
    held: bool = False
    loss: int = 0
    credit: Credit = Credit()

    @cached_property
    def bit(self) -> float:
        """Return the seconds per element that is stored as a bit."""
        return bit_seconds(self.needs.tape.allocations[0].device)

    @cached_property
    def estimates(self) -> list[float]:
        """Return the seconds of each operator of the forward, estimated from sizes."""
        return [estimated_seconds(op) for op in self.needs.tape.ops[: self.needs.tape.backward_start]]

    def end(self, allocation: StepAllocation) -> int | None:
        """Return the slot from which on nobody but autograd holds an allocation; None: it is held beyond the step."""
        return None if self.held and allocation.returned else allocation.end

    def bits_seconds(self, value: int) -> float:
        """Return the seconds to store the elements of a value as bits."""
        return self.bit * self.needs.elements(value)

    @cached_property
    def natural(self) -> list[int]:
        """Return the bytes in each slot that live under any plan."""
        tape, until = self.needs.tape, dict[int, int]()
        end = 2 * len(tape.ops) + 2
        change = [0] * (end + 1)

        def hold(size: int, start: int, stop: int) -> None:
            change[start] += size
            change[stop] -= size

        for k in self.needs.pinned:
            m, stop = tape.allocation_of[self.needs.value(k)], tape.saved[k].end
            until[m] = max(until.get(m, 0), end if stop is None else stop)
        for n, m in enumerate(tape.allocations):
            if not m.is_outside:
                gone = self.end(m)
                hold(m.size, 2 * m.born + 1, end if gone is None else max(gone, until.get(n, 0)))
            elif m.end is not None and m.end < until.get(n, 0):
                hold(m.size, m.end, until[n])
        for o, c in enumerate(self.costs):
            hold(c.scratch, 2 * o + 1, 2 * o + 2)
        for size, start, stop in tape.held:
            hold(size, start, min(stop, end))
        hold(-self.credit.backward, 2 * tape.backward_start, end)
        hold(
            self.loss - self.credit.loss + self.credit.backward,
            2 * tape.backward_start + 1,
            2 * tape.backward_start + 2,
        )
        return [*accumulate(change[:end])]

    def load(self, plan: Plan) -> Load:
        """Return the load of the step under `plan`.

        Raises:
            LookupError: a value in it cannot be recomputed.
        """
        held, seconds = self.changes(plan, self.needs.keepable)
        noted = STATE_BYTES * bool(plan.dropped) + RECORD_BYTES * len(plan.dropped)
        return Load([a + b + noted for a, b in zip(self.natural, held, strict=True)], seconds)

    def changes(self, plan: Plan, values: Iterable[int]) -> tuple[list[int], float]:
        """Return the bytes in each slot and the seconds that `plan` takes for some values."""
        note_simulation()
        tape, end = self.needs.tape, 2 * len(self.needs.tape.ops) + 2
        change, spikes = [0] * (end + 1), dict[int, int]()  # bytes for a moment, by slot

        def hold(size: int, start: int, stop: int | None) -> None:
            if stop is None or stop > start:
                change[start] += size
                change[end if stop is None else stop] -= size

        # Kept values live until the last saved tensor that is one of them, or is recomputed from them, has been read.
        seconds = 0.0
        until, dropped = dict[int, int](), list[int]()
        for v in values:
            saved = self.needs.keepable[v]
            if v in plan.kept:
                until[v] = self.through(saved)
            dropped += [k for k in saved if k in plan.dropped]
        segments = [*plan.segments(dropped)]
        units = Units(plan, segments)
        seconds += UNIT_OVERHEAD * len(units)
        for v in values:
            for k in self.needs.keepable[v]:
                if k in plan.compressed and v not in plan.kept:
                    p = tape.saved[k]
                    self._hold_bits(hold, spikes, v, max(units.end(v), p.made), p.end)
                    if p.read_at is not None:
                        hold(tape.size(v), 2 * p.read_at + 1, p.end)
                        spike = tape.size(v) + MORE * self.needs.elements(v)
                        spikes[2 * p.read_at] = max(spikes.get(2 * p.read_at, 0), spike)
                    seconds += self.bits_seconds(v)
        for block in dict.fromkeys(plan.dropped[k] for k in dropped):
            stop = self.through(plan.asked[block])
            for v in plan.bases[block]:
                until[v] = max(until.get(v, 0), stop)
        for v, stop in until.items():
            if v in plan.dropout_masks:
                self._hold_bits(hold, spikes, v, units.end(v), stop)
            elif (dead := self.end(tape.allocation(v))) is not None:
                hold(tape.size(v), dead, stop)
        self._hold_until_dropped(values, plan, units, hold)
        seconds += self._replay(plan, segments, hold, spikes)
        held = [*accumulate(change[:end])]
        for slot, size in spikes.items():
            held[slot] += size
        return held, seconds

    def through(self, saved: Iterable[int]) -> int:
        """Return the slot from which on autograd holds none of some saved tensors."""
        return max((self.needs.tape.saved[k].end or 0 for k in saved), default=0)

    def _hold_bits(self, hold: Hold, spikes: dict[int, int], value: int, start: int, stop: int | None) -> None:
        """Hold one bit per element from an operator on, and `MORE` bytes per element while they are encoded."""
        elements = self.needs.elements(value)
        hold(-(-elements // BITS), 2 * start + 1, stop)
        spikes[2 * start] = max(spikes.get(2 * start, 0), elements * MORE)

    def _hold_until_dropped(self, values: Iterable[int], plan: Plan, units: Units, hold: Hold) -> None:
        """Hold dropped values until their unit ends."""
        until = dict[int, int]()  # by allocation
        for v in values:
            if v not in plan.kept and self.needs.tape.made_by[v] is not None:
                m = self.needs.tape.allocation_of[v]
                made = max((self.needs.tape.saved[k].made for k in self.needs.keepable[v]), default=0)
                until[m] = max(until.get(m, 0), 2 * max(units.end(v), made) + 1)
        for m, stop in until.items():
            dead = self.end(self.needs.tape.allocations[m])
            if dead is not None:
                hold(self.needs.tape.allocations[m].size, dead, stop)

    def _replay(self, plan: Plan, segments: Iterable[Segment], hold: Hold, spikes: dict[int, int]) -> float:
        """Return the seconds of the operators that run again, and hold their results while they live."""
        tape = self.needs.tape
        since, taken = dict[int, int](), set[int]()  # by value, the slot that makes it; values that were written over
        handed = dict[int, int]()  # by value, the slot up to which autograd holds it
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
            p, value = tape.saved[segment.saved_index], self.needs.value(segment.saved_index)
            if p.read_at is not None and at != 2 * p.read_at + 1:
                at, now, most = 2 * p.read_at + 1, 0, 0
            for rerun in segment.reruns:
                op, cost = tape.ops[rerun.op], self.costs[rerun.op]
                for v in op.makes:
                    if (was := tape.before(v)) in rerun.last_reads:
                        taken.add(was)
                        since[v] = since[was]
                    else:
                        now += tape.size(v)
                        since[v] = at
                dropout_masks = [v for v in op.makes if v in plan.dropout_masks]
                seconds += OVERHEAD + (self.bits_seconds(dropout_masks[0]) if dropout_masks else cost.seconds)
                most = max(
                    most, now + (MORE * self.needs.elements(dropout_masks[0]) if dropout_masks else cost.scratch)
                )
                for v in rerun.drops:
                    drop(v, at)
            spikes[at - 1] = max(spikes.get(at - 1, 0), most)
            handed[value] = max(p.end or at, at)
            for v in segment.drops:
                drop(v, handed[value])
        return seconds

"""What a step holds under a plan, at every operator of its forward and its backward, and how long it takes more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from revfx.fit.costs import Cost, bit_seconds
from revfx.fit.needs import Needs
from revfx.fit.plan import Plan


BITS = 8  # in a byte
WITNESS, EACH = 2**16, 1024  # bytes at most of what is noted of tensors: weights of checksums; of each
STATE = 2**13  # bytes of the random state that is noted for a compiled part that runs again
OVERHEAD = 1e-5  # seconds that it takes to have an operator run again

Hold = Callable[[int, int, int | None], None]  # so many bytes from before one operator to before another


@dataclass(frozen=True)
class Load:
    """Bytes while each operator runs, and what plain autograd does not do, in seconds."""

    live: list[int]
    seconds: float

    @property
    def peak(self) -> int:
        """Return the most bytes."""
        return max(self.live)


@dataclass
class Model:
    """A step, what its operators cost, and what is there in any case."""

    needs: Needs
    costs: Sequence[Cost]
    late: int = 0  # bytes of what the forward returns that the caller still holds in the backward
    loss: int = 0  # bytes that are there while the caller's loss is computed, and its gradient

    @cached_property
    def bit(self) -> float:
        """Return the seconds an element that a bit in its place takes."""
        return bit_seconds(self.needs.tape.memories[0].device)

    def coin_seconds(self, value: int) -> float:
        """Return what it takes to have a coin again."""
        return OVERHEAD + self.bit * self.needs.elements(value)

    def mark_seconds(self, pack: int) -> float:
        """Return what it takes to keep a pack as its mark."""
        return self.bit * self.needs.marks[pack].bits * self.needs.elements(self.needs.value(pack))

    @cached_property
    def during(self) -> list[int]:
        """Return the bytes while each operator runs that are there whatever autograd keeps."""
        found = [n + c.scratch for n, c in zip(self._natural(0, self._stuck), [*self.costs, Cost()], strict=True)]
        found[self.needs.tape.turn] += self.loss
        return found

    @cached_property
    def before(self) -> list[int]:
        """Return these right before each operator."""
        return self._natural(1, list(map(max, pairwise([0, *self._stuck]))))

    def _natural(self, shift: int, more: Sequence[int]) -> list[int]:
        """Return what is there if autograd keeps nothing, so many operators later, and `more`."""
        tape = self.needs.tape
        n = len(tape.ops) + 1
        change = [0] * (n + 2)
        for m in tape.memories:
            if m.source is None:
                change[m.born + shift] += m.size
                change[n if m.dead is None else m.dead + shift] -= m.size
        change[tape.turn] += self.late
        return [a + b for a, b in zip(accumulate(change[:n]), more, strict=True)]

    @cached_property
    def _stuck(self) -> list[int]:
        """Return the bytes at each operator that autograd keeps in any case."""
        tape, until = self.needs.tape, dict[int, int]()
        n = len(tape.ops) + 1
        for k in self.needs.stuck:
            m = tape.memory_of[self.needs.value(k)]
            released = tape.packs[k].released
            until[m] = max(until.get(m, 0), n if released is None else released)
        change = [0] * (n + 1)
        for m, stop in until.items():
            if (dead := tape.memories[m].dead) is not None and dead < stop:
                change[dead] += tape.memories[m].size
                change[stop] -= tape.memories[m].size
        return [*accumulate(change[:n])]

    @property
    def returned(self) -> int:
        """Return the bytes of what the forward returns that autograd does not keep."""
        kept = {self.needs.tape.memory_of[v] for v in self.needs.wanted}
        memories = self.needs.tape.memories
        return sum(m.size for m in self.needs.tape.returned if not any(memories[k] is m for k in kept))

    def load(self, plan: Plan) -> Load:
        """Return what the step holds under `plan`.

        Raises:
            LookupError: something in it can't be computed again.
        """
        plan.check_gathered()
        held, spikes, seconds = self.changes(plan, self.needs.wanted)
        extra = [*accumulate(held)]
        noted = WITNESS * bool(plan.dropped) + EACH * len(plan.dropped) + STATE * len(plan.parts)
        live = [d + e + noted for d, e in zip(self.during, extra, strict=False)]
        for at, size in spikes.items():
            live[at] = max(live[at], self.before[at] + extra[at - 1] + size + noted)
        return Load(live, seconds)

    def changes(self, plan: Plan, values: Iterable[int]) -> tuple[list[int], dict[int, int], float]:
        """Return how the bytes that `plan` holds of some values change before each operator, what is there for a
        moment besides, and the seconds that it takes.
        """
        tape, end = self.needs.tape, len(self.needs.tape.ops)
        held, spikes = [0] * (end + 2), dict[int, int]()

        def hold(size: int, start: int, stop: int | None) -> None:
            if stop is None or stop > start:
                held[start] += size
                held[end + 1 if stop is None else stop] -= size

        seconds = 0.0
        until, dropped = dict[int, int](), list[int]()  # by value that is kept: when the last that needs it is through
        for v in values:
            packs = self.needs.wanted[v]
            if v in plan.kept:
                until[v] = self.through(packs)
            dropped += [k for k in packs if k in plan.dropped]
            for k in packs:
                if k in plan.marks and v not in plan.kept:
                    mark, p = self.needs.marks[k], tape.packs[k]
                    self._marks(hold, spikes, v, p.packed, p.released, mark.bits, mark.more)
                    if p.unpacked is not None and mark.bits:
                        hold(tape.size(v), p.unpacked, p.released)
                        spike = tape.size(v) + mark.more * self.needs.elements(v)
                        spikes[p.unpacked] = max(spikes.get(p.unpacked, 0), spike)
                    seconds += self.mark_seconds(k)
        for block in dict.fromkeys(plan.dropped[k] for k in dropped):
            for v in plan.bases[block]:
                until[v] = max(until.get(v, 0), self.through(plan.asked[block]))
        for v, stop in until.items():
            if v in plan.coins:
                self._marks(hold, spikes, v, tape.packs[self.needs.wanted[self.needs.coins[v]][0]].packed, stop)
            elif (dead := tape.memory(v).dead) is not None:
                hold(tape.size(v), dead, stop)
        return held, spikes, seconds + self._replay(plan, dropped, hold, spikes)

    def through(self, packs: Iterable[int]) -> int:
        """Return before which operator autograd lets go of the last of some packs."""
        return max((self.needs.tape.packs[k].released or 0 for k in packs), default=0)

    def _marks(
        self, hold: Hold, spikes: dict[int, int], value: int, start: int, stop: int | None, bits: int = 1, more: int = 2
    ) -> None:
        """Hold some bits an element, and more bytes of each while they are made."""
        elements = self.needs.elements(value)
        hold(-(-elements * bits // BITS), start, stop)
        spikes[start] = max(spikes.get(start, 0), elements * more)

    def _replay(self, plan: Plan, packs: Iterable[int], hold: Hold, spikes: dict[int, int]) -> float:
        """Return the seconds of what runs again for `packs`; `hold` what is there from one operator to another."""
        tape = self.needs.tape
        since, taken = dict[int, int](), set[int]()  # by value: when its memory was made again; whose was taken over
        handed = dict[int, int]()  # by value: until when autograd holds what it was given
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

        for segment in plan.segments(packs):
            p, value = tape.packs[segment.pack], self.needs.value(segment.pack)
            if p.unpacked is not None and at != p.unpacked:
                at, now, most = p.unpacked, 0, 0
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
                seconds += self.coin_seconds(coins[0]) if coins else cost.seconds + OVERHEAD
                most = max(most, now + (2 * self.needs.elements(coins[0]) if coins else cost.scratch))
                for v in rerun.drops:
                    drop(v, at)
            spikes[at] = max(spikes.get(at, 0), most)
            handed[value] = max(p.released or at, at)
            for v in segment.drops:
                drop(v, handed[value])
        return seconds

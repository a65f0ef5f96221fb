"""A plan: the kept values of a step, and the order in which the backward recomputes the others.

Operators of the forward lie in **blocks**. When the backward asks for a dropped value, operators run again, starting
at kept values. Results in the block that asks stay until it has read them. Of earlier blocks only the values stay that
later blocks read. So an operator runs again once, or twice if nothing is kept between two blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from revfx.fit.needs import Needs


@dataclass(frozen=True, slots=True)
class Rerun:
    """An operator that runs again; it may write over values that it reads last (`goes`), and leaves none of `drops`."""

    op: int
    goes: frozenset[int]
    drops: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """The operators that run before autograd gets the tensor of a pack, and the values that are freed then."""

    pack: int
    reruns: tuple[Rerun, ...]
    drops: tuple[int, ...]


@dataclass
class Plan:
    """Which values are kept whole, which packs as marks, which coins as bits; and the block of each operator."""

    needs: Needs
    kept: frozenset[int]
    marks: frozenset[int]
    coins: frozenset[int]
    block_of: Sequence[int]

    def __post_init__(self) -> None:
        self.coins -= self.kept  # whole values need no bits

    @cached_property
    def dropped(self) -> dict[int, int]:
        """Return the packs with recomputed values, each with the block that asks for it."""
        wanted = ((v, k) for v, packs in self.needs.wanted.items() if v not in self.kept for k in packs)
        last = len(self.block_of) - 1
        packs = self.needs.tape.packs
        return {k: self.block_of[min(packs[k].packed, last)] for _, k in wanted if k not in self.marks}

    @cached_property
    def again(self) -> frozenset[int]:
        """Return all operators that run again."""
        return frozenset(self.above(self.dropped))

    def is_base(self, value: int) -> bool:
        """Return whether the backward finds a value as it was."""
        return value in self.kept or self.needs.is_there(value)

    def op_of(self, value: int) -> int:
        """Return which operator makes a value that is not there again.

        Raises:
            LookupError: none does.
        """
        op = self.needs.tape.made_by[value]
        if op is None or (value not in self.coins and self.needs.replayed[op] is None):
            raise LookupError(f"nothing makes value {value} again")
        return op

    @cached_property
    def reads(self) -> Sequence[tuple[int, ...]]:
        """Return the values that each operator reads when it runs again; a coin is decoded."""
        if not self.coins:
            return self.needs.operands
        found = [*self.needs.operands]
        for coin in self.coins:
            made = self.needs.tape.made_by[coin]
            assert made is not None
            found[made] = ()
        return found

    def above(self, packs: Iterable[int], block: int | None = None) -> Iterator[int]:
        """Yield the operators that make `packs` again, last ones first: all, or those of a block alone."""
        return self.between(map(self.needs.value, packs), (), block)

    def between(self, values: Iterable[int], known: Collection[int], block: int | None = None) -> Iterator[int]:
        """Yield the operators that recompute values from `known` or kept ones."""
        todo, seen = [*values], set[int]()
        while todo:
            v = todo.pop()
            if v in known or self.is_base(v):
                continue
            op = self.op_of(v)
            if op not in seen and block in (None, self.block_of[op]):
                seen.add(op)
                todo += self.reads[op]
                yield op

    @cached_property
    def asked(self) -> dict[int, list[int]]:
        """Return the packs that each block asks for."""
        found: dict[int, list[int]] = {}
        for k, block in self.dropped.items():
            found.setdefault(block, []).append(k)
        return found

    @cached_property
    def uses(self) -> dict[tuple[int, int], int]:
        """Return how often each block reads each recomputed value: by packs, and by operators that run again."""
        found = Counter[tuple[int, int]]()
        for block, packs in self.asked.items():
            found.update((block, self.needs.value(k)) for k in packs)
            for op in self.above(packs, block):
                found.update((block, v) for v in self.reads[op] if not self.is_base(v))
        return found

    @cached_property
    def bases(self) -> dict[int, frozenset[int]]:
        """Return the values that each block runs again from: those that are kept, and coins."""
        found: dict[int, frozenset[int]] = {}
        for block, packs in self.asked.items():
            ops = [*self.above(packs)]
            read = {v for op in ops for v in self.reads[op] if v in self.kept}
            made = {v for op in ops for v in self.needs.tape.ops[op].makes}
            found[block] = frozenset(read | (made & self.coins))
        return found

    def segments(self, packs: Iterable[int]) -> Iterator[Segment]:
        """Yield the segments of some dropped packs, in the recorded order."""
        all_packs, replay = self.needs.tape.packs, Replay(self)
        for k in sorted((k for k in packs if all_packs[k].unpacked is not None), key=lambda k: all_packs[k].turn):
            yield replay.segment(k)


class Replay:
    """The recomputed values that are live in one backward: it decides which operators run next."""

    def __init__(self, plan: Plan, there: Iterable[int] = ()) -> None:
        self.plan, self.there, self.left = plan, set(there), dict(plan.uses)
        # by value: how many blocks that it was not made in will still read it
        self.outside = Counter(v for block, v in plan.uses if plan.block_of[plan.op_of(v)] != block)

    def segment(self, pack: int) -> Segment:
        """Return the segment for the next pack that autograd asks for."""
        plan, value, block = self.plan, self.plan.needs.value(pack), self.plan.dropped[pack]
        order, reruns = sorted(plan.between([value], self.there)), list[Rerun]()
        last = {v: op for op in order for v in plan.reads[op]}
        last[value] = len(plan.reads)
        for op in order:
            reads, makes = plan.reads[op], plan.needs.tape.ops[op].makes
            if plan.block_of[op] == block:
                for v in reads:
                    self._note(v, block)
            goes = frozenset([v for v in reads if v in self.there and last[v] == op and not self._stays(v, block)])
            unread = [v for v in makes if last.get(v, -1) <= op and not self._stays(v, block)]
            self.there.update(makes)
            self.there.difference_update(goes, unread)
            reruns.append(Rerun(op, goes, (*goes, *unread)))
        self._note(value, block)
        through = (value,) if value in self.there and not self._stays(value, block) else ()
        self.there.difference_update(through)
        return Segment(pack, tuple(reruns), through)

    def _stays(self, value: int, block: int) -> bool:
        """Return whether a value is needed later: by the block that asks, or by other blocks."""
        return self.outside[value] > 0 or self.left.get((block, value), 0) > 0

    def _note(self, value: int, block: int) -> None:
        """Note that a block has read a value."""
        n = self.left.get((block, value), 0)
        if n:
            self.left[block, value] = n - 1
            if n == 1 and self.plan.block_of[self.plan.op_of(value)] != block:
                self.outside[value] -= 1

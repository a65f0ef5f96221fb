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
    """An operator that runs again.

    It may write over `last_reads`, the values that nothing reads after it; the values of `drops` are freed after it.
    """

    op: int
    last_reads: frozenset[int]
    drops: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """The operators that run before autograd gets a saved tensor, and the values that are freed after it."""

    saved_index: int
    reruns: tuple[Rerun, ...]
    drops: tuple[int, ...]


@dataclass
class Plan:
    """A choice for each value of a step.

    Attributes:
        kept: values that are kept whole.
        compressed: saved tensors that are kept as bits.
        dropout_masks: drawn zeros and ones that are kept as bits.
        block_of: by operator of the forward, the block that recomputes it.
    """

    needs: Needs
    kept: frozenset[int]
    compressed: frozenset[int]
    dropout_masks: frozenset[int]
    block_of: Sequence[int]

    def __post_init__(self) -> None:
        self.dropout_masks -= self.kept  # whole values need no bits

    @cached_property
    def dropped(self) -> dict[int, int]:
        """Return the saved tensors with recomputed values, each with the block that asks for it."""
        pairs = ((v, k) for v, saved in self.needs.keepable.items() if v not in self.kept for k in saved)
        last = len(self.block_of) - 1
        saved = self.needs.tape.saved
        return {k: self.block_of[min(saved[k].saved_at, last)] for _, k in pairs if k not in self.compressed}

    @cached_property
    def recomputed(self) -> frozenset[int]:
        """Return all operators that run again."""
        return frozenset(self.above(self.dropped))

    @cached_property
    def available(self) -> frozenset[int]:
        """Return the values that the backward finds as they were."""
        return self.kept | self.needs.there

    def op_of(self, value: int) -> int:
        """Return the operator that recomputes a value.

        Raises:
            LookupError: none does.
        """
        op = self.needs.tape.made_by[value]
        if op is None or (self.needs.replayed[op] is None and value not in self.dropout_masks):
            raise LookupError(f"nothing makes value {value} again")
        return op

    @cached_property
    def reads(self) -> Sequence[tuple[int, ...]]:
        """Return the values that each operator reads when it runs again; a dropout mask is decoded."""
        if not self.dropout_masks:
            return self.needs.operands
        found = [*self.needs.operands]
        for dropout_mask in self.dropout_masks:
            made = self.needs.tape.made_by[dropout_mask]
            assert made is not None
            found[made] = ()
        return found

    def above(self, saved: Iterable[int], block: int | None = None) -> Iterator[int]:
        """Yield the operators that recompute saved tensors, last ones first: all of them, or those of one block."""
        return self.between(map(self.needs.value, saved), (), block)

    def between(self, values: Iterable[int], known: Collection[int], block: int | None = None) -> Iterator[int]:
        """Yield the operators that recompute values from `known` or kept ones."""
        todo, available, reads, block_of = [*values], self.available, self.reads, self.block_of
        made_by, seen = self.needs.tape.made_by, set[int | None]()
        while todo:
            v = todo.pop()
            if made_by[v] in seen or v in available or v in known:
                continue
            op = self.op_of(v)
            if block is None or block == block_of[op]:
                seen.add(op)
                todo += reads[op]
                yield op

    @cached_property
    def asked(self) -> dict[int, list[int]]:
        """Return the saved tensors that each block asks for."""
        found: dict[int, list[int]] = {}
        for k, block in self.dropped.items():
            found.setdefault(block, []).append(k)
        return found

    @cached_property
    def uses(self) -> dict[tuple[int, int], int]:
        """Return how often each block reads each recomputed value: by saved tensors and by recomputed operators."""
        found = Counter[tuple[int, int]]()
        for block, saved in self.asked.items():
            found.update((block, self.needs.value(k)) for k in saved)
            for op in self.above(saved, block):
                found.update((block, v) for v in self.reads[op] if v not in self.available)
        return found

    @cached_property
    def bases(self) -> dict[int, frozenset[int]]:
        """Return the kept values and dropout masks that each block is recomputed from."""
        found: dict[int, frozenset[int]] = {}
        for block, saved in self.asked.items():
            ops = [*self.above(saved)]
            read = {v for op in ops for v in self.reads[op] if v in self.kept}
            made = {v for op in ops for v in self.needs.tape.ops[op].makes}
            found[block] = frozenset(read | (made & self.dropout_masks))
        return found

    def segments(self, saved: Iterable[int]) -> Iterator[Segment]:
        """Yield the segments of some dropped saved tensors, in the order of the backward."""
        all_packs, replay = self.needs.tape.saved, Replay(self)
        for k in sorted((k for k in saved if all_packs[k].read_at is not None), key=lambda k: all_packs[k].read_order):
            yield replay.segment(k)


class Replay:
    """The recomputed values that are live in one backward: it decides which operators run next."""

    def __init__(self, plan: Plan, live: Iterable[int] = ()) -> None:
        self.plan: Plan = plan
        self.live: set[int] = set(live)
        self.left: dict[tuple[int, int], int] = dict(plan.uses)
        # by value: how many blocks that it was not made in will still read it
        self.outside: Counter[int] = Counter(v for block, v in plan.uses if plan.block_of[plan.op_of(v)] != block)

    def segment(self, saved_index: int) -> Segment:
        """Return the segment for the next saved tensor that autograd asks for."""
        plan, value, block = self.plan, self.plan.needs.value(saved_index), self.plan.dropped[saved_index]
        order, reruns = sorted(plan.between([value], self.live)), list[Rerun]()
        last = {v: op for op in order for v in plan.reads[op]}
        last[value] = len(plan.reads)
        for op in order:
            reads, makes = plan.reads[op], plan.needs.tape.ops[op].makes
            if plan.block_of[op] == block:
                for v in reads:
                    self._note(v, block)
            last_reads = frozenset([v for v in reads if v in self.live and last[v] == op and not self._stays(v, block)])
            unread = [v for v in makes if last.get(v, -1) <= op and not self._stays(v, block)]
            self.live.update(makes)
            self.live.difference_update(last_reads, unread)
            reruns.append(Rerun(op, last_reads, (*last_reads, *unread)))
        self._note(value, block)
        through = (value,) if value in self.live and not self._stays(value, block) else ()
        self.live.difference_update(through)
        return Segment(saved_index, tuple(reruns), through)

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

"""Block boundaries of a forward: places between operators at which few bytes are live."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from revfx.fit.compiled import Whole
from revfx.fit.needs import Needs


FREE = 0.01  # of the forward's time: values that follow faster from tensors from before the step are ignored
WORTH = 2  # a block saves at least so many times the bytes that it passes on


@dataclass(frozen=True)
class Blocks:
    """The first operators of the blocks and the end, and the values that are live at each of these boundaries."""

    borders: tuple[int, ...]
    over: tuple[frozenset[int], ...]

    def __len__(self) -> int:
        return len(self.borders) - 1

    def of_operators(self) -> list[int]:
        """Return the block of each operator."""
        return [b for b in range(len(self)) for _ in range(self.borders[b], self.borders[b + 1])]


def blocks_of(needs: Needs, seconds: Sequence[float]) -> Blocks:
    """Return the blocks of a forward.

    A border lies where a block hands on least, as far as its neighbours know, and autograd keeps more than that in it.
    The values that are live at a border must be kept if it is to be one; they can be.

    Args:
        needs: of the step.
        seconds: of each operator; estimates from sizes, so that blocks are the same in each run.
    """
    tape, backward_start = needs.tape, needs.tape.backward_start
    free = _free(needs, seconds)
    last, needed = dict[int, int](), {*needs.keepable}  # by the backward: a sum of losses is not
    for o in reversed(range(backward_start)):
        if not needed.isdisjoint(tape.ops[o].makes):
            for s in tape.ops[o].reads:
                needed.add(s.value)
                last.setdefault(s.value, o)
    over, sizes, live = [frozenset[int]()], [0], set[int]()
    for o in range(backward_start):  # `over[p]`: before operator p
        live.update(v for v in tape.ops[o].makes if v not in free)
        live = {v for v in live if last.get(v, -1) > o}
        over.append(frozenset(live))
        sizes.append(sum(tape.size(v) for v in live))
    kept = [0] * (backward_start + 1)
    for saved in filter(None, needs.keepable.values()):
        kept[min(tape.saved[saved[0]].saved_at, backward_start)] += tape.size(needs.value(saved[0]))
    borders, held = [0], 0
    for p in range(1, backward_start):
        held += kept[p - 1]
        before = inf if isinstance(tape.ops[p - 1].func, Whole) else sizes[p - 1]  # much is there within compiled parts
        after = inf if isinstance(tape.ops[p].func, Whole) else sizes[p + 1]
        passes = sizes[p] <= min(before, after) and over[p] <= needs.keepable.keys()
        new = sum(tape.size(v) for v in over[p] if (tape.made_by[v] or 0) >= borders[-1])
        if passes and over[p] and held >= max(1, WORTH * new):
            borders.append(p)
            held = 0
    borders.append(backward_start)
    return Blocks(tuple(borders), tuple([over[b] for b in borders]))


def _free(needs: Needs, seconds: Sequence[float]) -> set[int]:
    """Return values that follow at once from tensors from before the step."""
    tape, backward_start = needs.tape, needs.tape.backward_start
    limit = FREE * sum(seconds)
    cost: dict[int, float] = {}
    for o in range(backward_start):
        op = needs.replayed[o]
        if op is None:
            continue
        reads = {s.value for s in op.reads}
        if all(v in needs.there or v in cost for v in reads):
            all_seconds = seconds[o] + sum(cost.get(v, 0.0) for v in reads)
            if all_seconds <= limit:
                cost.update(dict.fromkeys(tape.ops[o].makes, all_seconds))
    return set(cost)

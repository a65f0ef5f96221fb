"""Ranges of blocks: their choices, with bytes and seconds. Equal ranges are computed once."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from operator import add

from revfx.fit.blocks import Blocks, blocks_of
from revfx.fit.costs import signature
from revfx.fit.min_cut import Choice, Menu
from revfx.fit.needs import Needs
from revfx.fit.plan import Plan
from revfx.fit.simulate import Model


MERGED = 6  # the most blocks that are merged into one
MAX_RANGES = 500  # different ones of merged blocks; a model with irregular layers gets shorter ranges


@dataclass(frozen=True)
class Entry:
    """A choice for a range, with values and saved tensors as positions in the lists of the range.

    `seconds`: the measured time beyond that of keeping everything. `estimate`: the same from sizes, each recomputed
    operator counted once. `held`: live bytes after the range. `parts`: live bytes in each slot of its own parts of the
    forward and the backward.

    `nested`: its blocks stay separate, with nothing kept in between. `is_untimed`: the choice does not depend on
    measured times.
    """

    choice: Choice
    nested: bool
    is_untimed: bool
    seconds: float
    estimate: float
    held: int
    parts: Sequence[Sequence[int]]


@dataclass
class BlockRange:
    """Blocks in a row: the operators from `start` to `stop`, the part of the backward that reads their saved
    tensors, their values, and the numbers of their saved tensors.
    """

    start: int
    stop: int
    back: tuple[int, int]
    values: list[int]
    saved: list[int]


class BlockRanges:
    """All ranges of blocks of a step."""

    def __init__(self, model: Model, entries: dict[Hashable, list[Entry]]) -> None:
        self.model: Model = model
        self.needs: Needs = model.needs
        self.blocks: Blocks = blocks_of(model.needs, model.estimates)
        self.entries = entries  # by the key of a run, for any caller
        self.least: dict[int, Choice] = {}  # by the first operator of a block
        self.found: dict[tuple[int, int, bool], tuple[BlockRange, list[tuple[Entry, int]]]] = {}

    @cached_property
    def merged(self) -> int:
        """Return how many blocks are treated as one at most."""
        keys, different = self._keys, set[Hashable]()
        for length in range(1, MERGED + 1):
            different |= {tuple(keys[i : i + length]) for i in range(len(keys) - length + 1)}
            if len(different) > MAX_RANGES:
                return max(1, length - 1)
        return MERGED

    def __getitem__(self, where: tuple[int, int, bool]) -> tuple[BlockRange, list[tuple[Entry, int]]]:
        """Return the range of blocks i to j, and each entry with its peak in the slots of the range.

        The bytes that earlier blocks hold do not count.
        """
        if where not in self.found:
            i, j, nested = where
            block_range = self._run(i, j)
            given = self.blocks.over[j].intersection(block_range.values)
            key = tuple(self._keys[i:j]), j < len(self.blocks), nested
            if key not in self.entries:
                self.entries[key] = [*self._entries(block_range, i, j, given, nested)]
            self.found[where] = block_range, [(e, self._peak(block_range, e)) for e in self.entries[key]]
        return self.found[where]

    def _run(self, i: int, j: int) -> BlockRange:
        tape, start, stop = self.needs.tape, self.blocks.borders[i], self.blocks.borders[j]
        values = [v for o in range(start, stop) for v in tape.ops[o].makes]
        saved = [k for v in values for k in self.needs.keepable.get(v, ())]
        times = [(p.read_at, (p.end or 0) // 2) for k in saved if (p := tape.saved[k]).read_at is not None]
        back = (
            (min(u for u, _ in times), max(r for _, r in times))
            if times
            else (tape.backward_start, tape.backward_start)
        )
        return BlockRange(start, stop, back, values, saved)

    @cached_property
    def _keys(self) -> list[Hashable]:
        """Return the keys of blocks, which alike ones share: operators, operands, and the ends of their saved tensors.

        Operands are named by the distance to their makers in operators, or by themselves if that is far.
        """
        tape, borders = self.needs.tape, self.blocks.borders
        starts = [self._run(b, b + 1).back[0] for b in range(len(self.blocks))]
        far = 2 * max(stop - start for start, stop in pairwise(borders))

        def name(o: int, v: int) -> Hashable:
            made = tape.made_by[v]
            if v in self.needs.there:
                return "there"
            return v if made is None or o - made > far else (o - made, tape.ops[made].makes.index(v))

        def death(o: int, v: int) -> int:  # in operators: the record of an end varies by a slot
            end = self.model.end(tape.allocation(v))
            return -1 if end is None else min(end // 2 - o, far)

        def times(o: int, k: int, start: int) -> Hashable:
            p = tape.saved[k]
            back = [None if t is None else t - 2 * start for t in (p.read_at and 2 * p.read_at, p.end)]
            return (p.saved_at - o, *back, k in self.needs.compressed)

        def block(b: int) -> Iterator[Hashable]:
            yield starts[b - 1] - starts[b] if b else 0
            for o in range(borders[b], borders[b + 1]):
                op = tape.ops[o]
                yield signature(tape, op), self.needs.replayed[o] is None, *[name(o, s.value) for s in op.reads]
                for v in op.makes:
                    numbers = self.needs.keepable.get(v)
                    yield death(o, v), numbers is None, *[times(o, k, starts[b]) for k in numbers or ()]

        numbers: dict[Hashable, int] = {}
        return [numbers.setdefault(tuple(block(b)), len(numbers)) for b in range(len(self.blocks))]

    def _entries(self, block_range: BlockRange, i: int, j: int, given: frozenset[int], nested: bool) -> Iterator[Entry]:
        own = self.blocks.of_operators()
        menu = Menu(self.model, range(block_range.start, block_range.stop), given)
        if not nested:
            block_of = [i if block_range.start <= o < block_range.stop else b for o, b in enumerate(own)]
            for choice, is_untimed in menu.choices().items():
                yield self._entry(block_range, given, choice, block_of, is_untimed=is_untimed)
            return
        try:
            yield self._entry(block_range, given, self._least_of_blocks(i, j), own, nested, is_untimed=True)
        except LookupError:  # a value that one block hands on to the next cannot be recomputed
            yield self._entry(block_range, given, menu.smallest, own, nested, is_untimed=True)

    def _least_of_blocks(self, i: int, j: int) -> Choice:
        """Return the smallest choice of some blocks, each for itself."""
        choices: list[Choice] = []
        for start, stop in pairwise(self.blocks.borders[i : j + 1]):
            if start not in self.least:
                self.least[start] = Menu(self.model, range(start, stop), frozenset()).smallest
            choices.append(self.least[start])
        found = choices[0]
        for c in choices[1:]:
            found = Choice(found.kept | c.kept, found.compressed | c.compressed, found.dropout_masks | c.dropout_masks)
        return found

    def _entry(
        self,
        block_range: BlockRange,
        given: frozenset[int],
        choice: Choice,
        block_of: Sequence[int],
        nested: bool = False,
        is_untimed: bool = False,
    ) -> Entry:
        mine = [v for v in block_range.values if v in self.needs.keepable]
        around = self.needs.keepable.keys() - set(mine)
        kept = choice.kept | given
        plan = Plan(self.needs, kept | around, choice.compressed, choice.dropout_masks, block_of)
        held, seconds = self.model.changes(plan, mine)
        parts = [held[2 * a : 2 * b + 2] for a, b in ((block_range.start, block_range.stop), block_range.back)]
        places = [{x: n for n, x in enumerate(named)} for named in (block_range.values, block_range.saved)]
        renamed = replace(choice, kept=kept).renamed(*places)
        estimate = sum(map(self.model.estimates.__getitem__, plan.recomputed))
        return Entry(
            renamed, nested, is_untimed, seconds, estimate, held[2 * self.needs.tape.backward_start + 1], parts
        )

    def _peak(self, block_range: BlockRange, entry: Entry) -> int:
        parts = zip((block_range.start, block_range.back[0]), entry.parts, strict=True)
        natural = self.model.natural
        return max(max(map(add, natural[2 * first : 2 * first + len(part)], part)) for first, part in parts)

"""From a plan for a budget to units: the dropped values of each block, with the operators that make them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from revfx.engine.operators import STATISTICS
from revfx.engine.tape import Tape
from revfx.fit.plan import Plan
from revfx.fit.simulate import join
from revfx.fit.tape import Tape as StepTape
from revfx.plan.memory import is_unfilled
from revfx.plan.staged import Dropped


@dataclass(frozen=True)
class RecordedStep:
    """A recorded step: the engine's tape of its forward beside that of the step.

    Attributes:
        step: the tape of the step.
        tape: the engine's.
        numbers: by operator of the step's forward, its number on the engine's tape.
        value_of: by value of the engine's tape, the value of the step.
        proven: values of the engine's tape that a replay gave bit for bit.
        block_of: by the path of a module, the block that it lies in; see `block_paths`.
    """

    step: StepTape
    tape: Tape
    numbers: Sequence[int]
    value_of: Mapping[int, int]
    proven: frozenset[int]
    block_of: Mapping[str, str]

    def unfilled(self) -> frozenset[int]:
        """Return the operators of the step that make memory which no operator fills: no replay has its content."""
        found: set[int] = set()
        for o, number in enumerate(self.numbers):
            if any(v is not None and is_unfilled(self.tape, v) for v in self.tape.ops[number].outs):
                found.add(o)
        return frozenset(found)


@dataclass
class _Cone:
    """The operators of one block that recompute values.

    Attributes:
        ops: them.
        dropout_masks: drawn zeros and ones that are kept as bits.
        borrowed: values that earlier blocks give.
        is_open: one of these is written over later, so that nobody gives it.
    """

    ops: set[int] = field(default_factory=set[int])
    dropout_masks: set[int] = field(default_factory=set[int])
    borrowed: set[int] = field(default_factory=set[int])
    is_open: bool = False


class Grouping:
    """Groups the dropped values of a plan into runs of operators."""

    def __init__(self, plan: Plan, recorded: RecordedStep) -> None:
        self.plan: Plan = plan
        self.tape: Tape = recorded.tape
        self.recorded: RecordedStep = recorded
        self.block_of: list[int] = self._blocks()
        self.after: dict[int, int] = {
            known.before: v for v, known in enumerate(self.tape.values) if known.before is not None
        }
        self.rewritten: dict[int, list[int]] = self._rewritten()

    def run(self) -> list[Dropped]:
        """Return the dropped values of each run, in the order of the operators."""
        plan, saved, records = self.plan, self.tape.saved, self.plan.needs.tape.saved
        asked: dict[int, list[int]] = {}  # by block, values in the order in which the backward asks
        compressed: dict[int, set[int]] = {}
        lent: dict[int, dict[int, None]] = {}
        for k in sorted(plan.dropped, key=lambda k: records[k].read_order):
            value, block = saved[k][1], plan.dropped[k]
            own = self._block(value)
            if own is None or self._is_there(value):
                continue
            if self.recorded.value_of.get(value) in plan.dropout_masks:
                compressed.setdefault(own, set()).add(value)
            elif own == block:
                asked.setdefault(block, []).append(value)
            else:
                lent.setdefault(own, {})[value] = None
        for k in plan.compressed:
            value = saved[k][1]
            own = self._block(value)
            if own is not None:
                compressed.setdefault(own, set()).add(value)
        found: list[Dropped] = []
        for block in sorted({*asked, *compressed, *lent, *self.block_of}, reverse=True):  # later ones borrow
            of_block = self._of_block(
                block, asked.get(block, []), compressed.get(block, set()), [*lent.get(block, ())], lent
            )
            found += of_block
        return sorted(found, key=lambda d: d.first)

    def _of_block(
        self,
        block: int,
        asked: Sequence[int],
        compressed: set[int],
        lent: Sequence[int],
        loans: dict[int, dict[int, None]],
    ) -> list[Dropped]:
        cones = {v: self._cone(v, block) for v in (*asked, *compressed, *lent)}
        for v in compressed.difference(asked, lent):  # nothing runs again for it
            cones[v] = _Cone({self.tape.values[v].op or 0})
        cones = {v: cone for v, cone in cones.items() if not cone.is_open}
        for cone in cones.values():
            for v in cone.borrowed:
                own = self._block(v)
                assert own is not None
                loans.setdefault(own, {})[v] = None
        found: list[Dropped] = []
        for first, last in join((min(c.ops), max(c.ops)) for c in cones.values() if c.ops):
            inside = {v for v, c in cones.items() if c.ops and first <= min(c.ops) <= last}
            borrowed, masks = set[int](), set[int]()
            for v in inside:
                borrowed |= cones[v].borrowed
                masks |= cones[v].dropout_masks
            stages = tuple((v,) for v in dict.fromkeys(asked) if v in inside)
            found.append(
                Dropped(
                    first, last, stages, frozenset(compressed & inside), self._kept(first, last),
                    {mask: self._last_write(mask) for mask in sorted(masks)}, tuple(sorted(borrowed)),
                    tuple(v for v in lent if v in inside),
                )
            )  # fmt: skip
        return found

    def _blocks(self) -> list[int]:
        """Return the block of each operator of the engine's tape."""
        found: list[int] = []
        block, borders = 0, iter(zip(self.recorded.numbers, self.plan.block_of, strict=True))
        following = next(borders, None)
        for number in range(len(self.tape.ops)):
            if following is not None and number == following[0]:
                block, following = following[1], next(borders, None)
            found.append(block)
        return found

    def _rewritten(self) -> dict[int, list[int]]:
        """Return the values that tensors have after writes to their memory by other views, by the writing operator."""
        found: dict[int, list[int]] = {}
        for v in self.after.values():
            op = self.tape.values[v].op
            if op is not None and v not in self.tape.ops[op].outs and not self.tape.is_outside(v):
                found.setdefault(op, []).append(v)
        return found

    def _block(self, value: int) -> int | None:
        """Return the block of the operator that makes a value; None if it is older than the step."""
        op = self.tape.values[value].op
        return None if op is None or self.tape.is_outside(value) else self.block_of[op]

    def _is_there(self, value: int) -> bool:
        """Return whether the backward finds a value."""
        if self.tape.is_outside(value) or self.tape.values[value].op is None:
            return True
        known = self.recorded.value_of.get(value)
        return known is None or known in self.plan.available

    def _cone(self, value: int, block: int) -> _Cone:
        """Return the operators of a block that recompute a value."""
        cone, todo, seen = _Cone(), [value], set[int]()
        while todo:
            v = todo.pop()
            if v in seen or self._is_there(v):
                continue
            seen.add(v)
            if self.recorded.value_of.get(v) in self.plan.dropout_masks:
                cone.dropout_masks.add(v)
                cone.ops.add(self.tape.values[self._last_write(v)].op or 0)
                continue
            op = self.tape.values[v].op
            assert op is not None
            if self.block_of[op] != block:
                cone.borrowed.add(v)
                cone.is_open |= v in self.after
            elif op not in cone.ops:
                cone.ops.add(op)
                todo += self._reads(op)
                before = self.tape.values[v].before
                todo += [] if before is None else [before]
        return cone

    def _last_write(self, value: int) -> int:
        """Return the same tensor after the last write to it."""
        while value in self.after:
            value = self.after[value]
        return value

    def _reads(self, number: int) -> list[int]:
        op = self.tape.ops[number]
        skipped = {int(op.args[i]) for i in STATISTICS.get(op.func, ()) if isinstance(op.args[i], int)}
        return [v for v in op.reads if v not in skipped]

    def _kept(self, first: int, last: int) -> frozenset[int]:
        """Return the values that operators first..last make and the backward finds."""
        found: set[int] = set()
        for number, op in enumerate(self.tape.ops[first : last + 1], first):
            made = [v for v in op.outs if v is not None] + [after for _, after in op.written]
            made += self.rewritten.get(number, ())
            found.update(v for v in made if self._is_there(v))
        return frozenset(found)


def whole_blocks(recorded: RecordedStep) -> list[Dropped]:
    """Return each kind of block once, with all that is saved in it dropped."""
    tape, block_of = recorded.tape, recorded.block_of
    found: list[Dropped] = []
    known: set[tuple[Any, ...]] = set()
    first, block = 0, ""
    for number in range(len(tape.ops) + 1):
        now = block_of.get(tape.ops[number].module, "") if number < len(tape.ops) else ""
        if now == block:
            continue
        kind = tuple(op.func for op in tape.ops[first:number])
        if block and kind not in known:
            known.add(kind)
            found.append(_whole_block(tape, first, number - 1))
        first, block = number, now
    return found


def _whole_block(tape: Tape, first: int, last: int) -> Dropped:
    values: dict[int, None] = {}
    for at, value in tape.saved:
        op = tape.values[value].op
        is_inside = first <= at <= last + 1 and op is not None and first <= op <= last
        if is_inside and not tape.is_outside(value):
            values[value] = None
    return Dropped(first, last, (tuple(values),), frozenset(), frozenset(), {})

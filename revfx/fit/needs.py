"""The saved tensors of a step, and the values that they can be recomputed from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from revfx.engine.operators import STATISTICS
from revfx.engine.whole import Whole
from revfx.fit.tape import Op, Spot, Tape
from revfx.layout import span


aten: Any = torch.ops.aten
LARGE = 2**24  # elements of a memory beyond which parts of it are taken for all
SCALED = {aten.div_.Scalar, aten.div_.Tensor, aten.mul_.Scalar, aten.mul_.Tensor}


@dataclass
class Needs:
    """A tape, seen from its backward.

    `wanted`: the values that can be kept, as they are in the backward, with the numbers of the packs; `marks`: packs
    of which a bit an element is enough; `coins`: zeros and ones that were drawn, and follow from a value that is kept.
    `stuck`: packs that stay as they are: their memory is written over, or the backward does not read them.
    """

    tape: Tape
    barred: frozenset[int] = frozenset()  # operators that don't run again
    wanted: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    marks: set[int] = field(default_factory=set[int])
    stuck: list[int] = field(default_factory=list[int])

    def __post_init__(self) -> None:
        for k, p in enumerate(self.tape.packs):
            if p.spot is None or self.is_outside(p.spot.value):
                continue
            last = self.tape.memory(p.spot.value).values[-1]
            if p.unpacked is None or not self._stays(p.spot):
                self.stuck.append(k)
                continue
            p.spot = replace(p.spot, value=last)
            self.wanted.setdefault(last, []).append(k)
            reads = self.tape.reads.get(k)
            if reads and is_dense(p.spot) and all(is_mark_enough(self.tape.ops[o], at) for o, at in reads):
                self.marks.add(k)
        for v in self.tape.offered:
            if not self.is_outside(v) and v == self.tape.memory(v).values[-1]:
                self.wanted.setdefault(v, [])

    def _stays(self, spot: Spot) -> bool:
        """Return whether later writes to the memory of a spot are elsewhere in it."""
        tape = self.tape
        written = [s for v in tape.after(spot.value) for s in tape.ops[tape.made_by[v] or 0].writes]
        return not any(tape.memory(s.value) is tape.memory(spot.value) and overlap(s, spot) for s in written)

    def spot(self, pack: int) -> Spot:
        """Return where a pack lies, of which a memory is known."""
        spot = self.tape.packs[pack].spot
        assert spot is not None
        return spot

    def value(self, pack: int) -> int:
        """Return the value of a pack."""
        return self.spot(pack).value

    def elements(self, value: int) -> int:
        """Return how many elements the memory of a value has, which autograd keeps, or which is a coin."""
        saved = self.coins.get(value, value)
        return self.tape.size(value) // self.spot(self.wanted[saved][0]).dtype.itemsize

    def is_outside(self, value: int) -> bool:
        """Return whether a value lies in memory from before the step."""
        return self.tape.memory(value).is_outside

    def is_there(self, value: int) -> bool:
        """Return whether the backward finds a value, unchanged, where it was before the step."""
        return value in self._there

    @cached_property
    def _there(self) -> set[int]:
        found: set[int] = set()
        for value, memory in enumerate(self.tape.memory_of):
            if self.is_outside(value) and memory not in self._written:
                found.add(value)
        return found

    @cached_property
    def _written(self) -> set[int]:
        """Return the memories that the step writes, and those of tensors in the same storage."""
        memories = self.tape.memories
        written = {n for n, m in enumerate(memories) if len(m.values) > 1}
        for op in self.tape.ops:
            if op.func in STATISTICS and op.args[5]:  # running statistics
                given = [op.args[i] for i in STATISTICS[op.func]]
                written |= {self.tape.memory_of[s.value] for s in given if isinstance(s, Spot)}
        storages = {memories[n].storage for n in written} - {None}
        return written | {n for n, m in enumerate(memories) if m.storage in storages}

    @cached_property
    def replayed(self) -> list[Op | None]:
        """Return, by operator of the forward, the operator that recomputes it; None if there is none."""
        found: list[Op | None] = []
        tape = self.tape

        def is_known(v: int) -> bool:
            by = tape.made_by[v]
            known = v in self.wanted or v in self.coins or self.is_there(v)
            return known or (by is not None and found[by] is not None)

        for o, op in enumerate(tape.ops[: tape.turn]):
            again = twin(op)
            can_run = o not in self.barred and _may_run_again(op) and bool(op.makes)
            if can_run and any(map(self.is_outside, op.makes)):
                can_run = False  # it writes to memory from before the step
            if can_run and all(is_known(s.value) for s in again.reads):
                found.append(again)
            else:
                found.append(None)
        return found

    @cached_property
    def operands(self) -> list[tuple[int, ...]]:
        """Return the values that each operator of the forward reads when it runs again."""
        again = self.replayed
        return [() if op is None else tuple(dict.fromkeys(s.value for s in op.reads)) for op in again]

    @cached_property
    def coins(self) -> Mapping[int, int]:
        """Return values of drawn zeros and ones, each with the wanted value of the same memory that tells them."""
        found: dict[int, int] = {}
        tape = self.tape
        for op in tape.ops[: tape.turn]:
            if op.func == aten.bernoulli_.float and len(op.makes) == 1:
                drawn, last, at = op.makes[0], tape.memory(op.makes[0]).values[-1], op.writes[0]
                rest = [tape.made_by[v] or 0 for v in tape.after(drawn)]
                whole = is_dense(at) and math.prod(at.shape) * at.dtype.itemsize == tape.size(drawn)
                if whole and all(o not in self.barred and _scales(tape.ops[o]) for o in rest) and self.wanted.get(last):
                    found[drawn] = last
        return found


def _may_run_again(op: Op) -> bool:
    """Return whether an operator computes the same in the backward, from the random state that it had."""
    return isinstance(op.func, Whole) or getattr(op.func, "namespace", "") in ("aten", "prims")


def overlap(a: Spot, b: Spot) -> bool:
    """Return whether two spots in one memory may have elements in common."""
    n = max(s.offset + span(s.shape, s.stride) for s in (a, b))
    if a.dtype != b.dtype or n > LARGE:
        return True
    marked = torch.zeros(n, dtype=torch.bool)
    marked.as_strided(a.shape, a.stride, a.offset).fill_(True)
    return bool(marked.as_strided(b.shape, b.stride, b.offset).any())


def is_dense(spot: Spot) -> bool:
    """Return whether the elements of a spot lie beside each other, each once."""
    return math.prod(spot.shape) == span(spot.shape, spot.stride)


def _scales(op: Op) -> bool:
    return op.func in SCALED and isinstance(op.args[1], (int, float)) and 0 < abs(op.args[1]) < float("inf")


def twin(op: Op) -> Op:
    """Return an operator with the results of `op` and no side effects: normalisations without running statistics."""
    at = STATISTICS.get(op.func, ())
    if not at or not op.args[5]:
        return op
    args = tuple(None if i in at else a for i, a in enumerate(op.args))
    gone = [op.args[i] for i in at]
    return replace(op, args=args, reads=tuple(s for s in op.reads if s not in gone))


def is_mark_enough(op: Op, argument: int) -> bool:
    """Return whether an operator of the backward reads no more of an argument than which elements are positive."""
    if op.func == aten.threshold_backward.default:
        return argument == 1 and op.args[2] == 0
    return op.func == aten.max_pool2d_with_indices_backward.default and argument == 1  # no more than its shape

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
from revfx.fit.tape import StepOp, Tape, ValueView
from revfx.layout import span


aten: Any = torch.ops.aten
MAX_COMPARED_ELEMENTS = 2**24  # of an allocation; views of larger ones are taken to overlap
SCALED = {aten.div_.Scalar, aten.div_.Tensor, aten.mul_.Scalar, aten.mul_.Tensor}


@dataclass
class Needs:
    """The saved tensors of a step, by the way in which they can be kept.

    Attributes:
        barred: operators that must not run again.
        keepable: values that can be kept, as the backward finds them, with the numbers of their saved tensors.
        compressed: saved tensors of which the backward reads one bit per element.
        pinned: saved tensors that stay, as their allocation is written over or the backward does not read them.
    """

    tape: Tape
    barred: frozenset[int] = frozenset()
    keepable: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    compressed: set[int] = field(default_factory=set[int])
    pinned: list[int] = field(default_factory=list[int])

    def __post_init__(self) -> None:
        for k, p in enumerate(self.tape.saved):
            if p.view is None or self.is_outside(p.view.value):
                continue
            last = self.tape.allocation(p.view.value).values[-1]
            if p.read_at is None or not self._stays(p.view):
                self.pinned.append(k)
                continue
            p.view = replace(p.view, value=last)
            self.keepable.setdefault(last, []).append(k)
            reads = self.tape.reads.get(k)
            if reads and is_dense(p.view) and all(is_sign_enough(self.tape.ops[o], at) for o, at in reads):
                self.compressed.add(k)
        for v in self.tape.offered:
            if not self.is_outside(v) and v == self.tape.allocation(v).values[-1]:
                self.keepable.setdefault(v, [])

    def _stays(self, view: ValueView) -> bool:
        """Return whether all later writes to the allocation of a view miss the view."""
        tape = self.tape
        written = [s for v in tape.after(view.value) for s in tape.ops[tape.made_by[v] or 0].writes]
        return not any(tape.allocation(s.value) is tape.allocation(view.value) and overlap(s, view) for s in written)

    def view(self, saved_index: int) -> ValueView:
        """Return the view of a saved tensor whose allocation is known."""
        view = self.tape.saved[saved_index].view
        assert view is not None
        return view

    def value(self, saved_index: int) -> int:
        """Return the value of a saved tensor."""
        return self.view(saved_index).value

    def elements(self, value: int) -> int:
        """Return the number of elements in the allocation of a saved value or a dropout mask."""
        saved = self.dropout_masks.get(value, value)
        return self.tape.size(value) // self.view(self.keepable[saved][0]).dtype.itemsize

    def is_outside(self, value: int) -> bool:
        """Return whether a value's allocation is older than the step."""
        return self.tape.allocation(value).is_outside

    @cached_property
    def there(self) -> frozenset[int]:
        """Return the values that the backward finds, unchanged, where they were before the step."""
        found = set[int]()
        for value, allocation in enumerate(self.tape.allocation_of):
            if self.is_outside(value) and allocation not in self._written:
                found.add(value)
        return frozenset(found)

    @cached_property
    def _written(self) -> set[int]:
        """Return the allocations that the step writes, and all others in the same storages."""
        allocations = self.tape.allocations
        written = {n for n, m in enumerate(allocations) if len(m.values) > 1}
        for op in self.tape.ops:
            if op.func in STATISTICS and op.args[5]:  # running statistics
                given = [op.args[i] for i in STATISTICS[op.func]]
                written |= {self.tape.allocation_of[s.value] for s in given if isinstance(s, ValueView)}
        storages = {allocations[n].storage for n in written} - {None}
        return written | {n for n, m in enumerate(allocations) if m.storage in storages}

    @cached_property
    def replayed(self) -> list[StepOp | None]:
        """Return, by operator of the forward, the operator that recomputes it; None if there is none."""
        found: list[StepOp | None] = []
        tape = self.tape

        def is_known(v: int) -> bool:
            by = tape.made_by[v]
            known = v in self.keepable or v in self.dropout_masks or v in self.there
            return known or (by is not None and found[by] is not None)

        for o, op in enumerate(tape.ops[: tape.backward_start]):
            again = pure_variant(op)
            can_run = o not in self.barred and _may_run_again(op) and bool(op.makes)
            if can_run and any(map(self.is_outside, op.makes)):
                can_run = False  # it writes to an allocation from before the step
            if can_run and all(is_known(s.value) for s in again.reads):
                found.append(again)
            else:
                found.append(None)
        return found

    @cached_property
    def operands(self) -> list[tuple[int, ...]]:
        """Return, by operator of the forward, the values that it reads when it runs again."""
        again = self.replayed
        return [() if op is None else tuple(dict.fromkeys(s.value for s in op.reads)) for op in again]

    @cached_property
    def dropout_masks(self) -> Mapping[int, int]:
        """Return drawn zeros and ones, each with a later value of the same allocation that has the same zeros."""
        found: dict[int, int] = {}
        tape = self.tape
        for op in tape.ops[: tape.backward_start]:
            if op.func == aten.bernoulli_.float and len(op.makes) == 1:
                drawn, last, at = op.makes[0], tape.allocation(op.makes[0]).values[-1], op.writes[0]
                rest = [tape.made_by[v] or 0 for v in tape.after(drawn)]
                whole = is_dense(at) and math.prod(at.shape) * at.dtype.itemsize == tape.size(drawn)
                if (
                    whole
                    and all(o not in self.barred and _scales(tape.ops[o]) for o in rest)
                    and self.keepable.get(last)
                ):
                    found[drawn] = last
        return found


def _may_run_again(op: StepOp) -> bool:
    """Return whether an operator computes the same in the backward, from the random state that it had."""
    return isinstance(op.func, Whole) or getattr(op.func, "namespace", "") in ("aten", "prims")


def overlap(a: ValueView, b: ValueView) -> bool:
    """Return whether two views of one allocation may have elements in common."""
    n = max(s.offset + span(s.shape, s.stride) for s in (a, b))
    if a.dtype != b.dtype or n > MAX_COMPARED_ELEMENTS:
        return True
    marked = torch.zeros(n, dtype=torch.bool)
    marked.as_strided(a.shape, a.stride, a.offset).fill_(True)
    return bool(marked.as_strided(b.shape, b.stride, b.offset).any())


def is_dense(view: ValueView) -> bool:
    """Return whether the elements of a view lie beside each other, each once."""
    return math.prod(view.shape) == span(view.shape, view.stride)


def _scales(op: StepOp) -> bool:
    return op.func in SCALED and isinstance(op.args[1], (int, float)) and 0 < abs(op.args[1]) < float("inf")


def pure_variant(op: StepOp) -> StepOp:
    """Return an operator with the results of `op` and no side effects: normalisations without running statistics."""
    at = STATISTICS.get(op.func, ())
    if not at or not op.args[5]:
        return op
    args = tuple(None if i in at else a for i, a in enumerate(op.args))
    gone = [op.args[i] for i in at]
    return replace(op, args=args, reads=tuple(s for s in op.reads if s not in gone))


def is_sign_enough(op: StepOp, argument: int) -> bool:
    """Return whether an operator of the backward reads no more of an argument than which elements are positive."""
    if op.func == aten.threshold_backward.default:
        return argument == 1 and op.args[2] == 0
    return op.func == aten.max_pool2d_with_indices_backward.default and argument == 1  # no more than its shape

"""The tape of a training step: the operators below autograd, their allocations, and the saved tensors.

A **value** is the content of an allocation between two writes; a **view** is the place of a tensor in a value, so an
operator that returns a view makes no value.
Times are counted in operators, or finer in **slots**. Operator o runs in slot 2*o + 1. In slot 2*o, before it, autograd
saves and reads tensors; an allocation that is freed then ends at 2*o + 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, slots=True)  # not a NamedTuple: `pytree` would flatten it
class ValueView:
    """A tensor as a view of a value: its dtype, shape, strides and offset in the allocation.

    The `offset` counts elements from the beginning of the allocation; of a parameter, buffer or argument from its own
    first element, as it may lie elsewhere in the next call.
    """

    value: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def place(self) -> tuple[Any, ...]:
        """Return its dtype, shape, strides and offset."""
        return self.dtype, self.shape, self.stride, self.offset


@dataclass(slots=True)
class StepAllocation:
    """An allocation.

    Attributes:
        size: bytes.
        born: the operator that made it.
        end: the slot from which on nobody but autograd holds it; None: it lives beyond the step.
        is_outside: it is older than the step, as a parameter is.
        values: its contents, one after another; the backward finds the last one.
        storage: the key of its storage, if it is outside.
        returned: the forward returns it, so the caller may hold it until the backward ends.
    """

    size: int
    device: torch.device
    born: int
    end: int | None = None
    is_outside: bool = False
    values: list[int] = field(default_factory=list[int])
    storage: int | None = None
    returned: bool = False


@dataclass(slots=True)
class StepOp:
    """A call of an operator, with views in the place of tensors.

    Attributes:
        writes: views that it writes to, as views of the values before the write.
        makes: values that it makes, as results or by writes.
        module: the innermost one that runs.
        where: the user's line in its forward; in the backward the name of autograd's node.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: tuple[ValueView, ...]
    outs: tuple[ValueView | None, ...]
    writes: tuple[ValueView, ...]
    makes: tuple[int, ...]
    module: str = ""
    where: str = ""

    def __str__(self) -> str:
        place = ", ".join(filter(None, (self.module, self.where)))
        return f"`{self.func}`" + f" ({place})" * bool(place)


@dataclass(slots=True)
class SavedRecord:
    """A saved tensor.

    Attributes:
        view: None if its allocation is not known, or if a unit of couplings gives it.
        saved_at: the operator before which autograd saved it.
        made: the number of operators that had run when the tensor, possibly a view, was made.
        read_at: the operator before which the backward first reads it; None: never.
        end: the slot from which on autograd does not hold it.
        read_order: its number in the order in which the backward reads saved tensors.
    """

    view: ValueView | None
    saved_at: int
    made: int = 0
    read_at: int | None = None
    end: int | None = None
    read_order: int = 0


@dataclass
class Tape:
    """A step: the operators of the forward, and from `backward_start` on those of the backward.

    Attributes:
        allocation_of, made_by: by value, its allocation, and the operator that makes it (None if older than the step).
        reads: by saved tensor, the operators of the backward that read it, each with the position of the argument.
        output_bytes: bytes of the returned tensors that require a gradient; 0 if a scalar (a loss) is among them.
        offered: values that may be kept although no saved tensor needs them: compiled parts run again from them.
        held: bytes outside of the recorded allocations, as (size, first slot, slot after the last).
        seconds: the time of the step outside of its operators.
    """

    allocations: list[StepAllocation] = field(default_factory=list[StepAllocation])
    allocation_of: list[int] = field(default_factory=list[int])
    made_by: list[int | None] = field(default_factory=list[int | None])
    ops: list[StepOp] = field(default_factory=list[StepOp])
    saved: list[SavedRecord] = field(default_factory=list[SavedRecord])
    backward_start: int = 0
    reads: dict[int, set[tuple[int, int]]] = field(default_factory=dict[int, set[tuple[int, int]]])
    output_bytes: int = 0
    offered: list[int] = field(default_factory=list[int])
    held: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])
    seconds: float = 0.0

    def allocation(self, value: int) -> StepAllocation:
        """Return the allocation that a value lies in."""
        return self.allocations[self.allocation_of[value]]

    def size(self, value: int) -> int:
        """Return the bytes of the allocation that a value lies in."""
        return self.allocation(value).size

    def before(self, value: int) -> int | None:
        """Return the value that `value` was written over."""
        values = self.allocation(value).values
        return values[values.index(value) - 1] if value != values[0] else None

    def after(self, value: int) -> list[int]:
        """Return the values that were written over `value`, one after another."""
        values = self.allocation(value).values
        return values[values.index(value) + 1 :]


def is_same_but_for_sizes(a: Tape, b: Tape) -> bool:
    """Return whether two steps ran the same operators on the same values, which the backward read alike."""
    if (a.backward_start, a.made_by, a.allocation_of) != (b.backward_start, b.made_by, b.allocation_of):
        return False
    if len(a.ops) != len(b.ops) or len(a.saved) != len(b.saved):
        return False
    for one, other in zip(a.ops, b.ops, strict=True):
        if (one.func, one.module, one.makes) != (other.func, other.module, other.makes):
            return False
        if [s.value for s in one.reads] != [s.value for s in other.reads]:
            return False
    for one, other in zip(a.saved, b.saved, strict=True):
        values = [None if p.view is None else p.view.value for p in (one, other)]
        if values[0] != values[1] or (one.saved_at, one.read_at) != (other.saved_at, other.read_at):
            return False
    return True

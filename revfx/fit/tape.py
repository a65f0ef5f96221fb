"""The tape of a training step: the operators below autograd, their allocations, and the saved tensors.

A **memory** is an allocation; a **value** is its content between two writes; a **spot** is a tensor's place in a value,
so a view is another spot, and no operation. A **pack** is a saved tensor.
Times are counted in operators, or finer in **slots**: 2*o + 1 is while operator o runs, 2*o before that, when autograd
saves and reads tensors: an allocation that is freed then, before o runs, ends at 2*o + 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, slots=True)  # no tuple, as `pytree` would look into it
class Spot:
    """A tensor's place: a value, and which elements of its memory, in which order.

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
        """Return where in its value it lies."""
        return self.dtype, self.shape, self.stride, self.offset


@dataclass(slots=True)
class Memory:
    """An allocation.

    Attributes:
        size: bytes.
        born: the operator that made it.
        end: the slot from which on nobody but autograd holds it; None: it lives beyond the step.
        is_outside: it was there before the step, such as a parameter.
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
class Op:
    """A call of an operator, with spots in the place of tensors.

    Attributes:
        writes: spots that it writes to, in the values before.
        makes: values, by a result or by a write.
        module: the innermost one that runs.
        where: the user's line in its forward; in the backward the name of autograd's node.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: tuple[Spot, ...]
    outs: tuple[Spot | None, ...]
    writes: tuple[Spot, ...]
    makes: tuple[int, ...]
    module: str = ""
    where: str = ""

    def __str__(self) -> str:
        place = ", ".join(filter(None, (self.module, self.where)))
        return f"`{self.func}`" + f" ({place})" * bool(place)


@dataclass(slots=True)
class Pack:
    """A saved tensor.

    Attributes:
        spot: None if its memory is not known, or if a unit of couplings gives it.
        packed: before this operator autograd saved it.
        made: so many operators ran before the tensor was made, as a view maybe.
        unpacked: before this operator the backward reads it first; None: never.
        end: the slot from which on autograd does not hold it.
        turn: its number in the order in which the backward reads saved tensors.
    """

    spot: Spot | None
    packed: int
    made: int = 0
    unpacked: int | None = None
    end: int | None = None
    turn: int = 0


@dataclass
class Tape:
    """A step: the operators of the forward, and from `turn` on of the backward.

    Attributes:
        memory_of, made_by: by value, its memory, and the operator that makes it (None if it was there).
        reads: by pack, the operators of the backward that read it, each with the position of the argument.
        loss: bytes of the returned tensors that have a gradient, without single numbers; the caller frees them at once.
        offered: values that are no saved tensors, and may be kept all the same: compiled parts run again from them.
        held: other bytes, from one slot up to another.
        seconds: of the step besides its operators.
    """

    memories: list[Memory] = field(default_factory=list[Memory])
    memory_of: list[int] = field(default_factory=list[int])
    made_by: list[int | None] = field(default_factory=list[int | None])
    ops: list[Op] = field(default_factory=list[Op])
    packs: list[Pack] = field(default_factory=list[Pack])
    turn: int = 0
    reads: dict[int, set[tuple[int, int]]] = field(default_factory=dict[int, set[tuple[int, int]]])
    loss: int = 0
    offered: list[int] = field(default_factory=list[int])
    held: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])
    seconds: float = 0.0

    def memory(self, value: int) -> Memory:
        """Return the memory that a value lies in."""
        return self.memories[self.memory_of[value]]

    def size(self, value: int) -> int:
        """Return the bytes of that memory."""
        return self.memory(value).size

    def before(self, value: int) -> int | None:
        """Return the value that `value` was written over."""
        values = self.memory(value).values
        return values[values.index(value) - 1] if value != values[0] else None

    def after(self, value: int) -> list[int]:
        """Return the values that were written over `value`, one after another."""
        values = self.memory(value).values
        return values[values.index(value) + 1 :]


def is_same_but_for_sizes(a: Tape, b: Tape) -> bool:
    """Return whether two steps ran the same operators on the same values, which the backward read alike."""
    if (a.turn, a.made_by, a.memory_of) != (b.turn, b.made_by, b.memory_of):
        return False
    if len(a.ops) != len(b.ops) or len(a.packs) != len(b.packs):
        return False
    for one, other in zip(a.ops, b.ops, strict=True):
        if (one.func, one.module, one.makes) != (other.func, other.module, other.makes):
            return False
        if [s.value for s in one.reads] != [s.value for s in other.reads]:
            return False
    for one, other in zip(a.packs, b.packs, strict=True):
        values = [None if p.spot is None else p.spot.value for p in (one, other)]
        if values[0] != values[1] or (one.packed, one.unpacked) != (other.packed, other.unpacked):
            return False
    return True

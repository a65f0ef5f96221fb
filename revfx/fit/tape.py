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
    """An allocation of `size` bytes, there from operator `born` up to the slot `end` (None: beyond the step), as long
    as nothing but autograd holds it.

    What was there before the step has a `source`: where to find it, of parameters, buffers and arguments, or ""; its
    `storage` is that of the original, which others may share.
    `returned`: the forward returns it, so that the caller may hold it until the backward ends.
    """

    size: int
    device: torch.device
    born: int
    end: int | None = None
    source: tuple[str, Any] | None = None
    values: list[int] = field(default_factory=list[int])  # the last one is there in the backward
    storage: int | None = None
    returned: bool = False


@dataclass(slots=True)
class Op:
    """A call of an operator, with spots in the place of tensors."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: tuple[Spot, ...]
    outs: tuple[Spot | None, ...]
    writes: tuple[Spot, ...]  # of the values before
    makes: tuple[int, ...]  # values, by a result or by a write
    draws: bool
    module: str = ""  # the innermost one that runs
    where: str = ""  # the line in its forward; in the backward the name of autograd's node

    def __str__(self) -> str:
        place = ", ".join(filter(None, (self.module, self.where)))
        return f"`{self.func}`" + f" ({place})" * bool(place)


@dataclass(slots=True)
class Pack:
    """What autograd keeps from before operator `packed` up to the slot `end`; it reads it first by `unpacked`, as the
    tensor of this `turn`. `made` operators ran before the tensor was made, as a view maybe. `spot` is None of what no
    memory is known of.
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

    `memory_of`, `made_by`: by value, its memory, and the operator that makes it (None if it was there);
    `reads`: by pack, the operators of the backward that read it, each with which argument it is;
    `loss`: the bytes of the returned tensors that have a gradient, but for single numbers; the caller lets go of what
    is returned at once. `offered`: values that are no saved tensors and may be kept all the same, as compiled parts run
    again from them; `held`: bytes that are there besides, from one slot up to another; `seconds`: that the step takes
    beside its operators.
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

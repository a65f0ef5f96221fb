"""The tape of a training step: the operators that run below autograd, the memory that they use, what autograd keeps.

A **memory** is an allocation; a **value** is what it holds between two writes to it; a **spot** is a tensor's place in
a value, so that views are spots of what they view, and no operations. A **pack** is a tensor that autograd keeps.
Times are counted in operators, or finer in **slots**: 2*o + 1 is while operator o runs, 2*o before that, when autograd
keeps and reads tensors: what was there when it began to, but not any more when o runs, ends at 2*o + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from revfx import _torch


Extent = tuple[int, int, int]  # a storage, and in it the first byte and the end of the last one


def extent_of(t: Tensor) -> Extent | None:
    """Return where the elements of a tensor lie; None if that is unknown."""
    if not _torch.is_plain(t) or _torch.is_fake(t) or t.layout != torch.strided or t.is_nested:
        return None
    elements = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    start = int(t.storage_offset()) * t.dtype.itemsize
    return _torch.storage_key(t), start, start + elements * t.dtype.itemsize * (t.numel() > 0)


def share_bytes(a: Extent, b: Extent) -> bool:
    """Return whether two extents may have bytes in common."""
    return a[0] == b[0] and a[1] < b[2] and b[1] < a[2]


def find_aliases(leaves: Sequence[Any]) -> tuple[tuple[int, int], ...]:
    """Return the pairs of tensors among some leaves that may have bytes in common, by their places."""
    extents = [(i, e) for i, t in enumerate(leaves) if isinstance(t, Tensor) and (e := extent_of(t)) is not None]
    if len({e[0] for _, e in extents}) == len(extents):
        return ()
    return tuple([(i, j) for (i, a), (j, b) in combinations(extents, 2) if share_bytes(a, b)])


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

    What was there before the step has a `source`: where to find it, of parameters, buffers and arguments, or "". It
    begins at the byte `start` of its storage; its `extent` is the storage, first byte and end byte of the original.
    `returned`: the forward returns it, so that the caller may hold it until the backward ends.
    """

    size: int
    device: torch.device
    born: int
    end: int | None = None
    source: tuple[str, Any] | None = None
    values: list[int] = field(default_factory=list[int])  # the last one is there in the backward
    start: int = 0
    extent: Extent | None = None
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
    where: str = ""  # the line in its forward; in the backward what autograd calls the step

    def __str__(self) -> str:
        place = ", ".join(filter(None, (self.module, self.where)))
        return f"`{self.func}`" + f" ({place})" * bool(place)


@dataclass(slots=True)
class Pack:
    """What autograd keeps from before operator `packed` up to the slot `end`; it reads it first by `unpacked`, as the
    tensor of this `turn`. `spot` is None of what no memory is known of. Arguments of compiled parts are `offered`:
    seen, and not kept.
    """

    spot: Spot | None
    packed: int
    unpacked: int | None = None
    end: int | None = None
    turn: int = 0
    module: str = ""  # the innermost one that runs
    offered: bool = False


@dataclass
class Tape:
    """A step: the operators of the forward, and from `turn` on of the backward.

    `memory_of`, `made_by`: by value, its memory, and the operator that makes it (None of what was there);
    `reads`: by pack, the operators of the backward that read it, each with which argument it is;
    `loss`: the bytes of the returned tensors that have a gradient, but for single numbers; the caller lets go of what
    is returned at once. `varies`: the operators that are given numbers which the forward asked for;
    `sharded`: the sub-modules whose parameters FSDP2 gathers for them alone, innermost first.
    """

    memories: list[Memory] = field(default_factory=list[Memory])
    memory_of: list[int] = field(default_factory=list[int])
    made_by: list[int | None] = field(default_factory=list[int | None])
    ops: list[Op] = field(default_factory=list[Op])
    packs: list[Pack] = field(default_factory=list[Pack])
    turn: int = 0
    reads: dict[int, set[tuple[int, int]]] = field(default_factory=dict[int, set[tuple[int, int]]])
    loss: int = 0
    varies: frozenset[int] = frozenset()
    sharded: tuple[str, ...] = ()

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

"""The tape of one forward: its operators below autograd, the tensors that they make, and the saved tensors.

A **value** is a tensor between two writes to its memory: an allocation, how often that was written, and a view of it.
Values are numbered in the order of their appearance, and so are operators and allocations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from revfx.engine.randomness import RandomState


class Ref(int):
    """The number of a value, in the place of a tensor among the arguments of an operator."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)  # no tuple, as pytree would look into it
class View:
    """The place of a tensor in its allocation, and its bits; the offset counts elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    is_conj: bool = False
    is_neg: bool = False

    def overlaps(self, other: View) -> bool:
        """Return whether two views of one allocation may share elements: parts that were sliced from it do not."""
        if self.dtype != other.dtype or sorted(self.stride) != sorted(other.stride):
            return True
        ours, theirs = self._ranges(), other._ranges()
        if ours is None or theirs is None:
            return True
        return all(a[0] < b[1] and b[0] < a[1] for a, b in zip(ours, theirs, strict=True))

    def _ranges(self) -> list[tuple[int, int]] | None:
        """Return where the view begins and ends in each dimension of memory, that of the largest stride first.

        None if a dimension reaches into the next one, as with windows.
        """
        found: list[tuple[int, int]] = []
        rest, outer = self.offset, 0
        for stride, size in sorted(zip(self.stride, self.shape, strict=True), reverse=True):
            first, rest = divmod(rest, stride) if stride else (0, rest)
            if outer and (first + size) * stride > outer:
                return None
            found.append((first, first + size))
            outer = stride
        if outer and all(stride % outer == 0 for stride in self.stride):
            found.append((rest, rest + 1))
        return found


@dataclass(slots=True)
class Allocation:
    """Memory of `nbytes` bytes.

    Attributes:
        is_outside: it was there before the forward, or something that the tape can't see made it.
        is_strided: it is a storage that tensors may be views of.
        role: of memory from outside: "parameter", "buffer", "input", "attribute" of another tensor with a gradient that
            was there before the forward, or "".
        writes: how often operators wrote to it so far.
        written: the views that these writes went to, with their numbers from 1.
        last_write: the last operator that did.
    """

    nbytes: int
    is_outside: bool
    is_strided: bool
    role: str = ""
    writes: int = 0
    written: list[tuple[int, View]] = field(default_factory=list[tuple[int, View]])
    last_write: int | None = None


@dataclass(slots=True)
class Value:
    """A value: an allocation after so many writes, seen through a view.

    Attributes:
        op: the operator that made it, by a result or by a write; None if nothing on the tape did.
        before: the value of the same tensor before its memory was written to.
    """

    allocation: int
    writes: int
    view: View
    device: torch.device
    op: int | None = None
    before: int | None = None


@dataclass(slots=True)
class Op:
    """A call of an operator, with references in the place of tensors.

    Attributes:
        outs: the values of the results, in order, flat; None of results that are no tensors.
        is_single: it returns one tensor and no sequence.
        written: pairs of a value that it wrote to and the value afterwards.
        state: the random state before it; None if it draws nothing.
        module: the path of the innermost module.
        where: the user's file and line.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: tuple[int | None, ...] = ()
    is_single: bool = True
    written: tuple[tuple[int, int], ...] = ()
    state: RandomState | None = None
    module: str = ""
    where: str = ""

    @property
    def reads(self) -> list[int]:
        """The values among the arguments, in order, with repetitions."""
        found: list[int] = []
        _collect((self.args, tuple(self.kwargs.values())), found)
        return found

    def __str__(self) -> str:
        place = ", ".join(filter(None, (self.module, self.where)))
        return f"`{self.func}`" + f" ({place})" * bool(place)


@dataclass(frozen=True, slots=True)
class Declared:
    """A declared inverse: `head = by(result, *given)`, with the numbers of values."""

    head: int
    result: int
    given: tuple[int, ...]
    by: Callable[..., Any]
    name: str


@dataclass
class Tape:
    """A forward.

    Attributes:
        saved: the saved tensors: before which operator, and which value.
        returned: the values that the forward returned.
        changes_settings: kernels are set otherwise, such as TF32, in the midst of the forward.
        declared: inverses that a library or the user declared.
        constants: by value, tensors that are neither made in the forward nor given to it, such as buffers, and small
            ones that were written to and follow from these alone.
        fixed: the values of small tensors that follow from constants alone.
    """

    ops: list[Op] = field(default_factory=list[Op])
    values: list[Value] = field(default_factory=list[Value])
    allocations: list[Allocation] = field(default_factory=list[Allocation])
    saved: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    returned: list[int] = field(default_factory=list[int])
    changes_settings: bool = False
    declared: list[Declared] = field(default_factory=list[Declared])
    constants: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    fixed: set[int] = field(default_factory=set[int])

    def forget_tensors(self) -> None:
        """Let the tensors of this very forward go, once it is planned."""
        self.constants.clear()
        for op in self.ops:
            op.state = None

    def is_outside(self, value: int) -> bool:
        """Return whether a value lies in memory that no operator of the tape made."""
        return self.allocations[self.values[value].allocation].is_outside

    def nbytes(self, value: int) -> int:
        """Return the bytes of the allocation of a value."""
        return self.allocations[self.values[value].allocation].nbytes


def _collect(tree: Any, found: list[int]) -> None:
    for x in tree:
        if type(x) is Ref:
            found.append(int(x))
        elif isinstance(x, (list, tuple)):
            _collect(x, found)

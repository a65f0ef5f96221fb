"""Matches: the tensors and numbers of a forward while its operators are compared with those of a unit."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from revfx import _torch
from revfx.engine import dispatch
from revfx.engine.call import memory_of
from revfx.engine.checkers import Checker, is_alias
from revfx.engine.plan import UnitPlan
from revfx.engine.randomness import RandomState
from revfx.engine.saved import SavedTensor
from revfx.layout import address, copy_with_layout


class HeldTensor(NamedTuple):
    """A tensor of the exit, with its alias and its place in memory.

    Attributes:
        version: how often it had been written to.
        memory: see `memory_of`.
    """

    slot: int
    tensor: Tensor
    alias: Tensor
    version: int
    address: int | None
    memory: int | None


class Match:
    """The tensors and numbers of a run of operators that is being compared with a unit.

    Attributes:
        of: the unit.
        at: the number of operators that matched.
        saved: saved tensors that operators of the unit made, with their slots.
        made: by slot, weak references to results of operators.
        again: slots of results that are there already, such as views of all of a tensor, with weak references.
        external: by slot, tensors that no operator of the unit made.
        versions: by slot of the entry, how often the tensor had been written to when it appeared.
        numbers, states: see `Unit`.
        held: by slot, tensors that the replays take as they are.
        alive: by slot, results that stay until the unit ends: of its exit, and those that codes are made of.
        layouts: by slot, see `Replay`.
        first: the number of the operator with which it began.
        slot_of: by the id of a result, its slot.
    """

    __slots__ = (
        "again", "alive", "at", "external", "first", "held", "layouts", "made", "numbers", "of", "saved", "slot_of",
        "states", "versions",
    )  # fmt: skip

    def __init__(self, of: UnitPlan) -> None:
        unit = of.unit
        self.of: UnitPlan = of
        self.at: int = 0
        self.first: int = 0
        self.saved: list[tuple[SavedTensor, int]] = []
        self.made: list[Any] = [None] * unit.slots
        self.again: list[tuple[int, weakref.ref[Tensor]]] = []
        self.external: list[Any] = [None] * unit.slots
        self.versions: dict[int, int] = {}
        self.numbers: list[Any] = [None] * unit.numbers
        self.states: list[RandomState] = []
        self.held: dict[int, Tensor] = {}
        self.alive: dict[int, Tensor] = {}
        self.layouts: dict[int, Any] = {}
        self.slot_of: dict[int, int] = {}

    @property
    def checker(self) -> Checker:
        """The checker of the operator that comes next."""
        return self.of.checkers[self.at]

    @property
    def is_complete(self) -> bool:
        """Whether all operators matched."""
        return self.at == len(self.of.checkers)

    def copy_held(self, memory: int) -> None:
        """Copy the tensors that are held in memory that is about to be written to, as operators read them before."""
        for slot in self.of.unit.read:
            t = self.external[slot]
            if t is not None and slot not in self.held and memory_of(t) == memory:
                self.held[slot] = copy_with_layout(t)
        for held in (self.held, self.alive):
            for slot, t in held.items():
                if memory_of(t) == memory:
                    held[slot] = copy_with_layout(t)

    def slot(self, t: Tensor) -> int:
        """Return the slot of a tensor that an operator of the unit made; -1 of others."""
        slot = self.slot_of.get(id(t))
        is_one = slot is not None and any(name is t for name in self._names(slot))
        return slot if slot is not None and is_one else -1

    def is_made(self, slot: int, t: Any) -> bool:
        """Return whether a tensor is a result, or an alias of one."""
        return any(name is t or is_alias(name, t) for name in self._names(slot))

    def _names(self, slot: int) -> list[Tensor | None]:
        """Return the tensors that are one result."""
        return [self.made[slot](), *(reference() for s, reference in self.again if s == slot)]

    def given(self, slot: int) -> Tensor | None:
        """Return an external tensor; None if the slot is no external one, or did not appear."""
        return self.external[slot]

    def hold(self, slots: Sequence[int], entry: Sequence[int]) -> tuple[dict[int, Tensor], dict[int, int], set[int]]:
        """Return aliases of held and external tensors for replays.

        Args:
            slots: of the tensors.
            entry: slots of the unit's entry.

        Returns:
            The aliases; how often each had been written to; the memory (see `memory_of`) of those that programs write
            to: all but leaves that need a gradient, which are no entry.
        """
        found: dict[int, Tensor] = {}
        trained = set[int]()
        for slot in slots:
            t = self.held.get(slot)
            if t is None:
                t = self.external[slot]
                if t is None:
                    continue
                if t.requires_grad and t.is_leaf and slot not in entry:
                    trained.add(slot)
            found[slot] = t
        given = dict(zip(found, dispatch.aliases([*found.values()]), strict=True))
        memory = {memory_of(t) for slot, t in given.items() if slot not in trained}
        return given, {slot: _torch.version(t) for slot, t in given.items()}, {m for m in memory if m is not None}

    def exits(self, slots: Sequence[int], first_slots: Sequence[int]) -> list[HeldTensor]:
        """Return the tensors of the exit, given their slots and those that they had before all writes."""
        found: list[HeldTensor] = []
        for slot, first in zip(slots, first_slots, strict=True):
            reference = self.made[first]
            t = None if reference is None else reference()
            if t is None:
                t = self.tensor(slot)
            assert t is not None  # as it is held until here
            at = address(t) if t.layout == torch.strided else None
            found.append(HeldTensor(slot, t, dispatch.alias(t), _torch.version(t), at, memory_of(t)))
        return found

    def version(self, slot: int) -> int | None:
        """Return how often the tensor of a slot of the entry had been written to when it appeared."""
        return self.versions.get(slot)

    def tensor(self, slot: int) -> Tensor | None:
        """Return the tensor of a slot; None if it is gone, or not there yet."""
        if self.external[slot] is not None:
            return self.external[slot]
        reference = self.made[slot]
        t = None if reference is None else reference()
        return self.alive.get(slot, self.held.get(slot)) if t is None else t

    def operand(self, slot: int) -> Tensor:
        """Return a tensor that a code is made of, as it was when an operator read it."""
        for tensors in (self.held, self.alive):
            if slot in tensors:
                return tensors[slot]
        return self.external[slot]

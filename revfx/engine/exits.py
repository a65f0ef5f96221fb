"""Exits of units: tensors by which a later unit, or a saved tensor, is found to follow from an earlier one."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from revfx.engine.call import UnitCall
from revfx.engine.checkers import is_alias


ExitKey = int | tuple[int, torch.Size]  # the id of a tensor, or its address and shape


class Exit(NamedTuple):
    """A tensor of the exit of a call, with its slot, and how often it had been written to.

    Attributes:
        storage: its storage, if no call holds the tensor, so that others may show the same elements when it is gone.
        place: where it lies there.
    """

    tensor: weakref.ref[Tensor]
    call: UnitCall
    slot: int
    version: int
    storage: weakref.ref[torch.UntypedStorage] | None = None
    place: tuple[Any, ...] = ()

    def shows(self, t: Tensor) -> bool:
        """Return whether a tensor at the same address shows the same elements."""
        exit = self.tensor()
        if exit is not None and is_alias(exit, t):
            return True
        return self.storage is not None and self.storage() is t.untyped_storage() and self.place == place_of(t)


def place_of(t: Tensor) -> tuple[Any, ...]:
    """Return where a tensor lies in its storage."""
    return t.shape, t.stride(), t.storage_offset(), t.dtype, t.is_conj(), t.is_neg()

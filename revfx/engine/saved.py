"""Saved tensors: the objects that autograd holds in their place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from revfx import _torch
from revfx.engine import dispatch


if TYPE_CHECKING:
    from revfx.engine.bit_mask import BitMask
    from revfx.engine.call import Loan, UnitCall


class SavedTensor:
    """A saved tensor: kept, or dropped and obtained from the call of a unit.

    Attributes:
        tensor: the tensor without its history, as a result holds the node of autograd's graph that holds this object;
            None once it is dropped.
        version: how often the tensor had been written to when it was saved.
        call: the call of a unit that gives a dropped tensor back.
        slot: the number of the tensor in its unit.
    """

    __slots__ = ("__weakref__", "call", "slot", "tensor", "version")

    @_torch.never_compiled
    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = dispatch.alias(tensor)
        self.version: int = _torch.version(self.tensor)
        self.call: UnitCall | BitMask | Loan | None = None
        self.slot: int = -1

    @_torch.never_compiled
    def drop(self, call: UnitCall | BitMask | Loan, slot: int) -> None:
        """Let the tensor go; `call` gives it back from a slot."""
        self.tensor, self.call, self.slot = None, call, slot

    @_torch.never_compiled
    def get(self) -> Tensor:
        """Return the tensor.

        Raises:
            RuntimeError: the tensor was written to since it was saved, as without hooks.
        """
        if self.call is not None:
            return self.call.fetch(self.slot)
        assert self.tensor is not None
        return _torch.checked_version(self.tensor, self.version)

"""Saved tensors: the objects that autograd holds in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from revfx import _torch
from revfx.engine import dispatch


if TYPE_CHECKING:
    from revfx.engine.call import Loan, UnitCall
    from revfx.engine.marks import Mark


Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]  # for saved tensors: what packs them, and what unpacks


class SavedTensor:
    """A saved tensor: kept, or dropped and obtained from the call of a unit.

    Attributes:
        tensor: the tensor without its history, as a result holds the node of autograd's graph that holds this object;
            None once it is dropped.
        version: how often the tensor had been written to when it was saved.
        call: the call of a unit that gives a dropped tensor back.
        slot: the number of the tensor in its unit.
        handed_over: what hooks around the forward hold in its place, and the function that gives it back.
    """

    __slots__ = ("__weakref__", "call", "handed_over", "slot", "tensor", "version")

    @_torch.uncompiled
    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = dispatch.alias(tensor)
        self.version = _torch.version(self.tensor)
        self.call: UnitCall | Mark | Loan | None = None
        self.slot = -1
        self.handed_over: tuple[Any, Callable[[Any], Tensor]] | None = None

    @_torch.uncompiled
    def drop(self, call: UnitCall | Mark | Loan, slot: int) -> None:
        """Let the tensor go; `call` gives it back from a slot."""
        self.tensor, self.call, self.slot = None, call, slot

    @_torch.uncompiled
    def hand_over(self, hooks: Hooks, tensor: Tensor | None = None) -> None:
        """Leave a tensor that is kept to hooks around the forward: the one that was saved, if it is given."""
        if self.tensor is not None:
            pack, unpack = hooks
            self.handed_over = pack(self.tensor if tensor is None else tensor), unpack
            self.tensor = None

    @_torch.uncompiled
    def get(self) -> Tensor:
        """Return the tensor.

        Raises:
            RuntimeError: the tensor was written to since it was saved, as without hooks.
        """
        if self.call is not None:
            return self.call.fetch(self.slot)
        if self.handed_over is not None:
            held, unpack = self.handed_over
            return unpack(held)
        assert self.tensor is not None
        return _torch.unchanged(self.tensor, self.version)

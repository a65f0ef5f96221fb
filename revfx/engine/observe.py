"""Observers: objects that look on while calls of units end, and while their tensors come back."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

from torch import Tensor


if TYPE_CHECKING:
    from revfx.engine.call import UnitCall
    from revfx.engine.match import Match


class Observer:
    """Looks on; this one does nothing."""

    def completed(self, call: UnitCall, match: Match) -> None:
        """Look at a call before its saved tensors are dropped."""

    def replayed(self, call: UnitCall, slot: int, tensor: Tensor) -> None:
        """Look at a tensor that a replay gave."""


observer: ContextVar[Observer | None] = ContextVar("revfx_observer", default=None)

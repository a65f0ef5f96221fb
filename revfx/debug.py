"""Slow checks for suspicious models: they keep the tensors that revfx would free."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from revfx.ambient import set_variable
from revfx.codes import implementation
from revfx.engine.call import UnitCall
from revfx.engine.match import Match
from revfx.engine.observe import Observer, observer
from revfx.engine.proof import same_values
from revfx.errors import RegenerationError
from revfx.inspection import relative_error


def check_regeneration(rtol: float | None = None) -> AbstractContextManager[None]:
    """Open a context in which forwards keep every value of a region, and backwards compare regenerated values.

    The backward may come later. The check finds functions that compute other values when they are recomputed, user
    rules that are no inverses, and unseen writes in place. It is for `convert`, `rev_block` and `RevBlock` in eager
    mode.

    Args:
        rtol: the largest norm of a difference, relative to the norm; default: the square root of the dtype's eps, or 0
            for lossless regeneration.

    Raises:
        RegenerationError: in the backward, at the first value with a larger difference. It names the value, the layer,
            the operation and the user's file and line.
    """
    return set_variable(observer, _ReplayChecks(rtol))


def codes_by(device: torch.device | str = "cpu") -> str:
    """Return the implementation of codes on a device: "aten" (operators of torch), "c", or "triton".

    C needs a compiler when revfx is installed, and "triton" needs Triton. Both give the same codes as operators of
    torch, in a fraction of the time.

    Raises:
        ValueError: the environment variable `REVFX_CODES`, which chooses another one, is none of these.
        ImportError: the chosen one is not installed.
    """
    return implementation(torch.device(device))


class _ReplayChecks(Observer):
    """Copies the tensors that units drop, and compares them with those that the replays give."""

    def __init__(self, rtol: float | None) -> None:
        self.rtol = rtol
        self.originals: WeakKeyDictionary[UnitCall, dict[int, Tensor]] = WeakKeyDictionary()

    def completed(self, call: UnitCall, match: Match) -> None:
        """Copy the saved tensors, and the entry if the unit is inverted."""
        copies: dict[int, Tensor] = {}
        for saved, slot in match.saved:
            if saved.tensor is not None:
                copies[slot] = saved.tensor.detach().clone()
        if call.inverts:
            for slot in call.unit.entry:
                copies[slot] = match.operand(slot).detach().clone()
        self.originals[call] = copies

    def replayed(self, call: UnitCall, slot: int, tensor: Tensor) -> None:
        """Compare a tensor with the forward's."""
        before = self.originals.get(call, {}).get(slot)
        if before is None or same_values(tensor, before):
            return
        limit = 0.0
        if self.rtol is not None:
            limit = self.rtol
        elif call.inverts and not call.unit.coded and before.is_floating_point():
            limit = torch.finfo(before.dtype).eps ** 0.5
        error = relative_error(tensor, before) if tensor.shape == before.shape else math.inf
        if not error <= limit:
            way = "going backwards from its exit" if call.inverts else "running its operators again"
            raise RegenerationError(
                f"a tensor of {call.unit} is off by {error:.1e} (relative), after {way}: a kernel is not reproducible,"
                " a rule is no inverse, or something that is no operator of torch wrote to a tensor."
            )

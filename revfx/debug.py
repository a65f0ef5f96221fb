"""Checks for models under suspicion: slow, and they keep what revfx is there to free."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from revfx.ambient import given
from revfx.eager.regeneration import Regeneration
from revfx.engine.call import UnitCall
from revfx.engine.match import Match
from revfx.engine.observe import Observer, observer
from revfx.engine.proof import same_values
from revfx.errors import RegenerationError
from revfx.inspection import Originals, relative_error, watched
from revfx.passes.closure import Derivation, Forward


def check_regeneration(rtol: float | None = None) -> AbstractContextManager[None]:
    """Open a context whose forwards keep every value of a region, and whose backwards compare what they regenerate.

    The backward may come later. What this finds: an f that does not compute the same when run again, a rule of the
    user's that is no inverse, an unseen write in place. For `convert`, `rev_block` and `RevBlock` in eager mode.

    Args:
        rtol: the largest norm of a difference, relative to the norm; default: the square root of the dtype's eps, of
            the narrowest dtype that autocast makes in the region; 0 where regeneration is lossless.

    Raises:
        RegenerationError: in the backward, at the first value that is off by more: it names the value, the layer, the
            operation and the user's file and line.
    """
    return _checking(rtol)


@contextmanager
def _checking(rtol: float | None) -> Generator[None]:
    with watched(lambda run: _Checks(rtol)), given(observer, _ReplayChecks(rtol)):
        yield


class _ReplayChecks(Observer):
    """Copies the tensors that units drop, and compares them with those that the replays give."""

    def __init__(self, rtol: float | None) -> None:
        self.rtol = rtol
        self.originals: WeakKeyDictionary[UnitCall, dict[int, Tensor]] = WeakKeyDictionary()

    def completed(self, call: UnitCall, match: Match) -> None:
        """Copy the saved tensors, and the entry if going backwards gives it."""
        copies: dict[int, Tensor] = {}
        for saved, slot in match.saved:
            if saved.tensor is not None:
                copies[slot] = saved.tensor.detach().clone()
        for slot in call.unit.entry if call.inverts else ():
            copies[slot] = match.operand(slot).detach().clone()
        self.originals[call] = copies

    def replayed(self, call: UnitCall, slot: int, tensor: Tensor) -> None:
        """Compare a tensor with the forward's."""
        before = self.originals.get(call, {}).get(slot)
        if before is None:
            return
        limit = self.rtol
        if limit is None:
            rounds = call.inverts and not call.unit.coded and before.is_floating_point()
            limit = torch.finfo(before.dtype).eps ** 0.5 if rounds else 0.0
        if same_values(tensor, before):
            return
        error = relative_error(tensor, before) if tensor.shape == before.shape else math.inf
        if not error <= limit:
            way = "going backwards from its exit" if call.inverts else "running its operators again"
            raise RegenerationError(
                f"a tensor of {call.unit} is off by {error:.1e} (relative), after {way}: a kernel is not reproducible,"
                " a rule is no inverse, or something that is no operator of torch wrote to a tensor."
            )


class _Checks(Originals):
    def __init__(self, rtol: float | None) -> None:
        super().__init__()
        self.rtol = rtol

    def regenerated(self, run: Regeneration, derivation: Derivation, value: int, tensor: Tensor) -> None:
        """Compare a regenerated value with what the forward made."""
        before = self.values.get(value)
        if before is None:
            return
        what = ""
        if before.shape != tensor.shape or before.dtype != tensor.dtype:
            what = f"is {tensor.dtype}{list(tensor.shape)} and was {before.dtype}{list(before.shape)}"
        elif not (before.is_floating_point() or before.is_complex()):
            what = "" if torch.equal(before, tensor) else "is not what it was"
        else:
            dtypes = [before.dtype, *(dtype for _, enabled, dtype in run.autocast if enabled)]
            eps = max(torch.finfo(dtype).eps for dtype in dtypes)
            limit = self.rtol if self.rtol is not None else 0.0 if run.lossless else eps**0.5
            finite = before.isfinite()
            error = relative_error(tensor[finite], before[finite])
            if not error <= limit or not torch.equal(tensor[~finite].nan_to_num(), before[~finite].nan_to_num()):
                what = f"is off by {error:.1e} (relative)"
        if what:
            raise RegenerationError(_text(run, derivation, value, what))


def _text(run: Regeneration, derivation: Derivation, value: int, what: str) -> str:
    op, call = run.program.ops[derivation.op], run.calls[derivation.op]
    step = run.plan.step_of[derivation.op]
    how = (
        f"running `{call.name}` again: it draws, counts or reads something that revfx does not put back"
        if isinstance(derivation, Forward)
        else f"solving `{derivation.arc.text or op.name}`: its rule is no inverse, or what it reads was written to"
    )
    return (
        f"`{run.program.values[value].name}`, regenerated in step {step} of {len(run.region.steps)} at"
        f" {op.where or 'an unknown place'}, {what}, after {how}."
    )

"""When a reversible region runs as plain code: nothing to differentiate, a tracer at work, or the user asked for it."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from revfx import _torch
from revfx.ambient import given
from revfx.engine import dispatch


_storing: ContextVar[bool] = ContextVar("revfx_storing", default=False)


def check_exact(exact: Any) -> None:
    """Raise a TypeError unless the option `exact` is True or False."""
    if not isinstance(exact, bool):
        raise TypeError(f"`exact={exact!r}` must be True (lossless) or False (gradients up to rounding).")


@contextlib.contextmanager
def store_activations() -> Generator[None]:
    """Return a context in which converted models and blocks run the same forward with ordinary storage.

    The oracle of every test of revfx, and the way out where a region can't be regenerated.
    """
    with given(_storing, True):
        yield


@contextlib.contextmanager
def simulating() -> Generator[None]:
    """Return a context in which regions run on fake tensors, where no value can be asked for, as on real ones."""
    with given(dispatch.on_fakes, True):
        yield


def storing() -> bool:
    """Return whether `store_activations` is active."""
    return _storing.get()


def runs_plain(inputs: Iterable[Tensor]) -> bool:
    """Return whether regions run with ordinary storage now: no gradients, `store_activations`, or tracers."""
    return not torch.is_grad_enabled() or _storing.get() or not can_store(inputs)


def sees_the_engine() -> bool:
    """Return whether something of the user's is active that would see other operators, or saved tensors, than those of
    the plain forward: dispatch modes, or saved-tensor hooks such as a checkpoint's.
    """
    return dispatch.has_modes() or _torch.has_saved_tensors_hooks()


def can_store(inputs: Iterable[Tensor]) -> bool:
    """Return whether a plan may run on these inputs: not under torch.func or tracers, not on fake inputs or on "meta",
    where there is no memory to save, and not in MKL-DNN's layout. Nor where tensors have tangents beside them, or
    `parametrize.cached()` keeps computed weights: a replay would have neither.
    """
    if _torch.in_functorch_transform() or _torch.bars_reruns():
        return False
    return dispatch.on_fakes.get() or not any(_torch.is_fake(t) or t.is_meta or t.is_mkldnn for t in inputs)

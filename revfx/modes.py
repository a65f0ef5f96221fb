"""The conditions under which reversible regions run as plain code: no gradients, tracers, or the user's choice."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from revfx import _torch
from revfx.ambient import set_variable
from revfx.engine import dispatch


_storing: ContextVar[bool] = ContextVar("revfx_storing", default=False)


def check_exact(exact: Any) -> None:
    """Raise a TypeError unless the option `exact` is True or False."""
    if not isinstance(exact, bool):
        raise TypeError(f"`exact={exact!r}` must be True (lossless) or False (gradients up to rounding).")


@contextlib.contextmanager
def store_activations() -> Generator[None]:
    """Open a context in which converted models and blocks run the same forward with ordinary storage.

    It is the oracle of revfx's own tests, and a workaround for a region that can't be regenerated.
    """
    with set_variable(_storing, True):
        yield


@contextlib.contextmanager
def allow_fakes() -> Generator[None]:
    """Open a context in which regions run on fake tensors, whose values can't be read, as they do on real ones."""
    with set_variable(dispatch.on_fakes, True):
        yield


def is_storing() -> bool:
    """Return whether `store_activations` is active."""
    return _storing.get()


def runs_plain(inputs: Iterable[Tensor]) -> bool:
    """Return whether regions run with ordinary storage now: no gradients, `store_activations`, or tracers."""
    return not torch.is_grad_enabled() or _storing.get() or not can_store(inputs)


def sees_the_engine() -> bool:
    """Return whether the user's dispatch modes, or saved-tensor hooks such as a checkpoint's, are active.

    They would see other operators and saved tensors than those of the plain forward.
    """
    return dispatch.has_modes() or _torch.has_saved_tensors_hooks()


def can_store(inputs: Iterable[Tensor]) -> bool:
    """Return whether a plan may run on these inputs.

    It may not under torch.func or tracers, on fake or "meta" inputs, which take no memory, or in the layout of MKL-DNN.
    Forward-mode tangents and the cache of `parametrize.cached()` bar it too, as a replay would have neither.
    """
    if _torch.in_functorch_transform() or _torch.bars_reruns():
        return False
    return dispatch.on_fakes.get() or not any(_torch.is_fake(t) or t.is_meta or t.is_mkldnn for t in inputs)

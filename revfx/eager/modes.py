"""When a reversible region runs as plain code: nothing to differentiate, a tracer at work, or the user asked for it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Iterable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from revfx import _fsdp, _torch, codes
from revfx.ambient import given
from revfx.engine import dispatch


class _Recording(threading.local):
    recorder: Any = None  # that of this thread, if any


recording = _Recording()
_storing: ContextVar[bool] = ContextVar("revfx_storing", default=False)
_simulating: ContextVar[bool] = ContextVar("revfx_simulating", default=False)


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
def simulating(bits: int = codes.TYPICAL) -> Generator[None]:
    """Return a context in which regions run on fake tensors, where no value can be asked for, as on real ones; codes
    take so many bits an element.
    """
    with given(_simulating, True), given(codes.foreseen, bits):
        yield


def is_simulating() -> bool:
    """Return whether `simulating` is active."""
    return _simulating.get()


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


def is_distributed(functions: Iterable[Any], tensors: Iterable[Tensor]) -> bool:
    """Return whether DTensors, or parameters that FSDP2 gathers, are about: such forwards are recorded in advance."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    modules = [m for f in functions if isinstance(f, nn.Module) for m in f.modules()]
    parameters = [p for m in modules for p in m.parameters(recurse=False)]
    return any(map(_torch.is_dtensor, (*tensors, *parameters))) or any(map(_fsdp.is_sharded, modules))


def can_store(inputs: Iterable[Tensor]) -> bool:
    """Return whether a plan may run on these inputs, if with ordinary storage: not under torch.func or tracers, revfx's
    own among them, not on fake inputs or on "meta", where there is no memory to save, and not in MKL-DNN's layout,
    which tracers take for strided. Nor where tensors have tangents beside them, or `parametrize.cached()` keeps what
    weights are computed to: a re-run would have neither.
    """
    if recording.recorder is not None or _torch.in_functorch_transform() or _torch.bars_reruns():
        return False
    return _simulating.get() or not any(_torch.is_fake(t) or t.is_meta or t.is_mkldnn for t in inputs)


@contextlib.contextmanager
def without_hooks() -> Generator[None]:
    """Return a context in which saved-tensor hooks around it, the user's or a region's, see nothing of what revfx does.

    An operation's result, packed as it is, would be held by its own history: a cycle that no collector can look into.
    """
    with saved_tensors_hooks(lambda t: t.detach(), lambda t: t):
        yield

"""Calls that a recorder of forwards sees besides torch's operations, put in the place of torch's own for a while."""

from __future__ import annotations

import functools
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from revfx import _torch
from revfx.capture.untraceable import LOST, Untraceable
from revfx.eager.modes import recording
from revfx.errors import Reason
from revfx.rules import foreign_modules


@contextmanager
def intercepted() -> Generator[None]:
    """Return a context in which modules, autograd functions and the generator tell this thread's recorder."""
    call_module, init, set_rng_state = nn.Module.__call__, nn.Module.__init__, torch.set_rng_state

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        recorder = recording.recorder
        return call_module(self, *args, **kwargs) if recorder is None else recorder.call_module(self, args, kwargs)

    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        if recording.recorder is not None:
            recording.recorder.made[id(self)] = self
        init(self, *args, **kwargs)

    def patched_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        apply = super(_torch.BELOW_APPLY, cls).apply
        recorder = recording.recorder
        return apply(*args, **kwargs) if recorder is None else recorder.call_function(cls, apply, args, kwargs)

    def patched_forward(own: Any) -> Any:
        @functools.wraps(own)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            recorder = recording.recorder
            if recorder is None or recorder.suspended:
                return own(self, *args, **kwargs)
            return recorder.call_module(self, args, kwargs)

        return forward

    def patched_set(state: Tensor) -> None:
        if recording.recorder is not None and not recording.recorder.suspended:  # as by `fork_rng` at its end
            raise Untraceable(f"its forward sets the state of torch's generator, {LOST}", kind=Reason.SIDE_EFFECT)
        set_rng_state(state)

    instead: list[tuple[Any, str, Any]] = [
        *((cls, "forward", patched_forward(cls.forward)) for cls in foreign_modules()),  # some libraries call it so
        (nn.Module, "__call__", __call__),
        (nn.Module, "__init__", __init__),
        (_torch.BELOW_APPLY, "apply", classmethod(patched_apply)),
        (torch, "set_rng_state", patched_set),
    ]
    with ExitStack() as stack:
        for owner, name, value in instead:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield

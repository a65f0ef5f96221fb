"""Calls that a recorder of forwards sees besides torch's operations, put in the place of torch's own for a while."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from revfx import _torch
from revfx.eager.modes import recording


@contextmanager
def intercepted() -> Generator[None]:
    """Return a context in which modules, autograd functions and the generator tell this thread's recorder."""
    call_module, init = nn.Module.__call__, nn.Module.__init__

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        recorder = getattr(recording, "recorder", None)
        return call_module(self, *args, **kwargs) if recorder is None else recorder.call_module(self, args, kwargs)

    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        recorder = getattr(recording, "recorder", None)
        if recorder is not None:
            recorder.made[id(self)] = self
        init(self, *args, **kwargs)

    def patched_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        apply = super(_torch.BELOW_APPLY, cls).apply
        recorder = getattr(recording, "recorder", None)
        return apply(*args, **kwargs) if recorder is None else recorder.call_function(cls, apply, args, kwargs)

    with ExitStack() as stack:
        nn.Module.__call__ = __call__
        stack.callback(setattr, nn.Module, "__call__", call_module)
        nn.Module.__init__ = __init__
        stack.callback(setattr, nn.Module, "__init__", init)
        below = _torch.BELOW_APPLY
        own, below.apply = vars(below).get("apply"), classmethod(patched_apply)
        stack.callback(lambda: setattr(below, "apply", own) if own is not None else delattr(below, "apply"))
        set_rng_state = torch.set_rng_state

        def patched_set(state: Tensor) -> None:
            recorder = getattr(recording, "recorder", None)
            if recorder is not None:
                recorder.set_rng_state()
            set_rng_state(state)

        torch.set_rng_state = patched_set
        stack.callback(setattr, torch, "set_rng_state", set_rng_state)
        yield

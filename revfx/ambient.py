"""What recorded code finds around it: random generators, grad mode and autocast, and the user's line."""

from __future__ import annotations

import contextlib
import random
import sys
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from revfx import _torch


_ROOTS = (str(Path(torch.__file__).parent), str(Path(__file__).parent), contextlib.__file__)
RandomState = tuple[str, Callable[[Any], Any], Any, Any]  # name, what sets its state, the state, a form to compare


def generators() -> list[RandomState]:
    """The random generators of Python and numpy, as they are."""
    python = random.getstate()
    found: list[RandomState] = [("Python's `random`", random.setstate, python, python)]
    if (numpy := sys.modules.get("numpy")) is not None:
        state = numpy.random.get_state()
        found.append(("`numpy.random`", numpy.random.set_state, state, (state[1].tobytes(), *state[2:])))
    return found


def torchs_generator() -> RandomState:
    """The default generator of torch for the CPU, as it is."""
    state = torch.get_rng_state()
    return "torch's generator, outside any operation,", torch.set_rng_state, state, state.tolist()


def drew(before: list[RandomState], now: list[RandomState]) -> str | None:
    """The first of some generators that has gone on, or was seeded, since it was noted; None where none has."""
    both = zip(before, now, strict=False)  # NumPy may have been imported meanwhile
    return next((name for (name, *_, then), (*_, state) in both if state != then), None)


def restore(states: list[RandomState]) -> None:
    """None; the generators go on from these states."""
    for _, set_state, state, _ in states:
        set_state(state)


def ambient_state() -> tuple[Any, ...]:
    """Grad mode, autocast and default dtype: what a `with` in the forward changes for the operations inside it."""
    grad, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    return grad, _torch.autocast_state("cpu"), _torch.autocast_state("cuda"), dtype


@contextmanager
def ambience(ambient: tuple[Any, ...]) -> Generator[None]:
    """A context with the grad mode and autocast state that `ambient_state` noted."""
    grad, cpu, cuda, _ = ambient
    with torch.set_grad_enabled(grad and torch.is_grad_enabled()), torch.autocast("cpu", dtype=cpu[1], enabled=cpu[0]):
        with torch.autocast("cuda", dtype=cuda[1], enabled=cuda[0]) if torch.cuda.is_available() else ExitStack():
            yield


@contextmanager
def autocast_of(states: Sequence[tuple[str, bool, torch.dtype]], cached: bool) -> Generator[None]:
    """A context with autocast as it was for each device type, and `cached` as whether it kept what it cast: compiled
    functions are guarded by that. Not inside another one, whose end would be that of what every re-run casts.
    """
    cached = cached and not (any(enabled for _, enabled, _ in states) and _torch.in_autocast())
    with ExitStack() as stack:
        for device, enabled, dtype in states:
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cached))
        yield


Settings = tuple[torch.dtype, tuple[bool, ...], _torch.Modes]


def settings() -> Settings:
    """What is set around a region: the default dtype, which kernels attention may take, and the user's modes."""
    cuda: Any = torch.backends.cuda
    kernels = tuple([getattr(cuda, f"{kernel}_sdp_enabled")() for kernel in _ATTENTION])
    return torch.get_default_dtype(), kernels, _torch.modes()


_ATTENTION = ("flash", "mem_efficient", "math", "cudnn")


@contextmanager
def settings_of(then: Settings) -> Generator[None]:
    """A context with the settings that `settings` noted."""
    now = settings()
    if now == then:
        yield
        return
    _set(then)
    try:
        with _torch.modes_of(then[2]):
            yield
    finally:
        _set(now)


def _set(to: Settings) -> None:
    dtype, enabled, _ = to
    torch.set_default_dtype(dtype)
    for kernel, on in zip(_ATTENTION, enabled, strict=True):
        getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(on)


def where() -> str:
    """The user's file and line from which this was reached."""
    frame = _torch.caller()
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_ROOTS) and not frame.f_code.co_filename.startswith("<"):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def where_raised(error: BaseException) -> str:
    """The user's file and line nearest to where `error` was raised."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_ROOTS)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""

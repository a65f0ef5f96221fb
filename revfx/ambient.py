"""The surroundings of a forward: random generators, grad mode, autocast, and how kernels are chosen."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from revfx import _torch


RandomState = tuple[str, Callable[[Any], Any], Any, Any]  # name, setter of the state, the state, a form to compare


def default_states() -> list[RandomState]:
    """Return the states of the random generators of Python and numpy."""
    python = random.getstate()
    found: list[RandomState] = [("Python's `random`", random.setstate, python, python)]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state = numpy.random.get_state()
        found.append(("`numpy.random`", numpy.random.set_state, state, (state[1].tobytes(), *state[2:])))
    return found


def all_default_states() -> list[RandomState]:
    """Return the states of the random generators of Python, numpy, and torch on the CPU."""
    state = torch.get_rng_state()
    return [
        *default_states(),
        ("torch's generator, outside any operation,", torch.set_rng_state, state, state.tolist()),
    ]


def restore(states: list[RandomState]) -> None:
    """Set the generators to these states."""
    for _, set_state, state, _ in states:
        set_state(state)


@functools.cache
def device_types() -> tuple[str, ...]:
    """Return the types of device that operations may run on: the CPU, and the accelerator torch was built for."""
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


Autocast = tuple[tuple[str, bool, torch.dtype], ...]


def autocast_states(devices: Iterable[str]) -> Autocast:
    """Return for each type of device whether autocast is on, and its dtype."""
    return tuple([(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices])


def ambient_state() -> tuple[Any, ...]:
    """Return the surroundings of a call that its plan depends on: grad mode, autocast, default dtype."""
    return torch.is_grad_enabled(), autocast_states(device_types()), torch.get_default_dtype()


@contextmanager
def kernels_of(then: tuple[Any, ...]) -> Generator[None]:
    """Open a context with earlier kernel settings, as `_torch.kernel_settings` returned them."""
    now = _torch.kernel_settings()
    _torch.set_kernels(now, then)
    try:
        yield
    finally:
        _torch.set_kernels(then, now)


@contextmanager
def set_variable(variable: ContextVar[Any], value: Any) -> Generator[None]:
    """Open a context in which a variable has this value."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)

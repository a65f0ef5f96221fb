"""Compiled parts of a model: calls that an observer sees whole, as their operators can't be recorded."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Hashable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from revfx import _fsdp, _torch
from revfx.ambient import set_variable


# The observer of calls of parts: its method `part` runs them.
part_observer: ContextVar[Any] = ContextVar("revfx_looking_on", default=None)

_running: ContextVar[Sequence[BlockCall]] = ContextVar("revfx_running", default=())  # of the converted model that runs


class CompiledPart:
    """A replacement for a module's compiled `call`, which reports to the observer."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self.module: nn.Module = module
        self.call: Callable[..., Any] = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watch = None if torch.compiler.is_compiling() else part_observer.get()
        if watch is None:
            return self.call(*args, **kwargs)
        return watch.part(self, args, kwargs)

    def __reduce__(self) -> Any:
        return CompiledPart, (self.module, self.call)


class BlockCall(CompiledPart):
    """A compiled part of the converted model that runs; for other models, the module's own call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self not in _running.get():  # another thread runs the plain model
            return _torch.UNCOMPILED_CALL(self.module, *args, **kwargs)
        return super().__call__(*args, **kwargs)


class BlockCalls:
    """Compiled calls of a model's blocks, in place only while the converted model runs.

    The plain model shares its modules with the converted one, and stays uncompiled.
    """

    def __init__(self, calls: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> None:
        self.calls: list[BlockCall] = [BlockCall(module, call) for module, call in calls]
        self.lock: threading.Lock = threading.Lock()
        self.users: int = 0

    @contextlib.contextmanager
    def active(self) -> Generator[None]:
        """Open a context in which blocks run compiled, for the thread that opens it."""
        with self.lock:
            self.users += 1
            for call in self.calls:
                vars(call.module)[_torch.COMPILED] = call
        try:
            with set_variable(_running, self.calls):
                yield
        finally:
            with self.lock:
                self.users -= 1
                if not self.users:
                    for call in self.calls:
                        vars(call.module).pop(_torch.COMPILED, None)


def parts_of(model: nn.Module) -> list[str]:
    """Return the names of the outermost compiled modules inside of a model, and let observers see their calls."""
    found: list[str] = []
    for name, m in model.named_modules():
        if not name or not _torch.is_compiled(m) or any(name.startswith(f"{outer}.") for outer in found):
            continue
        found.append(name)
        call = vars(m).get(_torch.COMPILED) or partial(_torch.UNCOMPILED_CALL, m)
        if not isinstance(call, CompiledPart):
            vars(m)[_torch.COMPILED] = CompiledPart(m, call)
    return found


def structure(module: nn.Module) -> Hashable:
    """Return a key of the computation of a module, which does not depend on the numbers in its tensors."""
    tensors = (*_torch.parameters(module).items(), *_torch.buffers(module).items())
    children: list[Any] = []
    for name, child in _torch.children(module).items():
        children.append((name, None if child is None else structure(child)))
    return type(module), _fsdp.io_dtypes(module), attributes(module), content(dict(tensors)), tuple(children)


_TORCH_ATTRIBUTES = {*vars(nn.Module()), _torch.COMPILED} - {"training"}


def attributes(module: nn.Module) -> Hashable:
    """Return a key of the attributes of a module besides tensors and other modules."""
    return tuple((name, content(value)) for name, value in vars(module).items() if name not in _TORCH_ATTRIBUTES)


def content(value: Any) -> Hashable:
    """Return a key of a value: of plain values and containers the content, of tensors the type, else the identity."""
    if isinstance(value, (bool, int, float, complex, str, bytes)) or value is None:
        return type(value), repr(value)
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device, value.requires_grad
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(content, value))
    if isinstance(value, dict):
        return dict, tuple((k, content(v)) for k, v in value.items())
    return id(value)

"""What a module's Python code may read: compared to see whether a recorded graph still stands for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from revfx import _torch


PRIMITIVE = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)


def _key(value: Any, depth: int = 0) -> Any:
    """A hashable that changes when `value` does: numbers and strings by value, containers by content, others by identity."""
    if isinstance(value, PRIMITIVE):
        return value
    if isinstance(value, Tensor):
        return id(value)
    if depth < 3 and isinstance(value, (list, tuple, set, frozenset)) and len(value) <= 256:
        return type(value).__name__, tuple(_key(v, depth + 1) for v in value)
    if depth < 3 and isinstance(value, dict) and len(value) <= 256:
        return tuple((k if isinstance(k, PRIMITIVE) else id(k), _key(v, depth + 1)) for k, v in value.items())
    return id(value)


_INNER = frozenset(k for k in vars(nn.Module()) if k not in ("training", "_parameters", "_buffers", "_modules"))


def attributes(module: nn.Module) -> tuple[Any, ...]:
    """What one module's own code may read: plain attributes, children, which tensors it has; and whether it has hooks."""
    d = vars(module)
    plain = tuple([(k, _key(v)) for k, v in d.items() if k not in _SKIPPED])
    children = tuple([(k, id(v)) for k, v in _torch.children(module).items()])
    tensors = tuple(
        [(k, t is not None and t.requires_grad) for k, t in (*_torch.parameters(module).items(), *_torch.buffers(module).items())]
    )
    return type(module), plain, children, tensors, _torch.has_hooks(module)


_TABLES = ("_parameters", "_buffers", "_modules")
_SKIPPED = _INNER | {*_TABLES, "_revfx"}


def name_of(module: nn.Module) -> str:
    """The name of the class that the user wrote."""
    return getattr(type(module), "_revfx_base", type(module)).__name__


def structure(module: nn.Module) -> tuple[Any, ...]:
    """A key that two modules share when running them on fake tensors gives the same: class, attributes, shapes, children."""
    d = vars(module)
    plain = tuple((k, _key(v)) for k, v in d.items() if k not in _SKIPPED)
    tensors = tuple(
        (k, None if t is None else (tuple(t.shape), t.dtype, t.device, t.requires_grad))
        for table in (_torch.parameters(module), _torch.buffers(module))
        for k, t in table.items()
    )
    children = tuple((k, None if m is None else structure(m)) for k, m in _torch.children(module).items())
    return type(module), plain, tensors, children


@dataclass(frozen=True)
class Snapshot:
    """The attribute tables of some modules as they were."""

    modules: Sequence[nn.Module]
    tables: Sequence[tuple[dict[str, Any], ...]]
    keys: Sequence[Any]

    @staticmethod
    def of(modules: Sequence[nn.Module]) -> Snapshot:
        """A snapshot of `modules`."""
        tables = [(dict(vars(m)), dict(_torch.parameters(m)), dict(_torch.buffers(m)), dict(_torch.children(m))) for m in modules]
        return Snapshot(modules, tables, [_contents(m) for m in modules])

    def changed(self) -> tuple[int, str] | None:
        """(which module, the name of its attribute that is not what it was), or None."""
        for i, (m, before, key) in enumerate(zip(self.modules, self.tables, self.keys, strict=True)):
            now = (vars(m), _torch.parameters(m), _torch.buffers(m), _torch.children(m))
            for old, new in zip(before, now, strict=True):
                for name in {**old, **new}:
                    if old.get(name, self) is not new.get(name, self):
                        return i, f"{name_of(m)}.{name}"
            for name, value in _contents(m).items():
                if key.get(name) != value:
                    return i, f"{name_of(m)}.{name}"
        return None

    def restore(self) -> None:
        """None; every table holds again what it held (contents of lists and dicts excepted)."""
        for m, before in zip(self.modules, self.tables, strict=True):
            for old, new in zip(before, (vars(m), _torch.parameters(m), _torch.buffers(m), _torch.children(m)), strict=True):
                if old.keys() != new.keys() or any(old[k] is not new[k] for k in old):
                    new.clear()
                    new.update(old)


def _contents(module: nn.Module) -> dict[str, Any]:
    return {k: _key(v) for k, v in vars(module).items() if isinstance(v, (list, dict, set)) and k not in _SKIPPED}

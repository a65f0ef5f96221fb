"""Objects that Python code holds, and the globals that functions load."""

from __future__ import annotations

import dis
import functools
import types
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


ATOMS = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)
_OURS = ("torch", "revfx")
CONTAINERS = (list, dict, set, deque)
EMPTY = object()
_TORCH_TABLES = frozenset(vars(nn.Module())) - {"training"}  # torch's own tables in `vars(module)`


def is_user_attribute(name: str) -> bool:
    """Return whether an attribute of this name in `vars(module)` is the user's, or `training`."""
    return name not in _TORCH_TABLES


def package_of(item: Any) -> str:
    """Return the name of the package of a function or class."""
    return str(item.__module__ or "").partition(".")[0]


@functools.lru_cache(maxsize=1024)
def global_names(code: types.CodeType) -> frozenset[str]:
    """Return the names of the globals that code, or a function inside it, loads."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= global_names(constant)
    return frozenset(names)


def cell_content(cell: types.CellType) -> Any:
    """Return the value of a closure variable; EMPTY if it is not assigned."""
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return EMPTY


def is_plain(value: object) -> bool:
    """Return whether `value` is an object with its state in its attributes, such as a configuration."""
    if package_of(type(value)) in (*_OURS, "builtins"):
        return False
    skipped = (type, nn.Module, types.ModuleType, types.FunctionType)
    return not isinstance(value, skipped) and type(getattr(value, "__dict__", None)) is dict


class GlobalReads:
    """The globals and closure variables that functions of the user load, with their values."""

    def __init__(self, functions: Iterable[Any]) -> None:
        self.globals: list[tuple[dict[str, Any], str, Any]] = []
        self.cells: list[tuple[types.CellType, Any]] = []
        stack, seen = [getattr(f, "__func__", f) for f in functions], set[int]()
        while stack:
            function = stack.pop()
            if not isinstance(function, types.FunctionType) or id(function) in seen or _is_installed(function):
                continue
            seen.add(id(function))
            table = function.__globals__
            for name in global_names(function.__code__) & table.keys():
                self.globals.append((table, name, table[name]))
                stack.append(table[name])
            for cell in function.__closure__ or ():
                value = cell_content(cell)
                if value is not EMPTY:
                    self.cells.append((cell, value))
                    stack.append(value)

    def put_back(self) -> None:
        """Restore the values of the names."""
        for table, name, value in self.globals:
            table[name] = value
        for cell, value in self.cells:
            cell.cell_contents = value


def _is_installed(function: types.FunctionType) -> bool:
    return package_of(function) in _OURS or "site-packages" in function.__code__.co_filename

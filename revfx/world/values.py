"""Objects that Python code holds, and the globals that functions load."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from revfx.world.reach import EMPTY, cell_content, global_names, package_of


ATOMS = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)
_OURS = ("torch", "revfx")


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

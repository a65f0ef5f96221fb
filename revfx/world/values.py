"""Values that Python code holds: keys that change when they do, and the globals that functions load."""

from __future__ import annotations

import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from revfx.world.reach import EMPTY, global_names, held_in


ATOMS = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)
DEPTH = 6  # how far tuples, lists and dicts are compared by what is in them
_OURS = ("torch", "revfx")


class Same:
    """Equal to another where both stand for one object, and that is still there: what takes its address is another."""

    def __init__(self, value: object) -> None:
        self.address = id(value)
        try:
            self.value: Callable[[], object] = weakref.ref(value)
        except TypeError:  # of some classes nothing tells when an object goes: it is kept
            self.value = lambda: value

    def __eq__(self, other: object) -> bool:
        """Return whether both stand for one object."""
        mine = self.value()
        return self is other or (mine is not None and isinstance(other, Same) and other.value() is mine)

    def __hash__(self) -> int:
        """Return the object's address."""
        return self.address


def key(value: Any, depth: int = DEPTH) -> Any:
    """Return a hashable that changes when `value` does.

    Numbers and strings by value and type (1, 1.0 and True differ, as do 0.0 and -0.0), tensors by shape and type (their
    data is read anew), containers by content, plain objects by identity and the numbers and strings that they hold,
    others by identity.
    """
    if isinstance(value, ATOMS):
        return type(value), repr(value) if isinstance(value, (float, complex)) else value
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device, value.requires_grad
    if depth and isinstance(value, (list, tuple, set, frozenset, deque)):
        return type(value), tuple([key(v, depth - 1) for v in value])
    if depth and isinstance(value, dict):
        return type(value), tuple([(key(k, 0), key(v, depth - 1)) for k, v in value.items()])
    if type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
        return value.shape, str(value.dtype), value.tobytes()
    if isinstance(value, types.MethodType):
        return Same(value.__self__), Same(value.__func__)
    if depth and is_plain(value):
        held = vars(value).items()
        return Same(value), tuple([(k, key(v, 1)) for k, v in held if isinstance(v, (*ATOMS, list, tuple, dict))])
    return Same(value)


def is_plain(value: object) -> bool:
    """Return whether `value` is an object whose state is its attributes, such as a configuration."""
    if type(value).__module__.partition(".")[0] in (*_OURS, "builtins"):
        return False
    skipped = (type, nn.Module, types.ModuleType, types.FunctionType)
    return not isinstance(value, skipped) and type(getattr(value, "__dict__", None)) is dict


class GlobalReads:
    """The globals, and variables of closures, that recorded functions of the user's load, with what they were."""

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
            found = [(n, table[n]) for n in global_names(function.__code__) if n in table]
            self.globals += [(table, n, v) for n, v in found]
            held = [(c, v) for c in function.__closure__ or () if (v := held_in(c)) is not EMPTY]
            self.cells += held
            stack += [v for _, v in (*found, *held)]

    def put_back(self) -> None:
        """Make the names stand for what they stood for."""
        for table, name, value in self.globals:
            table[name] = value
        for cell, value in self.cells:
            cell.cell_contents = value


def _is_installed(function: types.FunctionType) -> bool:
    theirs = str(function.__module__ or "").partition(".")[0] in _OURS
    return theirs or "site-packages" in function.__code__.co_filename

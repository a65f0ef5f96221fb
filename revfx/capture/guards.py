"""What makes a plan stale: what the recorded code read, by value, and the modules that it calls whole, by class, flags
and shapes. Found when the plan is made, compared at every call; what else Python code reads must not change.
"""

from __future__ import annotations

import random
import types
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import is_
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from revfx import _torch
from revfx.capture.untraceable import Untraceable
from revfx.eager.modes import recording
from revfx.eager.reach import EMPTY, global_names, held_in, is_users
from revfx.errors import Reason


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


def is_gone(made: Any) -> bool:
    """Return whether a key stands for an object that is no more, so that no other will ever be equal to it."""
    if isinstance(made, tuple):
        return any(map(is_gone, made))
    return isinstance(made, Same) and made.value() is None


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


def name_of(module: nn.Module) -> str:
    """Return the name of the class that the user wrote."""
    return getattr(type(module), "_revfx_base", type(module)).__name__


class Change(NamedTuple):
    """What is not as it was, and where it is a number that recorded code read of a module, which one."""

    text: str
    module: nn.Module | None = None
    name: str = ""


# --- modules
class ModuleGuard:
    """One module as it was: its class and forward, the attributes of some names, its children, hooks, and the shapes of
    its tensors. A fraction may be another one, where the module is called whole: it then reads it itself.

    `names` are those of plain attributes that hold numbers, strings or nothing, and stay the same while they hold the
    same object; what is in others is compared by `key`.
    """

    def __init__(self, module: nn.Module, names: Iterable[str], unset: frozenset[str], opened: bool) -> None:
        table = vars(module)
        found = [k for k in names if k in table and k not in unset]
        self.ref, self.kind, self.unset, self.opened = weakref.ref(module), _kind(module), unset, opened
        self.names = tuple(k for k in found if isinstance(table[k], ATOMS))
        self.values = tuple(table[k] for k in self.names)
        self.others = tuple((k, key(table[k])) for k in found if k not in self.names)
        # such as a method, a sub-module, or a number that the class has
        self.elsewhere = {k: _of_class(module, k) for k in names if k not in table} if opened else {}
        self.children = _children(module)
        self.tensors = _tensors(module, unset)
        self.hooked = _torch.has_hooks(module)

    def changed(self) -> Change | None:
        """Return what is not as it was; None where all is."""
        module = self.ref()
        if module is None:
            return Change("a module that is gone")
        table = vars(module)
        now = map(table.get, self.names)
        if not all(map(is_, now, self.values)) and (name := self._other(table)) is not None:
            return Change(f"{name_of(module)}.{name}", module if self.opened else None, name)
        for name, then in self.others:
            if key(table.get(name)) != then:
                return Change(f"{name_of(module)}.{name}")
        if _kind(module) != self.kind or _torch.has_hooks(module) != self.hooked:
            return Change(f"the class or the hooks of a {name_of(module)}")
        if _children(module) != self.children or _tensors(module, self.unset) != self.tensors:
            return Change(f"the sub-modules or the tensors of a {name_of(module)}")
        others = (k for k, then in self.elsewhere.items() if k in table or _of_class(module, k) != then)
        return next((Change(f"{name_of(module)}.{k}") for k in others), None)

    def _other(self, table: dict[str, Any]) -> str | None:
        part = key if self.opened else _coarse
        pairs = zip(self.names, self.values, strict=True)
        return next((k for k, v in pairs if part(table.get(k)) != part(v)), None)


def _of_class(module: nn.Module, name: str) -> Any:
    value = getattr(type(module), name, None)
    return value if isinstance(value, ATOMS) else None


def _coarse(value: Any) -> Any:
    """Return what is compared of a number: of a fraction its sign and whether it is more than 1. A rate that changes at
    every step would make a plan at every step, and what is found of a module depends on it no further.
    """
    fraction = isinstance(value, float) and not value.is_integer() and value == value
    return (float, value > 0, abs(value) > 1) if fraction else key(value)


def _kind(module: nn.Module) -> tuple[Any, ...]:
    kind = getattr(type(module), "_revfx_base", type(module))
    return kind, getattr(kind, "forward", None)


def _children(module: nn.Module) -> tuple[Any, ...]:
    children = _torch.children(module)
    return tuple([(k, id(m)) for k, m in children.items()]) if children else ()


def _tensors(module: nn.Module, unset: frozenset[str]) -> tuple[Any, ...]:
    return tuple(
        [
            None if t is None else (k, t.requires_grad, t.dtype, t.shape)
            for table in (_torch.parameters(module), _torch.buffers(module))
            for k, t in table.items()
            if k not in unset
        ]
    )


def module_guards(
    opened: Iterable[nn.Module], whole: Iterable[nn.Module], reads: AttributeReads, written: frozenset[tuple[type, str]]
) -> list[ModuleGuard]:
    """Return guards for the modules whose forward was recorded, those elsewhere of which it read, and all modules in
    and below those that are called whole; of these without what their own forward has `written`.
    """
    own = {id(m): m for m in opened}
    inside = {id(m): m for root in whole for m in root.modules() if id(m) not in own}
    elsewhere = {id(m): m for m in [*reads.names] if id(m) not in inside}
    guards = [ModuleGuard(m, reads.of(m), frozenset(), True) for m in {**own, **elsewhere}.values()]
    for m in inside.values():
        unset = frozenset(name for kind, name in written if kind is type(m))
        flags = [k for k, v in vars(m).items() if isinstance(v, ATOMS) and (k == "training" or is_users(k))]
        guards.append(ModuleGuard(m, {*flags, *reads.of(m)}, unset, False))
    return guards


# --- what recorded code reads
class AttributeReads:
    """The attributes of modules that recorded code read."""

    def __init__(self) -> None:
        self.names: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()

    def functions(self) -> list[Any]:
        """Return the functions among the attributes that were read."""
        read = (vars(m).get(name) for m in [*self.names] for name in self.of(m))
        return [f for f in read if isinstance(f, types.FunctionType)]

    def of(self, module: nn.Module) -> list[str]:
        """Return the names that were read of a module; all that it has, where its whole table was asked for."""
        names = self.names.get(module, set[str]())
        every = [k for k in vars(module) if is_users(k)] if "__dict__" in names else []
        return sorted(k for k in {*names, *every} if is_users(k) and not k.startswith("__"))


@contextmanager
def noting_reads(numbers: Mapping[tuple[int, str], Tensor]) -> Generator[AttributeReads]:
    """Return a context in which reads of attributes of modules, by code that this thread's recorder sees, are noted;
    those of `numbers`, which are no part of what is recorded, give a tensor. Untraceable where an attribute holds
    something that gives something else each time it is asked.
    """
    reads, plain = AttributeReads(), nn.Module.__getattribute__

    def __getattribute__(self: nn.Module, name: str) -> Any:
        if recording.recorder is None or recording.recorder.suspended:
            return plain(self, name)
        if (id(self), name) in numbers:
            return numbers[id(self), name]
        value = plain(self, name)
        if isinstance(value, Tensor) and _torch.is_fake(value):
            return value  # which this forward set
        # torch looks into the table on behalf of whoever reads one attribute
        if name != "__dict__" or _torch.caller().f_globals.get("__name__", "").partition(".")[0] not in _OURS:
            reads.names.setdefault(self, set()).add(name)
        if is_users(name) and gives_anew(value):
            text = f"its forward reads `{name}`: a {type(value).__name__} gives something else every time"
            raise Untraceable(text, kind=Reason.HIDDEN_STATE)
        return value

    with mock.patch.object(nn.Module, "__getattribute__", __getattribute__):
        yield reads


def gives_anew(value: Any) -> bool:
    """Return whether `value` is an iterator or a random generator, which no recording may ask."""
    return isinstance(value, (Iterator, random.Random)) or type(value).__module__.startswith("numpy.random")


class GlobalReads:
    """The globals, and variables of closures, that recorded functions of the user's load, with what they were."""

    def __init__(self, functions: Iterable[Any]) -> None:
        self.globals: list[tuple[dict[str, Any], str, Any, Any]] = []
        self.cells: list[tuple[types.CellType, Any, Any]] = []
        stack, seen = [getattr(f, "__func__", f) for f in functions], set[int]()
        while stack:
            function = stack.pop()
            if not isinstance(function, types.FunctionType) or id(function) in seen or _is_installed(function):
                continue
            seen.add(id(function))
            table = function.__globals__
            found = [(n, table[n]) for n in global_names(function.__code__) if n in table]
            self.globals += [(table, n, v, _lasting(v)) for n, v in found]
            held = [(c, v) for c in function.__closure__ or () if (v := held_in(c)) is not EMPTY]
            self.cells += [(c, v, _lasting(v)) for c, v in held]
            stack += [v for _, v in (*found, *held)]

    def changed(self) -> str | None:
        """Return the name of a global that is not what it was; None where all are."""
        for table, name, value, then in self.globals:
            if _differs(table.get(name), value, then):
                return f"the global `{name}`"
        cells = (_differs(held_in(cell), value, then) for cell, value, then in self.cells)
        return "a variable that its forward closes over" if any(cells) else None

    def put_back(self) -> None:
        """Make the names stand for what they stood for."""
        for table, name, value, _ in self.globals:
            table[name] = value
        for cell, value, _ in self.cells:
            cell.cell_contents = value


def _lasting(value: Any) -> Any:
    """Return the key of what can change while it is the same object; None for what can't."""
    return key(value) if isinstance(value, (list, dict, set, tuple, deque)) or is_plain(value) else None


def _differs(now: Any, value: Any, then: Any) -> bool:
    return key(now) != then if then is not None else now is not value and key(now) != key(value)


def _is_installed(function: types.FunctionType) -> bool:
    theirs = str(function.__module__ or "").partition(".")[0] in _OURS
    return theirs or "site-packages" in function.__code__.co_filename

"""What a module's Python code may read: compared to see whether a recorded graph still stands for it."""

from __future__ import annotations

import enum
import functools
import types
import weakref
from collections import deque
from collections.abc import Callable, Container, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revfx import _torch, sharding
from revfx.containers import (
    DEPTH,
    METHODS,
    PRIMITIVE,
    Held,
    content,
    differ,
    held_within,
    is_array,
    is_container,
    is_plain,
    parts_of,
    put_back,
    slots,
)


PARTS = (tuple, frozenset, functools.partial, types.FunctionType, *METHODS)


class Same:
    """Equal to another where both stand for one object, and that is still there: what takes its address is another."""

    def __init__(self, value: object) -> None:
        self.address = id(value)
        try:
            self.value: Callable[[], object] = weakref.ref(value)
        except TypeError:  # of some classes nothing tells when an object goes: it is kept
            self.value = lambda: value

    def __eq__(self, other: object) -> bool:
        """Whether both stand for one object."""
        if self is other:
            return True
        mine = self.value()
        return mine is not None and isinstance(other, Same) and other.value() is mine

    def __hash__(self) -> int:
        """The object's address."""
        return self.address


def is_gone(made: Any) -> bool:
    """Whether a key stands for an object that is no more, so that no other will ever be equal to it."""
    if isinstance(made, tuple):
        return any(map(is_gone, made))
    return isinstance(made, Same) and made.value() is None


def key(value: Any, depth: int = 0) -> Any:
    """A hashable that changes when `value` does.

    Numbers and strings by value and type (1, 1.0 and True differ, as do 0.0 and -0.0), tensors by shape and type (their
    data is read anew), containers, arrays, functions and plain objects by content, others by identity.
    """
    if isinstance(value, PRIMITIVE):
        return type(value), repr(value) if isinstance(value, (float, complex)) else value
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device, value.requires_grad
    if depth < DEPTH and isinstance(value, (list, tuple, set, frozenset, deque)):
        return type(value), tuple([key(v, depth + 1) for v in value])
    if depth < DEPTH and isinstance(value, dict):
        return type(value), tuple([(key(k, depth + 1), key(v, depth + 1)) for k, v in content(value)])
    if type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
        return value.shape, str(value.dtype), value.tobytes()
    if is_array(value):
        return type(value), bytes(value)
    if isinstance(value, ContextVar):
        return Same(value), key(value.get(None), depth + 1)
    if depth < DEPTH and isinstance(value, types.FunctionType):
        named = *enumerate(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).items(), *vars(value).items()
        return Same(value), Same(value.__code__), tuple([(k, key(v, depth + 1)) for k, v in named])
    if depth < DEPTH and (is_plain(value) or slots(type(value))):
        own = [*(vars(value).items() if is_plain(value) else ()), *(content(value) if slots(type(value)) else ())]
        return Same(value), tuple([(k, key(v, depth + 1)) for k, v in own])
    if depth < DEPTH and (parts := parts_of(value)):
        named = Same(value.__func__) if isinstance(value, types.MethodType) else getattr(value, "__name__", None)
        return type(value), named, tuple([key(v, depth + 1) for v in parts])
    return Same(value)


_LASTING = (*PRIMITIVE, Number, enum.Enum, range, type(Ellipsis), type, types.ModuleType, types.BuiltinFunctionType)


def lasts(value: Any, known: Container[int]) -> bool:
    """Whether a value that code passes on means the same at every call.

    Plain values, modules, and what torch or NumPy define do, and objects whose address is `known`, as they were there
    before. What the code made itself does not: a cache that others write to, a function that closes over a value.
    """
    if isinstance(value, (set, frozenset)):
        return all(lasts(v, known) for v in value)
    if isinstance(value, types.FunctionType):
        return value.__closure__ is None or id(value) in known
    theirs = type(value).__module__.partition(".")[0] in ("torch", "numpy")
    return theirs or isinstance(value, (*_LASTING, nn.Module)) or id(value) in known


_INNER = frozenset(k for k in vars(nn.Module()) if k not in ("training", "_parameters", "_buffers", "_modules"))


def composite(module: nn.Module) -> frozenset[str]:
    """The names of attributes that hold containers or plain objects, which are compared by what is in them."""
    return frozenset(
        k
        for k, v in vars(module).items()
        if k not in SKIPPED and (is_container(v) or is_plain(v) or isinstance(v, PARTS))
    )


def lasting(value: Any) -> bool:
    """Whether an attribute with `value` is the same while it holds that object, and no tensor, which others free."""
    contained = isinstance(value, (Tensor, *PARTS)) or is_container(value) or type(value).__module__ == "numpy"
    return not contained and not is_plain(value)


def attributes(
    module: nn.Module, names: frozenset[str] | None = None, without: frozenset[str] = frozenset()
) -> tuple[Any, ...]:
    """What may be read of one module: its forward, plain attributes (of these `names`, less those `without`), children,
    the tensors it has, whether it has hooks.
    """
    d = vars(module)
    named = [k for k in d if k not in SKIPPED and (names is None or k in names)]
    plain = tuple([(k, key(d[k])) for k in named if k not in without])
    children = tuple([(k, Same(v)) for k, v in _torch.children(module).items()])
    tensors = tuple([(k, key(t)) for k, t in (*_torch.parameters(module).items(), *_torch.buffers(module).items())])
    kind = getattr(type(module), "_revfx_base", type(module))
    return kind, getattr(kind, "forward", None), plain, children, tensors, _torch.has_hooks(module)


_TABLES = ("_parameters", "_buffers", "_modules")
SKIPPED = _INNER | {*_TABLES}


def is_users(name: str) -> bool:
    """Whether an attribute of this name in `vars(module)` is the user's, not one of torch's or revfx's tables."""
    return name not in SKIPPED


def name_of(module: nn.Module) -> str:
    """The name of the class that the user wrote."""
    return getattr(type(module), "_revfx_base", type(module)).__name__


def structure(module: nn.Module) -> tuple[Any, ...]:
    """A key that two modules share when running them on fake tensors gives the same: class, attributes, shapes,
    children.
    """
    d = vars(module)
    plain = tuple((k, key(v)) for k, v in d.items() if k not in SKIPPED)
    tensors = tuple(
        (k, None if t is None else (tuple(t.shape), t.dtype, t.device, t.requires_grad))
        for table in (_torch.parameters(module), _torch.buffers(module))
        for k, t in table.items()
    )
    children = tuple((k, None if m is None else structure(m)) for k, m in _torch.children(module).items())
    return type(module), sharding.casts(module), plain, tensors, children


@dataclass(frozen=True)
class Seen:
    """What a module gave on fake arguments: enough to make the like for another module of the same structure."""

    metas: tuple[Any, ...]
    spec: pytree.TreeSpec
    numbers: Mapping[str, Any]

    @staticmethod
    def of(out: Any, inputs: list[Tensor], numbers: Mapping[str, Any]) -> Seen | None:
        """None where results share memory with arguments or each other, which fresh ones would not."""
        leaves, spec = pytree.tree_flatten(out)
        made = [t for t in leaves if isinstance(t, Tensor)]
        if any(t.layout != torch.strided for t in (*made, *inputs)):
            return None
        if any(t.requires_grad and t.clone().stride() != t.stride() for t in made):
            return None
        keys = [_torch.storage_key(t) for t in made]
        if len(set(keys)) < len(keys) or {_torch.storage_key(t) for t in inputs} & set(keys):
            return None
        metas = [
            None if t is None else (tuple(t.shape), t.stride(), t.dtype, t.device, t.requires_grad) for t in leaves
        ]
        return Seen(tuple(metas), spec, numbers)

    def fresh(self) -> Any:
        """New fake results."""
        made = [
            None if m is None else torch.empty_strided(m[0], m[1], dtype=m[2], device=m[3], requires_grad=m[4])
            for m in self.metas
        ]
        made = [t.clone() if t is not None and t.requires_grad else t for t in made]  # a leaf could not be written to
        return pytree.tree_unflatten(made, self.spec)


@dataclass(frozen=True)
class Snapshot:
    """The attribute tables of some modules as they were."""

    modules: Sequence[nn.Module]
    tables: Sequence[tuple[dict[str, Any], ...]]
    keys: Sequence[Any]
    held: Sequence[tuple[int, str, Held]]

    @staticmethod
    def of(modules: Sequence[nn.Module]) -> Snapshot:
        """A snapshot of `modules`."""
        tables = [
            (dict(vars(m)), dict(_torch.parameters(m)), dict(_torch.buffers(m)), dict(_torch.children(m)))
            for m in modules
        ]
        named = [(i, k, vars(m)[k]) for i, m in enumerate(modules) for k in composite(m)]
        held = [(i, k, held_within([v])) for i, k, v in named]
        return Snapshot(modules, tables, [_contents(m) for m in modules], held)

    def changed(self) -> tuple[int, str] | None:
        """(which module, the name of its attribute that is not what it was), or None."""
        for i, (m, before, contents) in enumerate(zip(self.modules, self.tables, self.keys, strict=True)):
            now = (vars(m), _torch.parameters(m), _torch.buffers(m), _torch.children(m))
            for old, new in zip(before, now, strict=True):
                for name in {**old, **new}:
                    if old.get(name, self) is not new.get(name, self):
                        return i, f"{name_of(m)}.{name}"
            for name, value in _contents(m).items():
                if contents.get(name) != value:
                    return i, f"{name_of(m)}.{name}"
        # an object, such as a trainer, may lead to very many others: those are compared by identity first
        named = ((i, k) for i, k, held in self.held if differ(held, lambda a, b: key(a) == key(b)))
        return next(((i, f"{name_of(self.modules[i])}.{k}") for i, k in named), None)

    def written(self) -> set[tuple[type, str]]:
        """The attributes that are not what they were: pairs of a module's class and a name."""
        found: set[tuple[type, str]] = set()
        for m, before, contents in zip(self.modules, self.tables, self.keys, strict=True):
            now = (vars(m), _torch.parameters(m), _torch.buffers(m), _torch.children(m))
            for old, new in zip(before, now, strict=True):
                found.update((type(m), k) for k in {**old, **new} if old.get(k, self) is not new.get(k, self))
            found.update((type(m), k) for k, value in _contents(m).items() if contents.get(k) != value)
        found.update((type(self.modules[i]), k) for i, k, held in self.held if differ(held))
        return found

    def restore(self) -> None:
        """None; every table holds again what it held, and so do containers and plain objects in them."""
        for *_, held in self.held:
            put_back(held)
        for m, before in zip(self.modules, self.tables, strict=True):
            for old, new in zip(
                before, (vars(m), _torch.parameters(m), _torch.buffers(m), _torch.children(m)), strict=True
            ):
                if old.keys() != new.keys() or any(old[k] is not new[k] for k in old):
                    new.clear()
                    new.update(old)


def held(tables: Iterable[dict[str, Any]]) -> Held:
    """The lists, dicts and sets among the attributes in `tables`, each with what is in it."""
    values = [v for table in tables for k, v in table.items() if k not in SKIPPED]
    return [(v, content(v)) for v in values if is_container(v)]


def _contents(module: nn.Module) -> dict[str, Any]:
    return {k: key(v) for k, v in vars(module).items() if is_container(v) and k not in SKIPPED}


@contextmanager
def left_alone(tree: Any, error: Exception) -> Generator[None]:
    """A context that raises `error` where lists, dicts or objects in some arguments are not left as they were.

    They are put back first.
    """
    leaves, spec = pytree.tree_flatten(tree)
    others = [x for x in leaves if not isinstance(x, Tensor)]
    before, containers = key(others), held_within(others)
    try:
        yield
        now, spec_now = pytree.tree_flatten(tree)
        same = spec_now == spec and all(a is b for a, b in zip(leaves, now, strict=True)) and key(others) == before
    finally:
        put_back(containers)
    if not same:
        raise error

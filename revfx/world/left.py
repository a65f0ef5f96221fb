"""Removal of fake tensors that outlive their forward, as in caches that it filled for the first time.

If fake tensors are alive after a forward, the heap is searched for their holders.
"""

from __future__ import annotations

import functools
import gc
import types
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from revfx import _fake
from revfx.world.values import CONTAINERS


@contextmanager
def purge_fakes_after(mode: _fake.FakeMode) -> Generator[None]:
    """Open a context after which caches hold no fake tensor of `mode`."""
    try:
        yield
    finally:
        purge_fakes(mode)


_IMMUTABLE = (tuple, frozenset, types.MappingProxyType, types.FunctionType, types.MethodType, functools.partial)
_TRANSIENT = (types.FrameType, types.TracebackType, BaseException, torch.autograd.Function)
_LRU_CACHE = type(functools.lru_cache(int))
_MAX_DEPTH = 6  # immutable holders in each other


def purge_fakes(mode: _fake.FakeMode) -> str | None:
    """Take fake tensors of `mode` out of their holders; return a holder that could not be restored, or None.

    No fake tensor should be alive when it is called. Caches lose their entries, and names of objects and modules are
    set to None.
    """
    if not mode.alive():
        return None
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    try:
        gc.collect()  # tensors and their holders may be garbage
        unrestored = _take_out(mode.alive(), set(), _MAX_DEPTH)
        if mode.alive():
            gc.collect()
        alive = mode.alive()
        if alive:
            unrestored += [f"a {type(h).__name__}" for h in _holders(alive) if h is not alive]
        return unrestored[0] if unrestored else None
    finally:
        if frozen:
            gc.freeze()


def _holders(things: list[Any]) -> list[Any]:
    """Return the objects that refer to `things`, which itself is one of them."""
    args = (*things,)  # a further holder
    return [h for h in gc.get_referrers(*args) if h is not args and not isinstance(h, (*_TRANSIENT, Tensor))]


def _take_out(things: list[Any], ours: set[int], depth: int) -> list[str]:
    """Take things out of their holders; return the names of holders that could not be restored.

    Args:
        things: fake tensors, or immutable holders of them.
        ours: the ids of lists of this function, which are no holders.
        depth: the immutable holders to follow to their own holders.
    """
    ids, unrestored, immutable, emptied = {id(t) for t in things}, list[str](), list[Any](), list[Any]()
    holders = _holders(things)
    ours |= {id(things), id(holders)}
    for holder in holders:
        if id(holder) in ours:
            continue
        owner = _owner(holder, ours)
        if isinstance(holder, _LRU_CACHE):
            holder.cache_clear()
        elif isinstance(holder, _IMMUTABLE) or getattr(getattr(holder, "__dataclass_params__", None), "frozen", False):
            immutable.append(holder)
        elif isinstance(holder, types.CellType):
            holder.cell_contents = None
            unrestored.append("a variable of a closure")
        elif isinstance(holder, dict) and owner is None:
            _remove_entries(holder, ids)
        elif isinstance(holder, (list, set, deque)):
            _remove_elements(holder, ids)
            if isinstance(holder, list) and not holder:
                emptied.append(holder)
        elif owner is not None:
            unrestored += _unset(owner, ids)
    if emptied:
        _remove_from_caches(emptied, ours)
    if immutable and depth:
        unrestored += _take_out(immutable, ours, depth - 1)
    return unrestored


def _names_of(table: dict[Any, Any], ids: set[int]) -> list[Any]:
    """Return the keys of entries that hold one of `ids`, as key or value."""
    return [k for k, v in table.items() if id(v) in ids or id(k) in ids]


def _remove_entries(table: dict[Any, Any], ids: set[int]) -> None:
    for name in _names_of(table, ids):
        del table[name]


def _remove_elements(holder: Any, ids: set[int]) -> None:
    rest = [x for x in holder if id(x) not in ids]
    holder.clear()
    if isinstance(holder, set):
        holder.update(rest)
    else:
        holder.extend(rest)


def _remove_from_caches(emptied: list[Any], ours: set[int]) -> None:
    """Take lists that held fake tensors alone out of caches: code would expect an element in them."""
    for holder in _holders(emptied):
        if isinstance(holder, _LRU_CACHE):
            holder.cache_clear()
        elif isinstance(holder, dict) and _owner(holder, ours | {id(emptied)}) is None:
            _remove_entries(holder, {id(x) for x in emptied})


def _owner(holder: Any, ours: set[int]) -> Any:
    """Return the owner of attributes: `holder`, or the object, class or module with this `__dict__`."""
    if not isinstance(holder, dict):
        return None if isinstance(holder, (*CONTAINERS, *_IMMUTABLE)) else holder
    if "__builtins__" in holder:
        return holder
    for candidate in gc.get_referrers(holder):
        if id(candidate) in ours or not hasattr(candidate, "__dict__"):
            continue
        table = vars(candidate)
        is_class = isinstance(candidate, type)  # its `__dict__` is a view of the table
        if table is holder or (is_class and gc.get_referents(table)[0] is holder):
            return candidate
    return None


def _unset(owner: Any, ids: set[int]) -> list[str]:
    """Set attributes or globals that hold one of `ids` to None, as earlier values are unknown; return their names.

    An attribute that hides one of the class, such as a `cached_property`, is deleted instead.
    """
    if isinstance(owner, dict):  # the globals of a module
        names = _names_of(owner, ids)
        owner.update(dict.fromkeys(names))
        return [f"`{name}`" for name in names]
    slots = list[str]()
    for c in type(owner).__mro__:
        slots += vars(c).get("__slots__", ())
    values = {name: getattr(owner, name, None) for name in slots} | dict(getattr(owner, "__dict__", {}))
    unset = list[str]()
    for name in _names_of(values, ids):
        if not isinstance(owner, type) and name not in slots and hasattr(type(owner), name):
            delattr(owner, name)
        else:
            setattr(owner, name, None)
            unset.append(f"`{getattr(owner, '__name__', type(owner).__name__)}.{name}`")
    return unset

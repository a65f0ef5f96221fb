"""Fake tensors that outlive the forward that made them, in caches that were filled for the first time.

What is still alive after a forward is looked at from the other side: who holds it? The heap is searched only if
something is.
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
from revfx.world.reach import CONTAINERS
from revfx.world.values import DEPTH


@contextmanager
def none_left(mode: _fake.FakeMode) -> Generator[None]:
    """Return a context after which caches hold no fake tensor of `mode`."""
    try:
        yield
    finally:
        let_go(mode)


_PASSED_ON = (tuple, frozenset, types.MappingProxyType, types.FunctionType, types.MethodType, functools.partial)
_TRANSIENT = (types.FrameType, types.TracebackType, BaseException, torch.autograd.Function)
_LRU = type(functools.lru_cache(int))


def let_go(mode: _fake.FakeMode) -> str | None:
    """Take fake tensors of `mode` out of their holders; return a holder that can't be as before, or None.

    Called when none should be alive. Caches lose the entry, and names of objects and modules stand for None.
    """
    if not mode.alive():
        return None
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    try:
        gc.collect()  # the rest may be garbage, and so may its holders
        blamed = _take_out(mode.alive(), set(), DEPTH)
        if mode.alive():
            gc.collect()
        alive = mode.alive()
        rest = [f"a {type(h).__name__}" for h in _holders(alive) if h is not alive] if alive else []
        return next(iter((*blamed, *rest)), None)
    finally:
        if frozen:
            gc.freeze()


def _holders(things: list[Any]) -> list[Any]:
    args = (*things,)  # which holds them too
    return [h for h in gc.get_referrers(*args) if h is not args and not isinstance(h, (*_TRANSIENT, Tensor))]


def _take_out(things: list[Any], ours: set[int], depth: int) -> list[str]:
    """Take `things` out of their holders; return the names of holders that are not as before."""
    ids, blamed, further, emptied = {id(t) for t in things}, list[str](), list[Any](), list[Any]()
    holders = _holders(things)
    ours |= {id(things), id(holders)}
    for holder in (h for h in holders if id(h) not in ours):
        owner = _owner(holder, ours)
        if isinstance(holder, _LRU):
            holder.cache_clear()
        elif isinstance(holder, _PASSED_ON) or getattr(getattr(holder, "__dataclass_params__", None), "frozen", False):
            further.append(holder)
        elif isinstance(holder, types.CellType):
            holder.cell_contents = None
            blamed.append("a variable of a closure")
        elif isinstance(holder, dict) and owner is None:
            for k in [k for k, v in holder.items() if id(v) in ids or id(k) in ids]:
                del holder[k]
        elif isinstance(holder, (list, set, deque)):
            rest = [x for x in holder if id(x) not in ids]
            holder.clear()
            (holder.update if isinstance(holder, set) else holder.extend)(rest)
            if isinstance(holder, list) and not rest:
                emptied.append(holder)
        elif owner is not None:
            blamed += _unset(owner, ids)
    for holder in _holders(emptied) if emptied else ():  # of a record of nothing else: code would look for it there
        if isinstance(holder, _LRU):
            holder.cache_clear()
        elif isinstance(holder, dict) and _owner(holder, ours | {id(emptied)}) is None:
            for k in [k for k, v in holder.items() if any(v is x for x in emptied)]:
                del holder[k]
    return blamed + (_take_out(further, ours, depth - 1) if further and depth else [])


def _owner(holder: Any, ours: set[int]) -> Any:
    """Return the owner of attributes: `holder`, or the object, class or module that it is the table of."""
    if not isinstance(holder, dict):
        return None if isinstance(holder, (*CONTAINERS, *_PASSED_ON)) else holder
    if "__builtins__" in holder:
        return holder
    tables = ((o, vars(o)) for o in gc.get_referrers(holder) if id(o) not in ours and hasattr(o, "__dict__"))
    # of a class there is a view of the table
    return next(
        (o for o, t in tables if t is holder or (isinstance(o, type) and gc.get_referents(t)[0] is holder)), None
    )


def _unset(owner: Any, ids: set[int]) -> list[str]:
    """Set attributes or globals that hold one of `ids` to None: their earlier values are unknown.

    Attributes of the class show again, and a `cached_property` is computed again.
    """
    is_globals = isinstance(owner, dict)
    slots = [n for c in type(owner).__mro__ for n in vars(c).get("__slots__", ()) if isinstance(n, str)]
    values = owner if is_globals else {n: getattr(owner, n, None) for n in slots} | dict(getattr(owner, "__dict__", {}))
    blamed = list[str]()
    for name in [n for n, v in values.items() if id(v) in ids]:
        if is_globals:
            owner[name] = None
        elif not isinstance(owner, type) and name not in slots and hasattr(type(owner), name):
            delattr(owner, name)
            continue
        else:
            setattr(owner, name, None)
        who = "" if is_globals else f"{getattr(owner, '__name__', type(owner).__name__)}."
        blamed.append(f"`{who}{name}`")
    return blamed

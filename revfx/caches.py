"""Fake tensors that outlive the run that made them: found in what holds them, and let go.

Code that fills a cache for the first time while it runs on fake tensors (a table behind `functools.lru_cache`, a mask
in a default argument) would leave one there for good. Nobody knows all the places where code may keep a tensor, so what
is still alive after a run is looked at from the other side: who holds it? The heap is searched only if something is.
"""

from __future__ import annotations

import functools
import gc
import types
from collections.abc import Collection, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from revfx import _torch
from revfx.containers import CONTAINERS, content, kind_of


DEPTH = 6  # how far tuples, functions and the like are followed to what holds them
MOST = 64  # tensors whose holders are looked for at once
_LRU = type(functools.lru_cache(int))
_PASSED_ON = (tuple, frozenset, types.MappingProxyType, types.FunctionType, types.MethodType, functools.partial)
_TRANSIENT = (types.FrameType, types.TracebackType, BaseException, torch.autograd.Function)


def of_their_own(graph: fx.Graph, mode: _torch.FakeMode) -> None:
    """None; what the nodes of `graph` carry as results are from now on fake tensors of another mode.

    They share memory as those of `mode` did, but have no history: then whoever holds one of `mode` is somebody else.
    """
    nodes = [n for n in graph.nodes if "val" in n.meta]
    old = {id(t): t for n in nodes for t in _fakes(n.meta["val"])}
    new = dict(zip(old, _torch.moved(old.values(), mode, _torch.fake_mode()), strict=True))
    for n in nodes:
        n.meta["val"] = _replaced(n.meta["val"], new)


def _fakes(val: Any) -> list[Tensor]:
    if isinstance(val, dict):
        val = tuple(val.values())
    if isinstance(val, (tuple, list)):
        return [t for v in val for t in _fakes(v)]
    return [val] if _torch.is_fake(val) else []


def _replaced(val: Any, new: dict[int, Tensor]) -> Any:
    if isinstance(val, dict):
        return {k: _replaced(v, new) for k, v in val.items()}
    if isinstance(val, (tuple, list)):
        items = [_replaced(v, new) for v in val]
        return type(val)(*items) if hasattr(val, "_fields") else type(val)(items)
    return new.get(id(val), val)


def let_go(mode: _torch.FakeMode, recorded: Collection[int] = ()) -> str | None:
    """What a fake tensor of `mode` was left behind in, where that can't be as it was before; else None.

    Called when none should be alive: caches that hold one lose the entry. `recorded` are the ids of those that a graph
    computes again; added to a list or a set, they would be missing there afterwards.
    """
    if not mode.alive():
        return None
    with _thawed():
        _search(mode, recorded, caches_only=True)
        if not mode.alive():
            return None
        gc.collect()  # what is left may be garbage, and so may be what holds it
        told = _search(mode, recorded, caches_only=False)
        if mode.alive():
            gc.collect()
        held = [f"a {type(r).__name__}" for r in _remaining(mode)]
    return next(iter((*told, *held)), None)


@contextmanager
def _thawed() -> Generator[None]:
    """A context in which `gc` also knows of what was there when somebody called `gc.freeze()`; no garbage is frozen."""
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    try:
        yield
    finally:
        if frozen:
            gc.collect()
            gc.freeze()


@contextmanager
def none_left(mode: _torch.FakeMode) -> Generator[None]:
    """A context after which caches hold no fake tensor of `mode`."""
    try:
        yield
    finally:
        let_go(mode)


def _remaining(mode: _torch.FakeMode) -> list[Any]:
    """What holds the fake tensors that could not be let go."""
    alive = mode.alive()
    return [r for r in _holders(alive) if r is not alive and not _is(r, (*_TRANSIENT, Tensor))]


def _holders(things: Collection[Any]) -> list[Any]:
    """What holds any of `things`, but for the arguments of this very search (which Python 3.13 reports)."""
    args = tuple(things)
    return [r for r in gc.get_referrers(*args) if r is not args] if args else []


def _search(mode: _torch.FakeMode, recorded: Collection[int], caches_only: bool) -> list[str]:
    search = _Search(recorded, caches_only)
    alive = mode.alive()
    search.ours.add(id(alive))
    while alive:
        some = alive[-MOST:]
        del alive[-MOST:]
        search.let_go(some)
    return search.told


class _Search:
    """Goes from tensors to what holds them, until it comes to something that can lose an entry.

    With `caches_only` it leaves alone what may be on its way out itself.
    """

    def __init__(self, recorded: Collection[int], caches_only: bool) -> None:
        self.recorded, self.caches_only = recorded, caches_only
        self.ours: set[int] = set()
        self.told: list[str] = []

    def let_go(self, things: list[Any], depth: int = 0) -> None:
        """None; what holds `things` does so no longer."""
        self.ours.add(id(things))
        ids = {id(x) for x in things}
        holders = _holders(things)
        self.ours.add(id(holders))
        holders = [h for h in holders if id(h) not in self.ours and not _is(h, _TRANSIENT)]
        self.ours.add(id(holders))
        owners = _owners([h for h in holders if _is(h, dict)], self.ours)
        further, emptied = list[Any](), list[Any]()
        for h in holders:
            if _is(h, _LRU):
                h.cache_clear()
            elif _is(h, dict) and id(h) in owners:
                self._unset(owners[id(h)], h, ids)
            elif _is(h, _PASSED_ON) or _is_frozen(h):
                further.append(h)
            elif _is(h, dict) or (_is(h, CONTAINERS) and not self.caches_only):
                if _remove(h, ids):
                    emptied.append(h)
                if not _is(h, dict) and not ids.isdisjoint(self.recorded):
                    self.told.append(f"a {type(h).__name__}")
            elif not self.caches_only:
                self._change(h, ids)
        if emptied:
            self._drop(emptied)
        if further and depth < DEPTH:
            self.let_go(further, depth + 1)

    def _drop(self, records: list[Any]) -> None:
        """None; caches lose the entries that are `records` of which nothing is left: code would look for it there."""
        self.ours.add(id(records))
        holders = [h for h in _holders(records) if id(h) not in self.ours and _is(h, (dict, _LRU))]
        self.ours.add(id(holders))
        owners = _owners([h for h in holders if _is(h, dict)], self.ours)
        for h in holders:
            if _is(h, _LRU):
                h.cache_clear()
            elif id(h) not in owners:
                _remove(h, set(map(id, records)))

    def _change(self, holder: Any, ids: set[int]) -> None:
        """None; what holds one of `ids` and is not a cache for certain does so no longer."""
        if _is(holder, types.CellType):
            holder.cell_contents = None
            self.told.append("a variable of a closure")
        elif not _torch.is_fake(holder):
            self._unset(holder, _table(holder), ids)

    def _unset(self, owner: Any, table: Any, ids: set[int]) -> None:
        """None; attributes or globals lose the value, but not the name: nobody knows what was there before."""
        if self.caches_only:
            return
        table, is_class = table or {}, _is(owner, type)
        slots = [n for c in type(owner).__mro__ for n in vars(c).get("__slots__", ()) if isinstance(n, str)]
        values = {n: getattr(owner, n, None) for n in slots if not is_class} | dict(table)
        for name in [n for n, v in values.items() if id(v) in ids]:
            if not is_class and name in table and hasattr(type(owner), name):
                del table[name]  # what the class says shows again; what a `cached_property` gave is computed again
                continue
            if not is_class and name in table:
                table[name] = None
            else:
                setattr(owner, name, None)
            who = owner.__name__ if _is(owner, (type, types.ModuleType)) else type(owner).__name__
            self.told.append(f"`{name}`" if owner is table else f"`{who}.{name}`")


def _is(value: Any, kinds: Any) -> bool:
    """As `isinstance`, which proxies and mocks may answer as they like."""
    return issubclass(type(value), kinds)


def _is_frozen(value: Any) -> bool:
    params = getattr(type(value), "__dataclass_params__", None)
    return params is not None and params.frozen


def _remove(container: Any, ids: set[int]) -> bool:
    """Whether `container`, which loses these objects, was a record of nothing else: a list, or a dict by name."""
    kind = kind_of(container)
    if issubclass(kind, dict):
        keys = [k for k, v in content(container) if id(k) in ids or id(v) in ids]
        for k in keys:
            kind.__delitem__(container, k)
        return not container and bool(keys) and all(isinstance(k, str) for k in keys)
    rest = [x for x in content(container) if id(x) not in ids]
    kind.clear(container)
    (kind.update if kind is set else kind.extend)(container, rest)
    return kind is list and not rest


def _table(owner: Any) -> Any:
    """The table of the attributes of an object, or None; of a class the dict behind it."""
    if _is(owner, type):
        return gc.get_referents(vars(owner))[0]
    try:
        return object.__getattribute__(owner, "__dict__")
    except AttributeError:
        return None


def _owners(dicts: list[Any], ours: set[int]) -> dict[int, Any]:
    """Of those dicts that are namespaces, the object whose attributes they are; for globals that may be the dict."""
    if not dicts:
        return {}
    known, found = {id(d): d for d in dicts}, dict[int, Any]()
    for h in _holders(dicts):
        if id(h) in ours or h is dicts or h is known:
            continue
        if _is(h, types.FunctionType) and id(h.__globals__) in known:
            found.setdefault(id(h.__globals__), h.__globals__)
        table = None if _is(h, CONTAINERS) and type(h) in CONTAINERS else _table(h)
        if table is not None and id(table) in known:
            found[id(table)] = h
    return found

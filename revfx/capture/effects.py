"""What a forward leaves behind while it runs on fake tensors: noted before, named and undone afterwards.

Fake tensors may also outlive the run where nobody looked, in a cache that was filled for the first time. What is still
alive after a run is looked at from the other side: who holds it? The heap is searched only if something is.
"""

from __future__ import annotations

import enum
import functools
import gc
import types
from collections import deque
from collections.abc import Collection, Container, Generator, Iterable, Sequence
from contextlib import contextmanager
from numbers import Number
from operator import is_
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from revfx import _fake, _torch
from revfx.capture.guards import ATOMS, DEPTH, is_plain, key
from revfx.eager.reach import CONTAINERS, is_users
from revfx.eager.state import content, fill, holds


LONG = 10_000  # entries of a container that is data, and not noted


# --- modules, and what a forward is given
def held_by(values: Iterable[Any], depth: int = DEPTH) -> list[tuple[Any, tuple[Any, ...]]]:
    """Return containers, and attribute tables of plain objects, among `values` and in each other, and their items."""
    found: dict[int, tuple[Any, tuple[Any, ...]]] = {}
    level = [*values]
    for _ in range(depth):
        tables = [t for v in level if (t := _table(v)) is not None and len(t) <= LONG]
        inner = [x for v in level if isinstance(v, tuple) for x in v]
        for t in tables:
            if id(t) not in found:
                found[id(t)] = t, content(t)
                inner += (x for item in found[id(t)][1] for x in (item if type(item) is tuple else (item,)))
        level = [x for x in inner if not isinstance(x, (*ATOMS, Tensor))]
    return [*found.values()]


def _table(value: Any) -> Any:
    return value if isinstance(value, CONTAINERS) else vars(value) if is_plain(value) else None


class Snapshot:
    """The attribute tables of some modules as they were, and the containers in them."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        self.tables = [(i, t, dict(t)) for i, m in enumerate(modules) for t in _tables(m)]
        self.held = [
            (i, k, held)
            for i, m in enumerate(modules)
            for k, v in vars(m).items()
            if is_users(k) and (held := held_by([v], 4))
        ]

    def changes(self) -> Generator[tuple[int, str]]:
        """Yield the changes: the number of a module, and the name of its attribute, or "hooks"."""
        for i, table, then in self._touched():
            for k in {**then, **table}:
                if not _same(table.get(k, self), then.get(k, self)):
                    yield i, k if isinstance(k, str) else "hooks"
        yield from ((i, k) for i, k, held in self.held if not all(holds(c, then) for c, then in held))

    def written(self) -> set[tuple[type, str]]:
        """Return the attributes that are not what they were: pairs of a module's class and a name."""
        return {(type(self.modules[i]), k) for i, k in self.changes()}

    def restore(self) -> None:
        """Make every table hold again what it held, and so the containers in them."""
        for container, then in (pair for *_, held in self.held for pair in held):
            fill(container, then)
        for _, table, then in self._touched():
            table.clear()
            table.update(then)

    def _touched(self) -> Generator[tuple[int, dict[Any, Any], dict[Any, Any]]]:
        for i, table, then in self.tables:
            if table.keys() != then.keys() or not all(map(is_, table.values(), then.values())):
                yield i, table, then


def _same(now: Any, then: Any) -> bool:
    """Return whether an attribute holds what it held: the same object, or the same number or string."""
    return now is then or (isinstance(now, ATOMS) and key(now) == key(then))


def _tables(module: nn.Module) -> tuple[dict[Any, Any], ...]:
    own = vars(module), _torch.parameters(module), _torch.buffers(module), _torch.children(module)
    return *own, *_torch.hook_tables(module)


@contextmanager
def left_alone(tree: Any, error: Exception) -> Generator[None]:
    """Return a context that puts back lists, dicts and objects among arguments, and raises `error` if they changed."""
    leaves, spec = pytree.tree_flatten(tree)
    held = held_by(x for x in leaves if not isinstance(x, Tensor))
    try:
        yield
        now, spec_now = pytree.tree_flatten(tree)
        same = spec_now == spec and all(map(is_, leaves, now)) and all(holds(c, then) for c, then in held)
    finally:
        for container, then in held:
            fill(container, then)
    if not same:
        raise error


_LASTING = (*ATOMS, Number, enum.Enum, range, type(Ellipsis), type, types.ModuleType, types.BuiltinFunctionType)


def lasts(value: Any, known: Container[int]) -> bool:
    """Return whether a value that code passes on means the same at every call.

    Plain values, modules, and what torch or NumPy define do, and objects whose address is `known`, as they were there
    before. What the code made itself does not: a cache that others write to, a function that closes over a value.
    """
    if isinstance(value, (set, frozenset)):
        return all(lasts(v, known) for v in value)
    if isinstance(value, types.FunctionType):
        return value.__closure__ is None or id(value) in known
    theirs = type(value).__module__.partition(".")[0] in ("torch", "numpy")
    return theirs or isinstance(value, (*_LASTING, nn.Module)) or id(value) in known


# --- fake tensors that are left
def of_their_own(graph: fx.Graph, mode: _fake.FakeMode) -> None:
    """Make what the nodes of `graph` carry as results fake tensors of another mode.

    They share memory as those of `mode` did, but have no history: then whoever holds one of `mode` is somebody else.
    """
    nodes = [n for n in graph.nodes if "val" in n.meta]
    old = {id(t): t for n in nodes for t in pytree.tree_leaves(n.meta["val"]) if _torch.is_fake(t)}
    new = dict(zip(old, _fake.moved(old.values(), mode, _fake.FakeMode()), strict=True))
    for n in nodes:
        n.meta["val"] = pytree.tree_map(lambda t: new.get(id(t), t), n.meta["val"])


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


def let_go(mode: _fake.FakeMode, recorded: Collection[int] = ()) -> str | None:
    """Take fake tensors of `mode` out of what holds them, and return what can't be as it was before; None: all is.

    Called when none should be alive. Caches lose the entry, and names of objects and modules stand for None. `recorded`
    are the ids of those that a graph computes again: added to a list or a set, they would be missing there afterwards.
    """
    if not mode.alive():
        return None
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    try:
        gc.collect()  # what is left may be garbage, and so may be what holds it
        told = _take_out(mode.alive(), {*recorded}, set(), DEPTH)
        if mode.alive():
            gc.collect()
        alive = mode.alive()
        rest = [f"a {type(h).__name__}" for h in _holders(alive) if h is not alive] if alive else []
        return next(iter((*told, *rest)), None)
    finally:
        if frozen:
            gc.freeze()


def _holders(things: list[Any]) -> list[Any]:
    args = (*things,)  # which holds them too
    return [h for h in gc.get_referrers(*args) if h is not args and not isinstance(h, (*_TRANSIENT, Tensor))]


def _take_out(things: list[Any], recorded: set[int], ours: set[int], depth: int) -> list[str]:
    """Make what holds `things` do so no longer, and return the names of what is not as it was."""
    ids, told, further, emptied = {id(t) for t in things}, list[str](), list[Any](), list[Any]()
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
            told.append("a variable of a closure")
        elif isinstance(holder, dict) and owner is None:
            for k in [k for k, v in holder.items() if id(v) in ids or id(k) in ids]:
                del holder[k]
        elif isinstance(holder, (list, set, deque)):
            rest = [x for x in holder if id(x) not in ids]
            holder.clear()
            (holder.update if isinstance(holder, set) else holder.extend)(rest)
            if ids & recorded:
                told.append(f"a {type(holder).__name__}")
            if isinstance(holder, list) and not rest:
                emptied.append(holder)
        elif owner is not None:
            told += _unset(owner, ids)
    for holder in _holders(emptied) if emptied else ():  # of a record of nothing else: code would look for it there
        if isinstance(holder, _LRU):
            holder.cache_clear()
        elif isinstance(holder, dict) and _owner(holder, ours | {id(emptied)}) is None:
            for k in [k for k, v in holder.items() if any(v is x for x in emptied)]:
                del holder[k]
    return told + (_take_out(further, recorded, ours, depth - 1) if further and depth else [])


def _owner(holder: Any, ours: set[int]) -> Any:
    """Return whose attributes `holder` has: its own, or those of the object, class or module whose table it is."""
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
    """Make attributes or globals that hold one of `ids` stand for None: nobody knows what was there before.

    What the class says shows again, and what a `cached_property` gave is computed again.
    """
    is_globals = isinstance(owner, dict)
    slots = [n for c in type(owner).__mro__ for n in vars(c).get("__slots__", ()) if isinstance(n, str)]
    values = owner if is_globals else {n: getattr(owner, n, None) for n in slots} | dict(getattr(owner, "__dict__", {}))
    told = list[str]()
    for name in [n for n, v in values.items() if id(v) in ids]:
        if is_globals:
            owner[name] = None
        elif not isinstance(owner, type) and name not in slots and hasattr(type(owner), name):
            delattr(owner, name)
            continue
        else:
            setattr(owner, name, None)
        who = "" if is_globals else f"{getattr(owner, '__name__', type(owner).__name__)}."
        told.append(f"`{who}{name}`")
    return told

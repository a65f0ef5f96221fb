"""Modules and tensors reachable from a function: through sub-modules, closures, partial arguments, globals, containers
and plain objects.
"""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from revfx import _fsdp, _torch


DEPTH = 4  # how far containers, closures and plain objects are followed to modules and tensors
LONG = 1_000  # entries of a container that is data, and not looked through
CONTAINERS = (list, dict, set, deque)
_INNER = frozenset(vars(nn.Module())) - {"training"}  # torch's own tables in `vars(module)`
ATOMS = frozenset({bool, int, float, complex, str, type(None), torch.dtype, torch.device, type})
_NOT_THEIRS = sys.stdlib_module_names | {"torch"}
EMPTY = object()


def is_users(name: str) -> bool:
    """Return whether an attribute of this name in `vars(module)` is the user's, or `training`."""
    return name not in _INNER


@functools.lru_cache(maxsize=1024)
def global_names(code: types.CodeType) -> frozenset[str]:
    """Return the names of the globals that code, or a function inside it, loads."""
    own = (i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    return frozenset(own).union(*(global_names(c) for c in code.co_consts if isinstance(c, types.CodeType)))


def held_in(cell: types.CellType) -> Any:
    """Return the content of a variable of a closure; EMPTY if it is not assigned."""
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return EMPTY


class Reach:
    """The modules and tensors that a function can see; no lazy module may be among them."""

    def __init__(self, function: Any) -> None:
        self.modules: dict[int, nn.Module] = {}
        self.tensors: list[Tensor] = []
        level, seen = [function], set[int]()
        for depth in range(DEPTH, -1, -1):
            found = list[Any]()
            for item in level:
                if id(item) not in seen:
                    seen.add(id(item))
                    found.extend(self._visit(item, depth))
            level = found
        self.parameters: list[dict[str, Any]] = []
        fsdp = _fsdp.in_use()
        swapped = {id(x) for m in self.modules.values() if fsdp and _fsdp.is_sharded(m) for x in m.modules()}
        for m in self.modules.values():
            if (parameters := _torch.parameters(m)) and id(m) not in swapped:  # FSDP2 gathers them for each call
                self.parameters.append(parameters)
                lazy = [k for k, p in parameters.items() if not (p is None or type(p) is nn.Parameter) and is_lazy(p)]
                if lazy:
                    raise ValueError(
                        f"`{lazy[0]}` of a {type(m).__name__} is not initialised yet: a lazy module can't be run again"
                        " as it ran first. Call the model once under `torch.no_grad()` before it is trained."
                    )

    def needs_grad(self) -> bool:
        """Return whether any of the tensors requires a gradient."""
        held = (p for table in self.parameters for p in table.values() if p is not None)
        return any(t.requires_grad for t in (*self.tensors, *held))

    def _visit(self, item: Any, depth: int) -> Iterable[Any]:
        """Note `item`, and return the objects that it leads to."""
        if isinstance(item, nn.Module):
            return self._module(item)
        if isinstance(item, Tensor):
            # of one with a history, a leaf that shares its version: the graph may lead to the state that holds this
            self.tensors.append(item if item.is_leaf else item.detach().requires_grad_())
        elif depth == 0:
            return ()
        elif isinstance(item, functools.partial):
            return item.func, *item.args, *item.keywords.values()
        elif isinstance(item, types.MethodType):
            return item.__self__, item.__func__
        elif isinstance(item, types.FunctionType):
            # closures of torch's and revfx's own functions may hold the user's objects
            known = {} if _top(item) in ("torch", "revfx") else item.__globals__
            held = map(held_in, item.__closure__ or ())
            return *held, *(known[n] for n in global_names(item.__code__) if n in known)
        elif isinstance(item, (*CONTAINERS, tuple)):
            return _items(item)
        elif not isinstance(item, type) and _top(type(item)) not in _NOT_THEIRS:
            return _items(getattr(item, "__dict__", ()))
        return ()

    def _module(self, module: nn.Module) -> list[Any]:
        further = list[Any]()
        for m in module.modules():
            if id(m) not in self.modules:
                self.modules[id(m)] = m
                further += [v for name, v in vars(m).items() if is_users(name) and type(v) not in ATOMS]
        return further


def _top(item: Any) -> str:
    return str(item.__module__ or "").partition(".")[0]


def _items(container: Any) -> Iterable[Any]:
    if not isinstance(container, (*CONTAINERS, tuple)) or len(container) > LONG:
        return ()
    return [*container.values()] if isinstance(container, dict) else [*container]

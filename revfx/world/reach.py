"""Modules and tensors that a function can reach, through closures, globals, containers and plain objects."""

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


_SEARCH_DEPTH = 4  # steps through containers, closures and plain objects to modules and tensors
_MAX_SEARCHED_ENTRIES = 1_000  # a longer container is data, and is not searched
CONTAINERS = (list, dict, set, deque)
_TORCH_TABLES = frozenset(vars(nn.Module())) - {"training"}  # torch's own tables in `vars(module)`
_ATOM_TYPES = frozenset({bool, int, float, complex, str, type(None), torch.dtype, torch.device, type})
_LIBRARIES = sys.stdlib_module_names | {"torch"}
EMPTY = object()


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


class Reach:
    """The modules and tensors that a function can reach; lazy modules are an error."""

    def __init__(self, function: Any) -> None:
        self.modules: dict[int, nn.Module] = {}
        self.tensors: list[Tensor] = []
        level, seen = [function], set[int]()
        for depth in range(_SEARCH_DEPTH, -1, -1):
            found = list[Any]()
            for item in level:
                if id(item) not in seen:
                    seen.add(id(item))
                    found.extend(self._visit(item, depth))
            level = found
        gathered = set[int]()  # ids of modules with parameters that FSDP2 gathers for each call
        if _fsdp.in_use():
            for module in filter(_fsdp.is_sharded, self.modules.values()):
                gathered.update(map(id, module.modules()))
        for module in self.modules.values():
            if id(module) not in gathered:
                self._add_parameters(module)

    def needs_grad(self) -> bool:
        """Return whether any of the tensors requires a gradient."""
        return any(t.requires_grad for t in self.tensors)

    def _add_parameters(self, module: nn.Module) -> None:
        for name, p in _torch.parameters(module).items():
            if p is None:
                continue
            if type(p) is not nn.Parameter and is_lazy(p):
                raise ValueError(
                    f"`{name}` of a {type(module).__name__} is not initialised yet: a lazy module can't be run again"
                    " as it ran first. Call the model once under `torch.no_grad()` before it is trained."
                )
            self.tensors.append(p)

    def _visit(self, item: Any, depth: int) -> Iterable[Any]:
        """Add `item`, and return the objects that it refers to."""
        if isinstance(item, nn.Module):
            return self._add_modules(item)
        if isinstance(item, Tensor):
            self.tensors.append(item)
        elif depth == 0:
            return ()
        elif isinstance(item, functools.partial):
            return item.func, *item.args, *item.keywords.values()
        elif isinstance(item, types.MethodType):
            return item.__self__, item.__func__
        elif isinstance(item, types.FunctionType):
            objects = [*map(cell_content, item.__closure__ or ())]
            if package_of(item) not in ("torch", "revfx"):  # closures of their functions may hold the user's objects
                objects += [item.__globals__[n] for n in global_names(item.__code__) & item.__globals__.keys()]
            return objects
        elif isinstance(item, (*CONTAINERS, tuple)):
            return _elements(item)
        elif not isinstance(item, type) and package_of(type(item)) not in _LIBRARIES:
            return _elements(getattr(item, "__dict__", ()))
        return ()

    def _add_modules(self, module: nn.Module) -> list[Any]:
        """Add a module and its sub-modules, and return their other attributes."""
        attributes = list[Any]()
        for m in module.modules():
            if id(m) not in self.modules:
                self.modules[id(m)] = m
                for name, value in vars(m).items():
                    if is_user_attribute(name) and type(value) not in _ATOM_TYPES:
                        attributes.append(value)
        return attributes


def _elements(container: Any) -> list[Any]:
    """Return the elements of a container, or the values of a dict, unless it is long."""
    if not isinstance(container, (*CONTAINERS, tuple)) or len(container) > _MAX_SEARCHED_ENTRIES:
        return []
    return [*container.values()] if isinstance(container, dict) else [*container]

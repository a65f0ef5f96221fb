"""The names that Python code looks up, and the user's classes and modules in which it may look them up."""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revfx.containers import by_class


_LIBRARIES = frozenset(sys.stdlib_module_names - {"__main__"} | {"torch", "numpy", "revfx"})
# what runs when an object is made, changed, copied, printed or let go, not when it is read or called
_MAKING = frozenset(
    f"__{n}__"
    for n in (
        *("init", "new", "post_init", "init_subclass", "set_name", "class_getitem", "del", "repr", "str", "dir"),
        *("copy", "deepcopy", "replace", "reduce", "reduce_ex", "getstate", "setstate", "setattr", "delattr"),
    )
)
CACHED: Any = type(functools.cache(len))  # what `lru_cache` makes of a function
_CALLED = (types.FunctionType, staticmethod, classmethod, functools.partialmethod, CACHED)
_KNOWN = 4096  # pieces of code


@dataclass(frozen=True, slots=True)
class Mentions:
    """The names that code, and code inside it, has of globals, of modules that it imports, and of attributes; among
    these are texts that may be names, as `getattr` and `import_module` take them.
    """

    globals: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()
    attributes: frozenset[str] = frozenset()


_known: dict[int, tuple[types.CodeType, Mentions]] = {}  # by address: hashing code takes as long as reading it


def mentions(code: types.CodeType) -> Mentions:
    """What `code` mentions."""
    known = _known.get(id(code))
    if known is not None:
        return known[1]
    found = _read(code)
    if len(_known) >= _KNOWN:
        _known.clear()
    _known[id(code)] = code, found
    return found


def _read(code: types.CodeType) -> Mentions:
    named = {(_kind(i.opname), i.argval) for i in dis.get_instructions(code) if i.opcode in dis.hasname}
    texts = {c for c in code.co_consts if isinstance(c, str) and c.replace(".", "").isidentifier()}
    inner = [mentions(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    of_globals = {n for kind, n in named if kind == "global"}
    imports = {n for kind, n in named if kind == "import" and n}
    attributes = {n for kind, n in named if kind == "attribute"}
    if "globals" in of_globals:
        of_globals |= texts
    return Mentions(
        tuple(sorted(of_globals.union(*(m.globals for m in inner)))),
        tuple(sorted(imports.union(*(m.imports for m in inner)))),
        frozenset(attributes | texts).union(*(m.attributes for m in inner)),
    )


def _kind(operation: str) -> str:
    if operation == "IMPORT_NAME":
        return "import"
    return "global" if "GLOBAL" in operation or operation.endswith("_NAME") else "attribute"


def is_followed(item: Any) -> bool:
    """Whether a function, class or module is none of Python's own, torch's, NumPy's or revfx's."""
    return any(map(is_users_name, _modules_of(item)))


def is_users_name(module: str) -> bool:
    """Whether a module of that name is none of Python's own, torch's, NumPy's or revfx's."""
    return module.partition(".")[0] not in _LIBRARIES


def is_installed(item: Any) -> bool:
    """Whether a function, class or module lies in an installed package: nobody's to change."""
    return all(map(_lies_in_packages, _modules_of(item)))


def _modules_of(item: Any) -> tuple[str, ...]:
    """Where it was defined, "" where unknown; of a function, which decorators name after another, also its globals."""
    named = item.__name__ if isinstance(item, types.ModuleType) else getattr(item, "__module__", None)
    names = (item.__globals__.get("__name__"), named) if isinstance(item, types.FunctionType) else (named,)
    return tuple(n if isinstance(n, str) else "" for n in names)


@functools.lru_cache(maxsize=4096)
def _lies_in_packages(module: str) -> bool:
    file: str = getattr(sys.modules.get(module), "__file__", None) or ""
    return not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


@by_class
def classes(kind: type) -> tuple[type, ...]:
    """The user's classes in which attributes of a `kind`, and of what is of it, are looked up."""
    of_classes: type = type(kind)
    return tuple(c for c in (*kind.__mro__, *of_classes.__mro__) if is_followed(c))


@by_class
def unasked(kind: type) -> frozenset[str]:
    """The methods of a class that run though no code names them: `forward`, and operators."""
    named = [n for n, v in vars(kind).items() if isinstance(v, _CALLED)]
    return frozenset(n for n in named if n == "forward" or (n[:2] == n[-2:] == "__" and n not in _MAKING))


def misses(cached: Any) -> int:
    """How often a function that keeps its results was run."""
    return cached.cache_info().misses


def functions(item: Any) -> Iterator[types.FunctionType]:
    """The plain functions in a method, property or decorated function."""
    if isinstance(item, types.FunctionType):
        yield item
    elif isinstance(item, property):
        yield from (f for f in (item.fget, item.fset) if isinstance(f, types.FunctionType))
    elif isinstance(item, (functools.cached_property, functools.partialmethod)):
        yield from functions(vars(item)["func"])
    elif isinstance(item, CACHED):
        yield from functions(vars(item)["__wrapped__"])
    elif isinstance(item, (types.MethodType, staticmethod, classmethod)):
        yield from functions(item.__func__)

"""What Python code reads besides its arguments and its modules: globals, closure cells and class attributes.

Found statically, from the names in the byte code of the functions that were recorded and of those that they name; only
values that those names had when a plan was made can be compared later. Code of torch and of the standard library is not
looked into.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from revfx.containers import CONTAINERS, adopt, held_within, inside, is_plain, put_back, slots
from revfx.fingerprint import is_users, key
from revfx.mentions import CACHED, functions, is_followed, misses
from revfx.sources import StandIn, asks


_CODE = (types.FunctionType, types.MethodType, property, staticmethod, classmethod)


@dataclass
class Outside:
    """The places that some functions read: (table, name, class) of globals and class attributes, and cells of closures.

    `defaults` are their own default arguments, `names` all names in their code.
    """

    named: dict[tuple[int, str], tuple[Mapping[str, Any], str, type | None]] = field(default_factory=dict[Any, Any])
    cells: dict[int, types.CellType] = field(default_factory=dict[int, types.CellType])
    defaults: dict[int, Any] = field(default_factory=dict[int, Any])
    names: set[str] = field(default_factory=set[str])

    @staticmethod
    def of(modules: Iterable[nn.Module], forward: Any, given: Iterable[Any] = ()) -> Outside:
        """What `forward`, called with what is `given`, and methods and function attributes of `modules` may read."""
        found, seen = Outside(), set[int]()
        own, values = list(modules), list(given)
        shared = {id(c): c for module in own for c in _classes(module)}
        stack: list[Any] = [getattr(forward, "func", forward)]
        stack.extend(v for c in shared.values() for v in vars(c).values() if issubclass(type(v), _CODE))
        values.extend(v for module in own for k, v in vars(module).items() if is_users(k))
        values += _within(values)
        stack.extend(v for v in values if issubclass(type(v), _CODE))
        shared.update((id(c), c) for v in values for c in _classes(v))
        while stack:
            for function in functions(stack.pop()):
                if id(function) not in seen and is_followed(function):
                    seen.add(id(function))
                    stack.extend(found._add(function))
            if not stack:  # what one function names may be looked up in the class of what another one has at hand
                known = len(found.named)
                values = found._look_up(found.names, shared.values())
                stack.extend(v for v in values if issubclass(type(v), _CODE) and len(found.named) > known)
        return found

    def _add(self, function: types.FunctionType) -> list[Any]:
        """Further functions, after noting what `function` names."""
        names = set(_names(function.__code__))
        self.names |= names
        values = [self._note(function.__globals__, n) for n in names if n in function.__globals__]
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        self.defaults.update((id(v), v) for v in defaults if issubclass(type(v), CONTAINERS))
        for cell in function.__closure__ or ():
            self.cells[id(cell)] = cell
        values += [_content(cell) for cell in function.__closure__ or ()]
        spaces = _spaces((*values, *(sys.modules[n] for n in names if n in sys.modules)))  # it may import them
        looked_in = set[int]()
        while spaces:  # as in `package.module.function`
            looked_in.update(map(id, spaces))
            values += (inside := self._look_up(names, spaces))
            spaces = [s for s in _spaces(inside) if id(s) not in looked_in]
        return [v for v in (*values, *_within(values)) if issubclass(type(v), _CODE)]

    def _look_up(self, names: set[str], owners: Iterable[Any]) -> list[Any]:
        """The values that `names` have in some classes and modules."""
        return [self._note(vars(o), n, o) for o in owners for n in names & vars(o).keys()]

    def _note(self, table: Mapping[str, Any], name: str, owner: type | types.ModuleType | None = None) -> Any:
        kind = owner if isinstance(owner, type) else None
        self.named[id(table) if owner is None else _place(owner), name] = (table, name, kind)
        return table[name]

    def tables(self) -> list[dict[str, Any]]:
        """The values, as tables of attributes."""
        values = [*map(_content, self.cells.values()), *self.defaults.values()]
        return [{n: t.get(n)} for t, n, _ in self.named.values()] + [{"": v} for v in values]

    def state(self) -> tuple[Any, ...]:
        """A key that changes when one of the values does."""
        values = [*map(_content, self.cells.values()), *self.defaults.values()]
        return tuple([key(t.get(n)) for t, n, _ in self.named.values()] + [key(v) for v in values])

    def noted(self) -> Callable[[], None]:
        """A function that puts back the values, and what is now in the containers and plain objects among them; caches
        that were filled since are emptied.
        """
        values = [v for table in self.tables() for v in table.values()]
        containers, caches = held_within(values), [(v, misses(v)) for v in values if issubclass(type(v), CACHED)]
        named = [(t, n, kind, t.get(n, _ABSENT)) for t, n, kind in self.named.values()]
        cells = [(c, _content(c)) for c in self.cells.values()]
        imported = len(sys.modules)

        def back() -> None:
            if len(sys.modules) != imported:  # what an import added is not added a second time
                for container, then in containers:
                    adopt(container, then)
                named[:] = [n for n in named if n[-1] is not _ABSENT]
            put_back(containers)
            for cached, before in caches:  # what filled one is not put back alone: it may have set up more
                if misses(cached) != before:
                    cached.cache_clear()
            for table, name, kind, value in named:
                if table.get(name, _ABSENT) is not value:
                    _set(table, name, kind, value)
            for cell, value in cells:
                if _content(cell) is not value:
                    cell.cell_contents = value

        return back

    def replace_sources(self) -> None:
        """None; where iterators and the like were, there is from now on what raises when it is asked."""
        for table, name, kind in self.named.values():
            if asks(table.get(name)):
                _set(table, name, kind, StandIn(table[name]))
        for cell in self.cells.values():
            if asks(_content(cell)):
                cell.cell_contents = StandIn(cell.cell_contents)
        for item in (v for table in self.tables() for v in table.values() if is_plain(v)):
            vars(item).update({k: StandIn(v) for k, v in vars(item).items() if asks(v)})


_ABSENT = object()


def _set(table: Any, name: str, kind: type | None, value: Any) -> None:
    if kind is None:
        table[name] = value
    else:
        setattr(kind, name, value)


def _place(owner: Any) -> int:
    return id(owner if isinstance(owner, type) else vars(owner))  # a class's table is made anew


def _spaces(values: Iterable[Any]) -> list[Any]:
    """The user's modules and classes among `values`, and the classes of objects."""
    modules = [v for v in values if issubclass(type(v), types.ModuleType) and is_followed(v)]
    return [*modules, *(c for v in values for c in _classes(v))]


def _within(values: Iterable[Any]) -> list[Any]:
    """What the values hold, and what that holds: functions are kept in tables, and methods know their objects."""
    found, level = list[Any](), list(values)
    for _ in range(3):
        found += (level := [x for v in level for x in inside(v)])
    return found


def _classes(value: Any) -> list[type]:
    """The user's classes in which attributes of `value` are looked up that are not its own."""
    if not issubclass(type(value), (type, nn.Module)) and not is_plain(value) and not slots(type(value)):
        return []
    kind = value if issubclass(type(value), type) else type(value)
    return [c for c in kind.__mro__ if is_followed(c)]


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None

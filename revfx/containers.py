"""What lists, dicts, sets, deques, variables of closures and objects hold, noted and put back."""

from __future__ import annotations

import contextlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from types import CellType
from typing import Any


DEPTH = 8  # how far containers and objects are followed
CONTAINERS = (list, dict, set, deque)
Held = list[tuple[Any, list[Any]]]  # containers, each with what was in it


def is_container(value: object) -> bool:
    """Whether something else may be put into `value`."""
    return isinstance(value, (*CONTAINERS, CellType))


def content(container: Any) -> list[Any]:
    """What a list or a set holds, or a dict as pairs; a cell holds one thing, or none."""
    if type(container) is dict:
        return list(container.items())
    if isinstance(container, CellType):
        with contextlib.suppress(ValueError):
            return [container.cell_contents]
        return []
    kind = kind_of(container)
    inside = list(kind.__iter__(container))
    return [(k, dict.__getitem__(container, k)) for k in inside] if issubclass(kind, dict) else inside


def held_within(values: Iterable[Any], is_object: Callable[[Any], bool]) -> Held:
    """The lists, dicts and sets among `values` and in each other, and the attributes of what is an object."""
    found: dict[int, tuple[Any, list[Any]]] = {}
    level = list(values)
    for _ in range(DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, (tuple, frozenset)):
                inner.extend(value)
                continue
            table = vars(value) if is_object(value) else value
            if is_container(table) and id(table) not in found:
                found[id(table)] = table, content(table)
                inner.extend(_flat(found[id(table)][1]))
        level = inner
    return list(found.values())


def differ(containers: Held, equal: Callable[[Any, Any], bool] = lambda a, b: False) -> bool:
    """Whether one of the containers holds something else than it held: another object, and not one that is `equal`."""
    for container, then in containers:
        now, before = _flat(content(container)), _flat(then)
        if len(now) != len(before) or not all(a is b or equal(a, b) for a, b in zip(now, before, strict=True)):
            return True
    return False


def put_back(containers: Held) -> None:
    """None; each container holds again what it held."""
    for container, then in containers:
        if not differ([(container, then)]):
            continue
        kind = kind_of(container)
        if kind is CellType:
            _fill(container, then)
        else:
            kind.clear(container)
            if issubclass(kind, dict):
                for k, v in then:
                    kind.__setitem__(container, k, v)
            else:
                (set.update if kind is set else kind.extend)(container, then)


def _fill(cell: CellType, then: list[Any]) -> None:
    if then:
        cell.cell_contents = then[0]
    else:
        del cell.cell_contents


def kind_of(container: Any) -> Any:
    """The built-in class of a container: a subclass may make something else of a look-up (a new object each time)."""
    return next(kind for kind in (OrderedDict, *CONTAINERS, CellType) if isinstance(container, kind))


def _flat(items: list[Any]) -> list[Any]:
    """The items, those of dicts as keys and values."""
    return [x for item in items for x in (item if type(item) is tuple else (item,))]

"""The attributes of modules, and the containers in them, before a forward; they are restored afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import is_
from typing import Any

from torch import Tensor, nn

from revfx import _torch
from revfx.world.values import ATOMS, CONTAINERS, is_plain, is_user_attribute


MAX_NOTED_ENTRIES = 10_000  # a longer container is data, which a forward does not change
NESTING = 4  # levels of containers in each other


class Snapshot:
    """The attribute tables of some modules, with the containers in them, and their content."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.tables: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        values = list[Any]()
        for module in modules:
            self.tables += [(table, dict(table)) for table in _tables(module)]
            values += [value for name, value in vars(module).items() if is_user_attribute(name)]
        self.containers: list[tuple[Any, tuple[Any, ...]]] = _find_containers(values)

    def restore(self) -> None:
        """Restore every table, and the containers in them."""
        for container, items in self.containers:
            _restore_container(container, items)
        for table, content in self.tables:
            if table.keys() != content.keys() or not all(map(is_, table.values(), content.values())):
                table.clear()
                table.update(content)


def _tables(module: nn.Module) -> tuple[dict[Any, Any], ...]:
    own = vars(module), _torch.parameters(module), _torch.buffers(module), _torch.children(module)
    return *own, *_torch.hook_tables(module)


def _find_containers(values: Iterable[Any]) -> list[tuple[Any, tuple[Any, ...]]]:
    """Find containers, and attribute tables of plain objects, among `values` and in each other, with their items."""
    found: dict[int, tuple[Any, tuple[Any, ...]]] = {}
    level = [*values]
    for _ in range(NESTING):
        inner = list[Any]()
        for value in level:
            if isinstance(value, tuple):
                inner += value
            container = value
            if not isinstance(value, CONTAINERS) and is_plain(value):
                container = vars(value)
            if not isinstance(container, CONTAINERS) or len(container) > MAX_NOTED_ENTRIES or id(container) in found:
                continue
            found[id(container)] = container, _items(container)
            for item in _items(container):
                inner += item if type(item) is tuple else (item,)
        level = [x for x in inner if not isinstance(x, (*ATOMS, Tensor))]
    return [*found.values()]


def _items(container: Any) -> tuple[Any, ...]:
    """Return the elements of a container; of a dict, its pairs."""
    return tuple(container.items() if isinstance(container, dict) else container)


def _restore_container(container: Any, items: tuple[Any, ...]) -> None:
    """Restore the elements of a container if they have changed."""
    current = _items(container)
    if len(current) == len(items) and all(map(_is_same, current, items)):
        return
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(items)
    else:
        container.extend(items)


def _is_same(current: Any, item: Any) -> bool:
    is_pair = type(item) is tuple and type(current) is tuple and len(current) == len(item)  # of a dict
    return current is item or (is_pair and all(map(is_, current, item)))

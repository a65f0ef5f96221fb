"""The content of modules before a forward, which is restored afterwards."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from operator import is_
from typing import Any

from torch import Tensor, nn

from revfx import _torch
from revfx.world.reach import CONTAINERS, is_users
from revfx.world.values import ATOMS, DEPTH, is_plain


LONG = 10_000  # entries of a container that is data, and not noted


# --- modules, and the arguments of a forward
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

    def restore(self) -> None:
        """Restore every table, and the containers in them."""
        for container, then in (pair for *_, held in self.held for pair in held):
            fill(container, then)
        for _, table, then in self._touched():
            table.clear()
            table.update(then)

    def _touched(self) -> Generator[tuple[int, dict[Any, Any], dict[Any, Any]]]:
        for i, table, then in self.tables:
            if table.keys() != then.keys() or not all(map(is_, table.values(), then.values())):
                yield i, table, then


def _tables(module: nn.Module) -> tuple[dict[Any, Any], ...]:
    own = vars(module), _torch.parameters(module), _torch.buffers(module), _torch.children(module)
    return *own, *_torch.hook_tables(module)


def content(container: Any) -> tuple[Any, ...]:
    """Return the content of a container: the pairs of a dict."""
    return tuple(container.items() if isinstance(container, dict) else container)


def holds(container: Any, then: tuple[Any, ...]) -> bool:
    """Return whether a container holds the objects that it held."""
    now = content(container)
    return len(now) == len(then) and all(map(_same, now, then))


def fill(container: Any, then: tuple[Any, ...]) -> None:
    """Restore the content of a container."""
    if not holds(container, then):
        container.clear()
        (container.update if isinstance(container, (dict, set)) else container.extend)(then)


def _same(now: Any, then: Any) -> bool:
    pair = type(then) is tuple and type(now) is tuple and len(now) == len(then)  # of a dict
    return now is then or (pair and all(map(is_, now, then)))

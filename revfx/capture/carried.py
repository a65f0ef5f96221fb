"""Objects that a forward makes and returns, such as a cache of keys and values: made anew around a run's tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from torch import Tensor

from revfx.capture.effects import lasts
from revfx.capture.guards import is_plain
from revfx.capture.untraceable import Untraceable


Maker = Callable[[Sequence[Tensor]], Any]


@dataclass(frozen=True, slots=True)
class Carried:
    """An object as a forward returned it: `made` gives one like it of other tensors; `tensors` stand for its own."""

    made: Maker
    tensors: tuple[Any, ...]


def carried(value: Any, stands_for: Callable[[Tensor], Any], known: Container[int]) -> Carried:
    """Return what `value` is like, as code made it; objects whose address is `known` are not made anew.

    Raises:
        Untraceable: it holds something of which nothing is known.
    """
    tensors: list[Any] = []

    def maker(x: Any) -> Maker:
        if isinstance(x, Tensor):
            tensors.append(stands_for(x))
            return itemgetter(len(tensors) - 1)
        kind: Any = type(x)
        if isinstance(x, (list, tuple, set, deque)):
            items = [maker(v) for v in x]
            if hasattr(kind, "_fields"):
                return lambda given: kind(*[m(given) for m in items])
            return lambda given: kind([m(given) for m in items])
        if isinstance(x, dict):
            values = {k: maker(v) for k, v in x.items()}
            return lambda given: kind({k: m(given) for k, m in values.items()})
        if lasts(x, known):
            return lambda _: x
        if is_plain(x):
            held = {k: maker(v) for k, v in vars(x).items()}
            return lambda given: _object(kind, {k: m(given) for k, m in held.items()})
        raise Untraceable(f"it returns a {kind.__name__}, which is not a tensor or a container of tensors")

    return Carried(maker(value), tuple(tensors))


def _object(kind: Any, table: dict[str, Any]) -> Any:
    made = object.__new__(kind)
    vars(made).update(table)
    return made

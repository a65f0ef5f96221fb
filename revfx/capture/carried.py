"""Objects that a forward makes and returns, such as a cache of keys and values: made anew around a run's tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from revfx.capture.effects import lasts
from revfx.capture.guards import is_plain
from revfx.capture.untraceable import Untraceable


@dataclass(frozen=True, slots=True)
class _Object:
    """An object of a class with these attributes, or a container with these items; for a tensor, which one it is."""

    kind: Any
    held: Any


@dataclass(frozen=True, slots=True)
class Carried:
    """An object as a recorded forward returned it, with what stands for its `tensors`."""

    shape: Any
    tensors: tuple[Any, ...]

    def made(self, tensors: Sequence[Tensor]) -> Any:
        """Return a new object of its kind that holds other tensors."""
        return _made(self.shape, tensors)


def carried(value: Any, stands_for: Callable[[Tensor], Any], known: Container[int]) -> Carried:
    """Return what `value` is like, as code made it; objects whose address is `known` are not made anew.

    Raises:
        Untraceable: it holds something of which nothing is known, or leads to itself.
    """
    tensors: list[Any] = []

    def shape(x: Any, above: tuple[int, ...]) -> Any:
        if isinstance(x, Tensor):
            tensors.append(stands_for(x))
            return _Object(Tensor, len(tensors) - 1)
        if id(x) in above:
            raise Untraceable(f"it returns a {type(x).__name__} that leads to itself")
        above = (*above, id(x))
        if isinstance(x, dict):
            return _Object(type(x), {k: shape(v, above) for k, v in x.items()})
        if isinstance(x, (list, tuple, set, deque)):
            return _Object(type(x), [shape(v, above) for v in x])
        if lasts(x, known):
            return x
        if is_plain(x):
            return _Object(type(x), {k: shape(v, above) for k, v in vars(x).items()})
        raise Untraceable(f"it returns a {type(x).__name__}, which is not a tensor or a container of tensors")

    return Carried(shape(value, ()), tuple(tensors))


def _made(shape: Any, tensors: Sequence[Tensor]) -> Any:
    if not isinstance(shape, _Object):
        return shape
    kind: Any = shape.kind
    if kind is Tensor:
        return tensors[shape.held]
    if isinstance(shape.held, list):
        items = [_made(x, tensors) for x in shape.held]
        return kind(*items) if hasattr(kind, "_fields") else kind(items)
    held = {k: _made(v, tensors) for k, v in shape.held.items()}
    if issubclass(kind, dict):
        return kind(held)
    made = object.__new__(kind)
    vars(made).update(held)
    return made

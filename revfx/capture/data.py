"""What a recording gives: a graph, and where its inputs and results belong."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from torch import Tensor, fx, nn
from torch.distributions import Distribution, Transform
from torch.utils import _pytree as pytree

from revfx import _torch
from revfx.capture.effects import lasts
from revfx.capture.guards import DEPTH, AttributeReads, is_plain
from revfx.capture.untraceable import Untraceable
from revfx.eager.reach import is_users


Spot = tuple[str, str]  # where a tensor hangs: the path of a module, and a name, such as `prior.loc` or `flow[0].scale`
MANY = 1000  # items of a container, or objects of one module, that are not looked through for tensors


@dataclass(frozen=True)
class Capture:
    """A recorded forward: the graph, where its inputs come from, and how its result is put together.

    `inputs` are positions among the flattened arguments; `outputs` holds nodes, or `Carried` for what is no tensor, and
    `spec` their structure. `attributes` says where each get_attr node's tensor hangs: (module path, name). `tied` are
    pairs of such places that held one tensor, which the graph reads from the first of them only. `sets` are attributes
    that the forward sets to the last of the `outputs`. `reads` are those that the code read, `written` those that
    modules called whole set.
    """

    graph: fx.Graph
    inputs: tuple[int, ...]
    outputs: tuple[Any, ...]
    spec: pytree.TreeSpec
    attributes: dict[fx.Node, Spot]
    tied: tuple[tuple[Spot, Spot], ...]
    sets: tuple[Spot, ...]
    written: frozenset[tuple[type, str]]
    reads: AttributeReads

    @property
    def leaves(self) -> tuple[Any, ...]:
        """The outputs that the forward returns."""
        return self.outputs[: self.spec.num_leaves]


def where_held(root: nn.Module) -> tuple[dict[int, tuple[Tensor, str, str]], list[tuple[Spot, Spot]]]:
    """Return the tensors of a model's modules, and of plain objects and containers that these hold, by address, with
    the first place where each hangs; and the pairs of places that hold the same one.
    """
    found: dict[int, tuple[Tensor, str, str]] = {}
    tied: list[tuple[Spot, Spot]] = []
    for path, name, t in _places([*root.named_modules(remove_duplicate=True)]):
        first = found.setdefault(id(t), (t, path, name))[1:]
        tied += [((path, name), first)] if first != (path, name) else []
    return found, tied


def _places(modules: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, str, Tensor]]:
    """Yield where tensors hang: those of modules themselves first."""
    for path, module in modules:
        own = {k: v for k, v in vars(module).items() if isinstance(v, Tensor)}
        tables = {**_torch.parameters(module), **_torch.buffers(module), **own}
        yield from ((path, name, t) for name, t in tables.items() if t is not None)
    for path, module in modules:
        seen = set[int]()
        held = [(k, v) for k, v in vars(module).items() if is_users(k) and not isinstance(v, Tensor)]
        yield from ((path, name, t) for k, v in held for name, t in _held_in(v, k, seen))


def _held_in(value: Any, name: str, seen: set[int], depth: int = DEPTH) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that an attribute holds, with the name to find each by."""
    if isinstance(value, Tensor):
        yield name, value
    elif depth and id(value) not in seen and len(seen) < MANY:
        parts: dict[str, Any] = {}
        if isinstance(value, (list, tuple)) and len(value) < MANY:
            parts = {f"{name}[{i}]": v for i, v in enumerate(value)}
        elif isinstance(value, dict) and len(value) < MANY:
            parts = {f"{name}['{k}']": v for k, v in value.items() if isinstance(k, str) and "'" not in k}
        elif is_plain(value) or isinstance(value, (Distribution, Transform)):
            parts = {f"{name}.{k}": v for k, v in vars(value).items()}
        seen.update([id(value)] if parts else [])
        for k, v in parts.items():
            yield from _held_in(v, k, seen, depth - 1)


def steps_to(name: str) -> tuple[tuple[str, Any], ...]:
    """Return the attributes and the items that lead to what hangs under such a name."""
    found: list[tuple[str, str, str]] = re.findall(r"\.?([^.\[\]]+)|\[(\d+)\]|\['([^']*)'\]", name)
    return tuple((attribute, int(index) if index else key) for attribute, index, key in found)


def held_at(owner: Any, steps: Iterable[tuple[str, Any]]) -> Any:
    """Return what they lead to; None where that is nothing."""
    try:
        for attribute, item in steps:
            owner = getattr(owner, attribute) if attribute else owner[item]
    except (AttributeError, LookupError, TypeError):
        return None
    return owner


# --- objects that a forward makes and returns, such as a cache of keys and values: made anew around a run's tensors
Maker = Callable[[Sequence[Tensor]], Any]


@dataclass(frozen=True, slots=True)
class Carried:
    """An object as a forward returned it: `made` gives one like it of other tensors; `tensors` stand for its own."""

    made: Maker
    tensors: tuple[Any, ...]


def carried(value: Any, stands_for: Callable[[Tensor], Any], known: Container[int]) -> Carried:
    """Return what `value` is like, as code made it; Untraceable where nothing is known of something that it holds.
    Objects whose address is `known` are not made anew.
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

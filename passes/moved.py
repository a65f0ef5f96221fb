"""Where the elements of a value lie again, moved there by operations whose inverses are exact.

What a rounding inverse gives back of a part, or of a copy in another layout, is in the whole that is put together from
it, and so in all that is computed of the whole again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import Any, TypeVar

from torch import Tensor, fx, nn

from revfx.passes.sizes import no_new_guards
from revfx.rules import Direction, Inverse, NoInverse, Tile, arguments, op_name, rule_for


_Told = TypeVar("_Told", bound=tuple[int, object])
Place = tuple[int, range]  # a dimension, and a range of indices along it


@dataclass(frozen=True, slots=True)
class Moved:
    """Elements of `whole` are in `to`, since `via` reads it: those at `taken`, there at `put`, if these are known."""

    whole: fx.Node
    to: fx.Node
    via: fx.Node
    taken: Place | None = None
    put: Place | None = None


def directions_of(node: fx.Node, module: nn.Module | None = None) -> list[Direction]:
    """Return what the rule of a node, which calls `module`, yields; nothing where a size is not fixed."""
    if "directions" in node.meta:
        return list(node.meta["directions"])
    rule = rule_for(node, module)
    if rule is None or node.meta.get("barrier") is not None:
        return []
    with no_new_guards(node):
        return list(rule(node))
    return []


def taken_apart(node: fx.Node) -> fx.Node | None:
    """Return the node whose tuple, list or dict this one takes a part of; None where it does something else."""
    source = node.args[0] if node.target is operator.getitem else None
    return source if isinstance(source, fx.Node) and not isinstance(source.meta.get("val"), Tensor) else None


def moved(graph: fx.Graph, directions: Callable[[fx.Node], Iterable[Direction]]) -> list[Moved]:
    """Return each single move of elements of a value of the graph to where they lie again, in its order."""
    found: list[Moved] = []
    for node in graph.nodes:
        parts = joined(node)
        for d in directions(node) if "val" in node.meta else ():
            whole = _whole(d)
            if isinstance(whole, fx.Node):
                places = [(dim, place) for part, dim, place in parts if part is whole]
                put, taken = places[0] if len(places) == 1 else None, (d.dim, d.index) if isinstance(d, Tile) else None
                found += [Moved(whole, to, node, taken, put) for to in _results(node, d)]
    return found


def elsewhere(
    moves: Iterable[Moved], told: Mapping[Hashable, Mapping[Hashable, _Told]]
) -> Iterator[tuple[fx.Node, _Told]]:
    """Yield what is `told` of values, by value and reader, of the nodes that hold the same elements after one or more
    moves.

    A reader that is itself a move says nothing of what it makes, nor of elements that it doesn't take.
    """
    takes = dict[tuple[Hashable, Hashable], list[Place | None]]()
    for m in moves:
        takes.setdefault((m.whole, m.via), []).append(m.taken)
    above = dict[fx.Node, dict[Place | None, _Told]]()
    for m in moves:
        read = (
            (t, place)
            for reader, t in told.get(m.whole, {}).items() if reader is not m.via
            for place in takes.get((m.whole, reader), [None])
        )  # fmt: skip
        passed = ((t, place) for place, t in above.get(m.whole, {}).items())
        met = [t for t, place in chain(read, passed) if _meet(place, m.taken)]
        if met:
            there, least = above.setdefault(m.to, {}), min(met, key=itemgetter(0))
            there[m.put] = min(there.get(m.put, least), least, key=itemgetter(0))
    yield from ((node, t) for node, there in above.items() for t in there.values())


def joined(node: fx.Node) -> list[tuple[fx.Node, int, range]]:
    """Return the operands that a node puts one behind another: each with the dimension, and where it lies along it."""
    if op_name(node.target) not in ("cat", "concat", "concatenate"):
        return []
    parts, dim, axis = arguments(node, "tensors", dim=0, axis=None)
    whole = node.meta.get("val")
    if not isinstance(whole, Tensor) or not all(isinstance(p, fx.Node) for p in parts):
        return []
    dim = (dim if axis is None else axis) % whole.dim()
    at, found = 0, list[tuple[fx.Node, int, range]]()
    for p in parts:
        size = p.meta["val"].shape[dim] if p.meta["val"].dim() == whole.dim() else 0
        if not isinstance(size, int):
            return []
        found.append((p, dim, range(at, at + size)))
        at += size
    return found


def _whole(direction: Direction) -> Any:
    """Return what an exact inverse gives, or what a part is taken of."""
    if isinstance(direction, Inverse):
        return direction.solves if direction.exact else None
    return None if isinstance(direction, NoInverse) else direction.whole


def _results(node: fx.Node, direction: Direction) -> Iterable[fx.Node]:
    """Return the nodes that hold what a direction of a node is about."""
    if isinstance(node.meta.get("val"), Tensor):
        return [node]
    part = direction.part if isinstance(direction, Tile) else None
    taken = (n for n in node.users if n.target is operator.getitem and n.args[0] is node)
    return [n for n in taken if part is None or n.args[1] == part]


def _meet(a: Place | None, b: Place | None) -> bool:
    """Return whether two parts of a value may have elements in common."""
    return a is None or b is None or a[0] != b[0] or any(i in b[1] for i in a[1])

"""Where the elements of a value lie again, moved there by operations whose inverses are exact.

What a rounding inverse gives back of a part, or of a copy in another layout, is in the whole that is put together from
it, and so in all that is computed of the whole again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from revfx.passes.sizes import no_new_guards
from revfx.rules import Direction, Inverse, NoInverse, Tile, arguments, op_name, rule_for


@dataclass(frozen=True, slots=True)
class Moved:
    """Elements of a value are in `to`, since `via` reads it: those of a tile, in such a place, if these are known."""

    to: fx.Node
    via: fx.Node
    tile: Tile | None = None
    place: tuple[int, range] | None = None


MOST = 64  # further moves that are followed from one, as in a deep flow every layer is a move of all before it
Moves = Mapping[Hashable, Sequence[Moved]]


def directions_of(node: fx.Node, module: nn.Module | None = None) -> list[Direction]:
    """What a node's rule yields; nothing where that depends on a size that is not fixed. `module`: what it calls."""
    if "directions" in node.meta:
        return list(node.meta["directions"])
    rule = rule_for(node, module)
    if rule is None or node.meta.get("barrier") is not None:
        return []
    with no_new_guards(node):
        return list(rule(node))
    return []


def moved(graph: fx.Graph, directions: Callable[[fx.Node], Iterable[Direction]]) -> Moves:
    """For each value of a graph where elements of it lie again, also after several moves."""
    found: dict[Hashable, list[Moved]] = {}
    for node in reversed(graph.nodes):
        parts = joined(node)
        for d in directions(node) if "val" in node.meta else ():
            whole = _whole(d)
            if not isinstance(whole, fx.Node):
                continue
            places = [(dim, place) for part, dim, place in parts if part is whole]
            place = places[0] if len(places) == 1 else None
            for to in _results(node, d):
                first = Moved(to, node, d if isinstance(d, Tile) else None, place)
                further = [m for m in found.get(to, ())[:MOST] if _meet(place, _range(m.tile))]
                found.setdefault(whole, []).extend([first, *(replace(first, to=m.to, place=None) for m in further)])
    return found


def elsewhere(moves: Moves, value: Hashable, reader: Hashable) -> Iterable[fx.Node]:
    """The nodes that hold elements of `value` which `reader` reads, but for what that makes of them itself."""
    own = [m.tile for m in moves.get(value, ()) if m.via is reader]
    for m in moves.get(value, ()):
        if m.via is not reader and (not own or any(_meet(_range(m.tile), _range(tile)) for tile in own)):
            yield m.to


def joined(node: fx.Node) -> list[tuple[fx.Node, int, range]]:
    """The operands that a node puts one behind another: each with the dimension, and where it lies along it."""
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
    """What an exact inverse gives, or what a part is taken of."""
    if isinstance(direction, Inverse):
        return direction.solves if direction.exact else None
    return None if isinstance(direction, NoInverse) else direction.whole


def _results(node: fx.Node, direction: Direction) -> Iterable[fx.Node]:
    """The nodes that hold what a direction of a node is about."""
    if isinstance(node.meta.get("val"), Tensor):
        return [node]
    part = direction.part if isinstance(direction, Tile) else None
    taken = (n for n in node.users if n.target is operator.getitem and n.args[0] is node)
    return [n for n in taken if part is None or n.args[1] == part]


def _range(tile: Tile | None) -> tuple[int, range] | None:
    return None if tile is None else (tile.dim, tile.index)


def _meet(a: tuple[int, range] | None, b: tuple[int, range] | None) -> bool:
    """Whether two parts of a value may have elements in common."""
    return a is None or b is None or a[0] != b[0] or not set(a[1]).isdisjoint(b[1])

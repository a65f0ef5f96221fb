"""Arcs through `where`: what is known of a value under one half of a mask, and how halves make wholes.

`y = where(m, a, b)` holds a where m is set and b elsewhere. With y in the place of b, an elementwise inverse of b's
making gives its operand right on b's half: for `y = where(m, x, x*e + t)` that is `x = (y - t)/e` off the mask, and
y itself on it, so `x <- where(m, y, (y - t)/e)`. This is how masked couplings (Dinh et al., "Density estimation using
Real NVP", ICLR 2017, https://arxiv.org/abs/1605.08803) invert.

Arithmetic with a mask of zeros and ones says the same: `b*x` is x where b is set and 0 elsewhere, and a sum is one of
its addends where the other one is zero; so `y = b*x + (1-b)*(x*e + t)` is a `where`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from revfx.passes.facts import BINARY, Mask, Masks, bare, masks
from revfx.passes.program import Arc
from revfx.passes.sizes import same_shape
from revfx.rules import Direction, Inverse, Masked


DEPTH = 4  # elementwise operations followed upwards from one operand of a `where`


@dataclass(frozen=True)
class Half:
    """`solve(*tail)` is right for some value wherever the mask is `value`; `at` is the first operation it involves."""

    at: int
    value: bool
    tail: tuple[fx.Node, ...]
    solve: Callable[..., Tensor]
    rounding: Arc | None

    @property
    def factor(self) -> float | int | None:
        """The factor that `solve` divides by."""
        return None if self.rounding is None else self.rounding.factor


ArcOf = Callable[[fx.Node, Inverse], Arc | str]
DirectionsOf = Callable[[fx.Node], list[Direction]]


def masked_arcs(
    op_nodes: Sequence[fx.Node],
    index: Mapping[fx.Node, int],
    trusted: Callable[[Arc, fx.Node], Arc],
    arc_of: ArcOf,
    directions_of: DirectionsOf,
) -> Iterator[tuple[int, tuple[Arc, ...]]]:
    """Yield arcs whose tail holds parts of their head under a mask, each with the first operation that it involves.

    `trusted` gives an arc that rounds with what is known against it for the sake of its head.
    """
    position = {node: i for i, node in enumerate(op_nodes)}
    known_masks = masks(op_nodes[0].graph) if op_nodes else Masks({}, {})
    selects = {
        node: found
        for node in op_nodes
        if (found := [m for m in _masked(node, directions_of, known_masks) if m.mask in index])
    }
    halves: dict[tuple[fx.Node, fx.Node], list[Half]] = {}
    for y, sides in selects.items():
        for m in sides:
            known = Half(position[y], m.value, (y,), _itself, None)
            _spread(m.whole, m.mask, known, DEPTH, selects, position, arc_of, directions_of, halves)
    for (whole, mask), found in halves.items():
        if whole.op != "get_attr":
            for inside in (h for h in found if h.value):
                for outside in (h for h in found if not h.value and (h.factor is None or inside.factor is None)):
                    yield _join(index, whole, mask, inside, outside, trusted)
    for y, sides in selects.items():
        for m in (m for m in sides if m.other is not UNSAID):
            for half in halves.get((m.whole, m.mask), []):
                if half.value == m.value and half.tail[0] is not y and m.whole.meta["val"].dtype == y.meta["val"].dtype:
                    yield _refill(index, y, m, half, position[y])


UNSAID = object()  # the rest of a sum that is not simply its other addend


def _masked(node: fx.Node, directions_of: DirectionsOf, known: Masks) -> Iterator[Masked]:
    """Yield what a node holds under masks: as its rule says, and as products and sums with masks of 0 and 1 say."""
    for m in directions_of(node):
        if isinstance(m, Masked) and isinstance(m.mask, fx.Node):
            mask = known.of.get(m.mask, Mask(m.mask, True))
            yield Masked(m.whole, mask.root, m.value == mask.value, m.other)
    name = bare(node)
    if name not in (*PRODUCTS, *SUMS) or len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1:
        return
    a, b = node.args
    for x, other in ((a, b), (b, a)):
        if not isinstance(x, fx.Node) or not isinstance(other, fx.Node) or x is other:
            continue
        if name in PRODUCTS and other in known.of:
            yield Masked(x, known.of[other].root, known.of[other].value, 0.0)
        elif name in SUMS and (name == "add" or x is a):
            for root, value in known.zero.get(other, ()):
                yield Masked(x, root, value, UNSAID)


PRODUCTS, SUMS = ("mul", "multiply"), ("add", "sub", "subtract")


def _spread(
    whole: Any,
    mask: fx.Node,
    known: Half,
    depth: int,
    selects: Mapping[fx.Node, list[Masked]],
    position: Mapping[fx.Node, int],
    arc_of: ArcOf,
    directions_of: DirectionsOf,
    halves: dict[tuple[fx.Node, fx.Node], list[Half]],
) -> None:
    """Note what is known of half of `whole`, and of what it was made from by elementwise operations or the same
    mask.
    """
    y = known.tail[0]
    if not isinstance(whole, fx.Node) or not _alike(whole, y):
        return
    halves.setdefault((whole, mask), []).append(known)
    for m in selects.get(whole, []):
        if m.mask is mask and m.value == known.value:
            earlier = replace(known, at=min(known.at, position[whole]))
            _spread(m.whole, mask, earlier, depth, selects, position, arc_of, directions_of, halves)
    for inverse in directions_of(whole) if whole in position and depth else ():
        if not isinstance(inverse, Inverse) or not _elementwise(inverse, whole):
            continue
        arc = arc_of(whole, inverse)
        if isinstance(arc, str) or (arc.factor is not None and known.factor is not None):
            continue
        given = tuple(g for g in inverse.given if isinstance(g, fx.Node))
        more = Half(
            min(known.at, position[whole]),
            known.value,
            (*known.tail, *given),
            functools.partial(_chain, known.solve, len(known.tail), arc.solve),
            _with_more(arc, known.rounding),
        )
        _spread(inverse.solves, mask, more, depth - 1, selects, position, arc_of, directions_of, halves)


def _with_more(arc: Arc, then: Arc | None) -> Arc:
    """Return what is to be said of two inverses in a row, at most one of which divides."""
    said = arc if arc.factor is not None or then is None else then
    return replace(said, huge=arc.huge or (then is not None and then.huge))


def _elementwise(inverse: Inverse, node: fx.Node) -> bool:
    """Return whether the inverse works on each element alone: all that rounds does; of the exact ones only a sign."""
    return isinstance(inverse.solves, fx.Node) and (not inverse.exact or node.target in ("neg", torch.neg))


def _alike(whole: fx.Node, node: fx.Node) -> bool:
    a, y = whole.meta.get("val"), node.meta["val"]
    return isinstance(a, Tensor) and a.dtype == y.dtype and same_shape(a, y)


def _join(
    index: Mapping[fx.Node, int],
    whole: fx.Node,
    mask: fx.Node,
    inside: Half,
    outside: Half,
    trusted: Callable[[Arc, fx.Node], Arc],
) -> tuple[int, tuple[Arc, ...]]:
    tail = (*inside.tail, *outside.tail, mask)
    solve = functools.partial(_where, inside.solve, len(inside.tail), outside.solve)
    rounding = inside.rounding or outside.rounding
    if outside.factor is not None:  # at most one of them divides
        rounding = outside.rounding
    values = tuple(index[n] for n in tail)
    huge = any(half.rounding.huge for half in (inside, outside) if half.rounding is not None)
    made = Arc(
        index[whole], values, solve, exact=rounding is None, text=_text(whole, tail), partial=True, huge=huge,
        assumes=_binary(index, mask),
    )  # fmt: skip
    if rounding is not None:
        made = replace(
            trusted(made, whole),
            factor=rounding.factor,
            measured=rounding.measured,
            reciprocal=rounding.reciprocal,
            least=rounding.least,
            typical=rounding.typical,
        )
    return min(inside.at, outside.at), (made,)


def _binary(index: Mapping[fx.Node, int], mask: fx.Node) -> tuple[int, str] | None:
    """Return what an arc through a mask relies on: that its values are zeros and ones."""
    return None if mask.meta["val"].dtype == torch.bool else (index[mask], BINARY)


def _refill(index: Mapping[fx.Node, int], y: fx.Node, m: Masked, half: Half, at: int) -> tuple[int, tuple[Arc, ...]]:
    fill = (m.other,) if isinstance(m.other, fx.Node) else ()
    tail = (*half.tail, m.mask, *fill)
    solve = functools.partial(_fill, half.solve, len(half.tail), m.value, None if fill else m.other)
    exact = half.rounding is None
    barred = None if exact else "it is filled by a constant, which a rounding inverse leaves alone, but may hold zeros"
    values, assumes = tuple(index[n] for n in tail), _binary(index, m.mask)
    arc = Arc(index[y], values, solve, exact, barred, text=_text(y, tail), partial=True, assumes=assumes)
    return min(at, half.at), (arc,)


def _text(head: fx.Node, tail: Sequence[fx.Node]) -> str:
    return f"{head.name} <- {', '.join(n.name for n in tail)}  (where)"


def _itself(y: Tensor) -> Tensor:
    return y


def _chain(first: Callable[..., Tensor], n: int, then: Callable[..., Tensor], *tail: Tensor) -> Tensor:
    return then(first(*tail[:n]), *tail[n:])


def _where(inside: Callable[..., Tensor], n: int, outside: Callable[..., Tensor], *tail: Tensor) -> Tensor:
    *values, mask = tail
    return torch.where(_set(mask), inside(*values[:n]), outside(*values[n:]))


def _fill(solve: Callable[..., Tensor], n: int, value: bool, fill: Any, *tail: Tensor) -> Tensor:
    held, mask = solve(*tail[:n]), _set(tail[n])
    other = fill if fill is not None else tail[n + 1]
    return torch.where(mask, held, other) if value else torch.where(mask, other, held)


def _set(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask != 0

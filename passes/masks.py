"""Arcs through `where`: values that are known in a part of a mask, and whole values from two such halves.

`y = where(m, a, b)` holds a where m is true and b elsewhere. An elementwise inverse of the operation that computes b,
applied to y instead of b, gives its operand on b's half. For `y = where(m, x, x*e + t)` that is `x = (y - t)/e` off the
mask. On the mask x is y itself, so `x <- where(m, y, (y - t)/e)`. Masked couplings (Dinh et al., "Density estimation
using Real NVP", ICLR 2017, https://arxiv.org/abs/1605.08803) invert this way.

Arithmetic with a mask of zeros and ones is a `where`, too: `b*x` is x where b is 1 and 0 elsewhere, and a sum equals
one addend where the other is zero. So both `y = b*x + (1-b)*(x*e + t)` and `x*exp((1-b)*s) + (1-b)*t` invert.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from revfx.errors import Cause
from revfx.passes.facts import ZEROS_AND_ONES, Mask, Masks, plain_name
from revfx.passes.moves import arc_text, given_nodes
from revfx.passes.program import Arc, Found
from revfx.passes.sizes import is_same_shape
from revfx.rules import Direction, Inverse, Masked


MAX_MASK_DEPTH = 4  # elementwise operations followed upwards from one operand of a `where`
UNKNOWN_FILL = object()  # the rest of a sum that is not simply its other addend
PRODUCTS, QUOTIENTS, SUMS = ("mul", "multiply"), ("div", "divide", "true_divide"), ("add", "sub", "subtract")


@dataclass(frozen=True)
class Half:
    """A value that `solve(*tail)` gives wherever the mask is `value`.

    `at` is the first operation involved, `rounding` an arc that rounds, if there is one.
    """

    at: int
    value: bool
    tail: tuple[fx.Node, ...]
    solve: Callable[..., Tensor]
    rounding: Arc | None

    @property
    def has_divisor(self) -> bool:
        """Whether `solve` divides by a factor."""
        return self.rounding is not None and self.rounding.factor is not None


@dataclass(eq=False)
class MaskedArcs:
    """A search for arcs whose tail holds the head in parts, under a mask.

    `directions` holds those of every operation, in order. `index` numbers the values. `barred` gives reasons against
    the rounding of a node; None: codes correct every inverse. `arc_of` returns the arc of an inverse of a node, or the
    reason why there is none.
    """

    directions: Mapping[fx.Node, Sequence[Direction]]
    masks: Masks
    index: Mapping[fx.Node, int]
    barred: Mapping[fx.Node, str] | None
    arc_of: Callable[[fx.Node, Inverse], Arc | Cause]

    def __post_init__(self) -> None:
        self.position: dict[fx.Node, int] = {node: i for i, node in enumerate(self.directions)}
        self.sides: dict[fx.Node, list[Masked]] = {}
        for node in self.directions:
            for side in self._masked_sides(node):
                if side.mask in self.index:
                    self.sides.setdefault(node, []).append(side)
        self.halves: dict[tuple[fx.Node, fx.Node], list[Half]] = {}

    def run(self) -> Iterator[Found]:
        """Yield the arcs, each with the first operation involved."""
        # A masked result holds one half of an operand, and halves of the values that the operand is computed from.
        for y, sides in self.sides.items():
            for side in sides:
                half = Half(self.position[y], side.value, (y,), lambda y: y, None)
                self._spread(side.whole, side.mask, half, MAX_MASK_DEPTH)
        # Two halves of a value give the value.
        for (whole, mask), halves in self.halves.items():
            if whole.op == "get_attr":
                continue
            insides, outsides = [h for h in halves if h.value], [h for h in halves if not h.value]
            for inside, outside in itertools.product(insides, outsides):
                if not (inside.has_divisor and outside.has_divisor):
                    yield self._join_halves(whole, mask, inside, outside)
        # A half that another result holds, together with the fill of the other half, gives a masked result.
        for y, sides in self.sides.items():
            for side in sides:
                if side.other is UNKNOWN_FILL:
                    continue
                for half in self.halves.get((side.whole, side.mask), []):
                    is_same_dtype = side.whole.meta["val"].dtype == y.meta["val"].dtype
                    if half.value == side.value and half.tail[0] is not y and is_same_dtype:
                        yield self._refill(y, side, half)

    def _masked_sides(self, node: fx.Node) -> Iterator[Masked]:
        """Yield the operands that a node holds under a mask: by its rule, or by arithmetic with masks of 0 and 1."""
        known = self.masks
        for side in self.directions[node]:
            if isinstance(side, Masked) and isinstance(side.mask, fx.Node):
                mask = known.of.get(side.mask, Mask(side.mask, True))
                yield Masked(side.whole, mask.root, side.value == mask.value, side.other)
        name = plain_name(node)
        if name not in (*PRODUCTS, *QUOTIENTS, *SUMS) or len(node.args) != 2 or node.kwargs not in ({}, {"alpha": 1}):
            return
        a, b = node.args
        for x, other in ((a, b), (b, a)):
            if not isinstance(x, fx.Node) or not isinstance(other, fx.Node) or x is other:
                continue
            if name in PRODUCTS and other in known.of:
                yield Masked(x, known.of[other].root, known.of[other].value, 0.0)
            elif x is a or name in ("add", *PRODUCTS):  # the result is x where an addend is zero, or a factor one
                neutral = known.zero if name in SUMS else known.one
                for root, value in neutral.get(other, ()):
                    yield Masked(x, root, value, UNKNOWN_FILL)

    def _spread(self, whole: Any, mask: fx.Node, known: Half, depth: int) -> None:
        """Record a known half of `whole`, and the halves of its operands that follow.

        Args:
            whole: the value.
            mask: the root of the mask.
            known: the half.
            depth: the number of elementwise operations left to follow.
        """
        if not isinstance(whole, fx.Node) or not _is_same_type(whole, known.tail[0]):
            return
        self.halves.setdefault((whole, mask), []).append(known)
        at = min(known.at, self.position.get(whole, known.at))
        for side in self.sides.get(whole, []):
            if side.mask is mask and side.value == known.value:
                self._spread(side.whole, mask, replace(known, at=at), depth)
        if depth == 0:
            return
        for inverse in self.directions.get(whole, ()):
            if not isinstance(inverse, Inverse) or not isinstance(inverse.solves, fx.Node):
                continue
            # Inverses that round are elementwise. Exact ones may move elements across the mask; a sign does not.
            if inverse.exact and whole.target not in ("neg", torch.neg):
                continue
            arc = self.arc_of(whole, inverse)
            if isinstance(arc, Cause) or (arc.factor is not None and known.has_divisor):
                continue
            solve = functools.partial(_compose, known.solve, len(known.tail), arc.solve)
            rounding = known.rounding
            if rounding is None or arc.factor is not None:  # at most one of them divides
                rounding = arc
            half = Half(at, known.value, (*known.tail, *given_nodes(inverse)), solve, rounding)
            self._spread(inverse.solves, mask, half, depth - 1)

    def _join_halves(self, whole: fx.Node, mask: fx.Node, inside: Half, outside: Half) -> Found:
        """Return the arc of a value that is known both on and off a mask."""
        n = len(inside.tail)

        def solve(*tail: Tensor) -> Tensor:
            return torch.where(_as_bool(tail[-1]), inside.solve(*tail[:n]), outside.solve(*tail[n:-1]))

        tail, at = (*inside.tail, *outside.tail, mask), min(inside.at, outside.at)
        rounding = inside.rounding
        if rounding is None or outside.has_divisor:  # at most one of them divides
            rounding = outside.rounding
        arc = self._arc(whole, tail, solve)
        if rounding is not None:
            arc = replace(
                arc,
                exact=False,
                barred=(self.barred or {}).get(whole),
                factor=rounding.factor,
            )
        return at, arc

    def _refill(self, y: fx.Node, side: Masked, half: Half) -> Found:
        """Return the arc of a masked result from a half of its operand and its fill."""
        n = len(half.tail)
        fill_nodes = [side.other] if isinstance(side.other, fx.Node) else []

        def solve(*tail: Tensor) -> Tensor:
            held, mask = half.solve(*tail[:n]), _as_bool(tail[-1])
            other = tail[n] if fill_nodes else side.other
            if side.value:
                return torch.where(mask, held, other)
            return torch.where(mask, other, held)

        arc = self._arc(y, (*half.tail, *fill_nodes, side.mask), solve)
        if half.rounding is not None:
            barred = None
            if self.barred is not None:
                barred = "it is filled by a constant, which a rounding inverse leaves alone, but may hold zeros"
            arc = replace(arc, exact=False, barred=barred)
        return min(self.position[y], half.at), arc

    def _arc(self, head: fx.Node, tail: Sequence[fx.Node], solve: Callable[..., Tensor]) -> Arc:
        """Return an exact arc through a mask, the last of its tail. A mask of numbers has to hold zeros and ones."""
        mask = tail[-1]
        assumes = () if mask.meta["val"].dtype == torch.bool else ((self.index[mask], ZEROS_AND_ONES),)
        values = tuple(self.index[n] for n in tail)
        text = arc_text(head, tail, "where")
        return Arc(self.index[head], values, solve, exact=True, text=text, assumes=assumes)


def _is_same_type(whole: fx.Node, node: fx.Node) -> bool:
    a, y = whole.meta.get("val"), node.meta["val"]
    return isinstance(a, Tensor) and a.dtype == y.dtype and is_same_shape(a.shape, y.shape)


def _compose(first: Callable[..., Tensor], n: int, then: Callable[..., Tensor], *tail: Tensor) -> Tensor:
    return then(first(*tail[:n]), *tail[n:])


def _as_bool(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask != 0

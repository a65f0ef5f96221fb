"""Arcs through `where`: values that are known under one half of a mask, and wholes that follow from halves.

`y = where(m, a, b)` holds a where m is set and b elsewhere. With y in the place of b, an elementwise inverse of b's
making gives its operand right on b's half: for `y = where(m, x, x*e + t)` that is `x = (y - t)/e` off the mask, and
y itself on it, so `x <- where(m, y, (y - t)/e)`. This is how masked couplings (Dinh et al., "Density estimation using
Real NVP", ICLR 2017, https://arxiv.org/abs/1605.08803) invert.

Arithmetic with a mask of zeros and ones says the same: `b*x` is x where b is set and 0 elsewhere, and a sum is one of
its addends where the other one is zero; so `y = b*x + (1-b)*(x*e + t)` is a `where`, as is `x*exp((1-b)*s) + (1-b)*t`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from revfx.errors import Cause
from revfx.passes.facts import ZEROS_AND_ONES, Mask, Masks, bare
from revfx.passes.program import Arc, Found
from revfx.passes.sizes import same
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
    def divides(self) -> bool:
        """Whether `solve` divides by a factor."""
        return self.rounding is not None and self.rounding.factor is not None


UNSAID = object()  # the rest of a sum that is not simply its other addend
PRODUCTS, QUOTIENTS, SUMS = ("mul", "multiply"), ("div", "divide", "true_divide"), ("add", "sub", "subtract")


@dataclass(eq=False)
class MaskedArcs:
    """Finds arcs with parts of their head, under a mask, in their tail.

    `directions` holds those of every operation, in order; `index` numbers values, `arc_of` gives the arc of one
    direction of a node, or why there is none. `barred` says what is known against an arc that rounds for the sake of
    its head; None: what rounds is corrected.
    """

    directions: Mapping[fx.Node, Sequence[Direction]]
    masks: Masks
    index: Mapping[fx.Node, int]
    barred: Mapping[fx.Node, str] | None
    arc_of: Callable[[fx.Node, Inverse], Arc | Cause]

    def __post_init__(self) -> None:
        self.position = {node: i for i, node in enumerate(self.directions)}
        found = {node: [m for m in self._masked(node) if m.mask in self.index] for node in self.directions}
        self.selects = {node: sides for node, sides in found.items() if sides}
        self.halves: dict[tuple[fx.Node, fx.Node], list[Half]] = {}

    def run(self) -> Iterator[Found]:
        """Yield the arcs, each with the first operation that it involves."""
        for y, sides in self.selects.items():
            for m in sides:
                self._spread(m.whole, m.mask, Half(self.position[y], m.value, (y,), lambda y: y, None), DEPTH)
        for (whole, mask), found in self.halves.items():
            if whole.op != "get_attr":
                for inside in (h for h in found if h.value):
                    for outside in (h for h in found if not h.value and not (h.divides and inside.divides)):
                        yield self._join(whole, mask, inside, outside)
        for y, sides in self.selects.items():
            for m in (m for m in sides if m.other is not UNSAID):
                for half in self.halves.get((m.whole, m.mask), []):
                    same = m.whole.meta["val"].dtype == y.meta["val"].dtype
                    if half.value == m.value and half.tail[0] is not y and same:
                        yield self._refill(y, m, half)

    def _masked(self, node: fx.Node) -> Iterator[Masked]:
        """Yield the contents of a node under masks: by its rule, and by arithmetic with masks of 0 and 1."""
        known = self.masks
        for m in self.directions[node]:
            if isinstance(m, Masked) and isinstance(m.mask, fx.Node):
                mask = known.of.get(m.mask, Mask(m.mask, True))
                yield Masked(m.whole, mask.root, m.value == mask.value, m.other)
        name = bare(node)
        if name not in (*PRODUCTS, *QUOTIENTS, *SUMS) or len(node.args) != 2 or node.kwargs not in ({}, {"alpha": 1}):
            return
        a, b = node.args
        for x, other in ((a, b), (b, a)):
            if not isinstance(x, fx.Node) or not isinstance(other, fx.Node) or x is other:
                continue
            if name in PRODUCTS and other in known.of:
                yield Masked(x, known.of[other].root, known.of[other].value, 0.0)
            elif name in ("add", *PRODUCTS) or x is a:  # an addend that is zero, or a factor that is one
                for root, value in (known.zero if name in SUMS else known.one).get(other, ()):
                    yield Masked(x, root, value, UNSAID)

    def _spread(self, whole: Any, mask: fx.Node, known: Half, depth: int) -> None:
        """Note the known half of `whole`, and of its operands by elementwise operations or the same mask."""
        if not isinstance(whole, fx.Node) or not _same_type(whole, known.tail[0]):
            return
        self.halves.setdefault((whole, mask), []).append(known)
        at = min(known.at, self.position.get(whole, known.at))
        for m in self.selects.get(whole, []):
            if m.mask is mask and m.value == known.value:
                self._spread(m.whole, mask, replace(known, at=at), depth)
        for inverse in self.directions.get(whole, ()) if depth else ():
            if not isinstance(inverse, Inverse) or not isinstance(inverse.solves, fx.Node):
                continue
            if inverse.exact and whole.target not in ("neg", torch.neg):
                continue  # on each element alone works all that rounds; of the exact ones only a sign
            arc = self.arc_of(whole, inverse)
            if isinstance(arc, Cause) or (arc.factor is not None and known.divides):
                continue
            given = tuple(g for g in inverse.given if isinstance(g, fx.Node))
            solve = functools.partial(_chain, known.solve, len(known.tail), arc.solve)
            rounding = known.rounding if known.rounding and arc.factor is None else arc  # at most one of them divides
            more = Half(at, known.value, (*known.tail, *given), solve, rounding)
            self._spread(inverse.solves, mask, more, depth - 1)

    def _join(self, whole: fx.Node, mask: fx.Node, inside: Half, outside: Half) -> Found:
        tail = (*inside.tail, *outside.tail, mask)
        n = len(inside.tail)

        def solve(*tail: Tensor) -> Tensor:
            return torch.where(_set(tail[-1]), inside.solve(*tail[:n]), outside.solve(*tail[n:-1]))

        roundings = [half.rounding for half in (inside, outside) if half.rounding is not None]
        made = self._arc(whole, tail, solve, exact=not roundings)
        if roundings:
            said = next((r for r in roundings if r.factor is not None), roundings[0])  # at most one of them divides
            fields = ("factor", "measured", "reciprocal", "least")
            barred = (self.barred or {}).get(whole)
            made = replace(made, barred=barred, **{name: getattr(said, name) for name in fields})
        return min(inside.at, outside.at), made

    def _refill(self, y: fx.Node, m: Masked, half: Half) -> Found:
        fill = (m.other,) if isinstance(m.other, fx.Node) else ()
        n = len(half.tail)

        def solve(*tail: Tensor) -> Tensor:
            held, mask = half.solve(*tail[:n]), _set(tail[-1])
            other = tail[n] if fill else m.other
            return torch.where(mask, held, other) if m.value else torch.where(mask, other, held)

        exact = half.rounding is None
        why = "it is filled by a constant, which a rounding inverse leaves alone, but may hold zeros"
        barred = None if exact or self.barred is None else why
        arc = self._arc(y, (*half.tail, *fill, m.mask), solve, exact=exact, barred=barred)
        return min(self.position[y], half.at), arc

    def _arc(self, head: fx.Node, tail: Sequence[fx.Node], solve: Callable[..., Tensor], **more: Any) -> Arc:
        """Return an arc through a mask, the last of its tail; it relies on that holding zeros and ones."""
        assumes = () if tail[-1].meta["val"].dtype == torch.bool else ((self.index[tail[-1]], ZEROS_AND_ONES),)
        text = f"{head.name} <- {', '.join(n.name for n in tail)}  (where)"
        values = tuple(self.index[n] for n in tail)
        return Arc(self.index[head], values, solve, text=text, assumes=assumes, **more)


def _same_type(whole: fx.Node, node: fx.Node) -> bool:
    a, y = whole.meta.get("val"), node.meta["val"]
    return isinstance(a, Tensor) and a.dtype == y.dtype and same(a.shape, y.shape)


def _chain(first: Callable[..., Tensor], n: int, then: Callable[..., Tensor], *tail: Tensor) -> Tensor:
    return then(first(*tail[:n]), *tail[n:])


def _set(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask != 0

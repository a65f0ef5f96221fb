"""Which values have atoms: numbers, such as an exact 0, that they take with positive probability.

A rounding inverse gives an exact zero back as +-1e-17, which flips relu's mask in the backward, so the head of a
rounding arc may not have atoms. They are made by relu, clamp, dropout and the like, pass through layout and elementwise
operations, and survive a sum at most where both addends have them: that is counted while the forward runs. Matrix
products, convolutions and normalisations over a sample mix so many numbers that none is likelier than another, unless
they are all zero (padded rows, blank parts of images, weights that start as zeros): that is counted too. A sum in which
a value cancels (`x + (round(x) - x).detach()`) is what is left. What a function of another name does is not known.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor, fx

from revfx.passes.moved import directions_of, joined, taken_apart
from revfx.passes.names import JOINS, MAKERS, MIXERS, PICKS, PRODUCTS, SMOOTH, SUMS, SUMS_WITH_PRODUCT, bare, factor
from revfx.passes.ties import Numbering, is_tensor
from revfx.rules import Tile, op_name


NONE, RARE, PERHAPS, CERTAIN = 0, 1, 2, 3


def has_atoms(name: str, operands: Iterable[int]) -> int:
    """Return NONE, RARE or PERHAPS (zeros are counted at run time) or CERTAIN atoms in what `name` gives for such
    operands.

    A number that is added, or multiplied by, moves atoms to where nothing is counted.
    """
    name, operands = bare(name), list(operands)
    if name in MAKERS or name.lstrip("_") in MAKERS:
        return CERTAIN
    if not operands:
        return NONE
    if name in MIXERS:
        return RARE
    if name in PICKS:
        return operands[0]
    if name == "copy":  # of the last one, over the first
        return operands[-1]
    if name in JOINS and min(operands) < max(operands):
        return min(PERHAPS, max(operands))  # one part has atoms, another none: whichever is taken out again is counted
    if name in SUMS and len(operands) == 1:
        return CERTAIN if operands[0] >= PERHAPS else operands[0]
    if name in PRODUCTS and len(operands) == 1:
        return operands[0]
    if name in SUMS:
        return min(PERHAPS, *operands)
    if name in SUMS_WITH_PRODUCT:
        return min(PERHAPS, operands[0], max(operands[1:], default=NONE))
    if name in PRODUCTS:
        return min(PERHAPS, max(operands))
    return max(operands) if name in SMOOTH or name in JOINS else max(PERHAPS, *operands)


# --- what cancels in a sum
Terms = Mapping[Hashable, float]
MOST_TERMS = 8  # of a sum that is taken apart: one that is longer is a value of its own


@dataclass
class Levels:
    """The atoms of values by key, and what sums consist of."""

    of: dict[Hashable, int] = field(default_factory=dict)
    terms: dict[Hashable, Terms] = field(default_factory=dict)
    cancelling: set[Hashable] = field(default_factory=set[Hashable])  # sums of which parts add up to nothing

    def note(
        self,
        key: Hashable,
        name: str,
        operands: list[int],
        args: tuple[Any, ...],
        kwargs: Any,
        keyed: Any,
        alike: Mapping[Any, Hashable] = MappingProxyType({}),
    ) -> int:
        """Return the level of a new value `name(*args)`; `keyed` gives the key of an argument that is a tensor, else
        None.

        Values that are `alike` equal each other in places, where one may take the other off.
        """
        name = bare(name)
        self.of[key] = level = has_atoms(name, operands)
        nothing = any(isinstance(x, (int, float)) and x == 0 for x in args)
        if name in PRODUCTS and (kwargs.get("rounding_mode") is not None or nothing):
            self.of[key] = level = CERTAIN
        terms = self._linear(name, args, kwargs, keyed)
        if terms is None:
            return level
        for called in (lambda k: k, lambda k: alike.get(k, k)) if len(terms) > 1 else ():
            total, size = _total({called(k): c} for part in terms for k, c in part.items())
            gone = {k for k in total if abs(total[k]) < 1e-6 * size[k]}
            if gone:
                left = [self.of.get(k, CERTAIN) for k in total.keys() - gone]
                self.of[key] = level = max(level, min(PERHAPS, *left) if left else PERHAPS)
                self.cancelling.add(key)
                return level
        total, _ = _total(terms)
        if len(total) <= MOST_TERMS:
            self.terms[key] = total
        return level

    def _linear(self, name: str, args: tuple[Any, ...], kwargs: Any, keyed: Any) -> list[Terms] | None:
        """Return the multiples of values that an operation adds up, one sum for each operand; None: it doesn't."""
        if name not in SUMS or name == "lerp":
            by = factor(name, args)
            whole = next((k for x in args[:2] if (k := keyed(x)) is not None), None)
            return None if by is None or whole is None else [self._scaled(whole, by)]
        alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
        alpha = float(alpha) if isinstance(alpha, (int, float)) else 1.0
        given = (*args, *(kwargs[key] for key in ("input", "self", "other") if key in kwargs), None, None)
        first, second = (keyed(x) for x in given[:2])
        scales = (-alpha, 1.0) if "rsub" in name else (1.0, -alpha if "sub" in name else alpha)
        return [self._scaled(k, c) for k, c in zip((first, second), scales, strict=True) if k is not None]

    def _scaled(self, key: Hashable, by: float) -> Terms:
        return {k: by * c for k, c in self.terms.get(key, {key: 1.0}).items()}


def _total(terms: Iterable[Terms]) -> tuple[dict[Hashable, float], dict[Hashable, float]]:
    """Return, by value, the sum of its multiples, and of their magnitudes."""
    total: dict[Hashable, float] = {}
    size: dict[Hashable, float] = {}
    for part in terms:
        for k, c in part.items():
            total[k], size[k] = total.get(k, 0.0) + c, size.get(k, 0.0) + abs(c)
    return total, size


def atoms(graph: fx.Graph) -> dict[fx.Node, int]:
    """Return, for every node of a graph, whether its value may have atoms; inputs, sources and unseen insides have.

    A part of what was put together has those of the parts that it overlaps. Marks sums of which parts cancel, what is
    computed twice being one part, and notes each node's `Tie`.
    """
    levels, numbering = Levels(), Numbering()
    found: Any = levels.of
    first = numbering.exact

    def keyed(x: Any) -> fx.Node | None:
        return first[x] if is_tensor(x) else None

    put: dict[fx.Node, list[tuple[fx.Node, int, range]]] = {}
    for node in graph.nodes:
        overlapped = _parts_of(node, put)
        numbering.note(node, lambda n: found[n] > RARE, next((p for p, whole in overlapped.items() if whole), None))
        if node.op in ("placeholder", "get_attr"):
            found[node] = CERTAIN
        elif node.op == "call_module" or node.meta.get("opaque", False):
            found[node] = int(node.meta.get("atoms", CERTAIN))
        elif node.op in ("call_function", "call_method"):
            name = op_name(node.target)
            operands = [found[n] for n in node.all_input_nodes]
            levels.note(node, name, operands, node.args, node.kwargs, keyed, numbering.alike)
            node.meta["cancels"] = node in levels.cancelling
            if name == "where" and len(node.args) == 3:
                a, b = node.args[1:] if node.op == "call_function" else (node.args[0], node.args[2])
                numbers = not (isinstance(a, fx.Node) and isinstance(b, fx.Node))
                found[node] = CERTAIN if numbers else min(PERHAPS, max(found[a], found[b]))
            elif parts := joined(node):
                put[node] = parts
            elif overlapped:
                found[node] = max(found[p] for p in overlapped)
            found[node] = found[node] if may_be_continuous(node.meta.get("val")) else CERTAIN
    for node, tie in numbering.ties({n for n in levels.cancelling if found[n] > RARE}).items():
        node.meta["tie"] = tie
    return found


def may_be_continuous(value: Any) -> bool:
    """Return whether a value is no tensor of whole numbers or truth values, all of whose values are atoms."""
    return not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex()


def _parts_of(node: fx.Node, put: Mapping[fx.Node, list[tuple[fx.Node, int, range]]]) -> dict[fx.Node, bool]:
    """Return the parts of what was `put` together that a node taken of it overlaps, and whether it is all of one."""
    split = taken_apart(node)
    taken, number = (node, 0) if split is None else (split, node.args[1])  # or the key, where the whole is a dict
    source: Any = taken.args[0] if taken.args else None
    parts = put.get(source, [])
    dim = parts[0][1] if parts else None
    for t in directions_of(taken) if parts else ():
        if isinstance(t, Tile) and t.whole is source and t.part == number and t.dim == dim and len(t.index):
            return {p: r == t.index for p, _, r in parts if r.start <= t.index[-1] and t.index[0] < r.stop}
    return {}

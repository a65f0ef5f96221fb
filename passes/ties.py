"""Which values equal others in places, whatever numbers they hold, as what was added in between may be zero there.

`after = before + relu(h)` is `before` wherever relu gives zeros. An inverse that rounds gives neither of the two back
with its very bits, and then `maximum(after, before)` takes the other one. So values are numbered as compilers do, but
for zeros in a sum: `exp(after)` and `exp(before)` are alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from revfx.passes import names
from revfx.passes.names import bare, factor
from revfx.rules import op_name


@dataclass(frozen=True, slots=True)
class Tie:
    """Of an operation: whether it reads values that equal each other in places (`meets`), or one of which elements do
    (`within`), or is a sum that is zero there; and the operands through which its result equals others in places.
    """

    meets: bool = False
    within: bool = False
    vanishes: bool = False
    carried: frozenset[fx.Node] = frozenset()


NO_TIE = Tie()


class Numbering:
    """By node the first one that computes the same of the same (`exact`), or what it is but for zeros (`alike`).

    Of a value that equals several others in places, the one is kept that was there first. In whatever words, and along
    whatever dimensions: an operation gives one value of the same ones (`_meant`), and alike ones of what is alike.
    """

    def __init__(self) -> None:
        # `made`: alike by what makes them; `core`: but for moves and factors; `root`: what is alike, but for moves
        self._all = [dict[fx.Node, fx.Node]() for _ in range(6)]
        self.exact, self.alike, self._meant, self._made, self._core, self._root = self._all
        self._at, self._first = dict[fx.Node, int](), dict[Hashable, fx.Node]()
        self._rows = set[fx.Node]()  # zero in whole rows, as what they mix may be

    def note(self, node: fx.Node, has_atoms: Callable[[fx.Node], bool], copied: fx.Node | None = None) -> None:
        """Number a node, after its operands, of which each `has_atoms` or not; what is `copied` is its like."""
        self._at[node] = len(self._at)
        if copied is not None:
            for numbers in self._all:
                numbers[node] = numbers[copied]
            if copied in self._rows:
                self._rows.add(node)
            return
        self.exact[node] = self._first.setdefault(("exact", *_as_written(node, self.exact)), node)
        meant = self._meant[node] = self._first.setdefault(("meant", *_as_meant(node, self._meant)), node)
        made = self._made[node] = self._first.setdefault(_as_meant(node, self.alike), node)
        self.alike[node] = alike = self._same(node, lambda n: has_atoms(n) or n in self._rows) or made
        name, operands = _name(node), [n for n in node.all_input_nodes if _holds_tensors(n)]
        whole = operands[0] if operands and (name in names.MOVES or factor(name, node.args) is not None) else None
        self._core[node] = meant if whole is None else self._core[whole]
        self._root[node] = self._root[operands[0]] if operands and name in names.MOVES else self._root.get(alike, alike)
        mixes = name in names.MIXERS and len(operands) == 2  # nothing is added
        zeros = (n in self._rows or (has_atoms(n) and (mixes or node.op == "call_module")) for n in operands)
        if (mixes or len(operands) == 1 or name in names.PRODUCTS) and any(zeros):
            self._rows.add(node)

    def ties(self, vanishing: Collection[Hashable]) -> dict[fx.Node, Tie]:
        """Return, by node, what is known of it; `vanishing` are sums that are zero where parts cancel."""
        values, made = defaultdict[fx.Node, set[fx.Node]](set), defaultdict[fx.Node, set[fx.Node]](set)
        for node, first in self._meant.items():
            values[self.alike[node]].add(first)
            made[self._made[node]].add(first)
        found, within, rows = dict[fx.Node, Tie](), set[fx.Node](), set[fx.Node]()
        for node in self.exact:
            operands, name = [n for n in node.all_input_nodes if _holds_tensors(n)], _name(node)
            inside = within.intersection(operands)
            meets = self._meet(self._root, operands) or len(inside) > 1
            joins = name in names.JOINS and self._meet(self.alike, operands)  # other parts of one value are no ties
            if (joins and _along_rows(node)) or inside & rows:
                rows.add(node)
            if joins or node in rows or (inside and name not in names.MIXERS):
                within.add(node)
            if joins or name in names.MOVES or factor(name, node.args) is not None:
                carried = operands
            else:
                several = len(made[self._made[node]]) > 1
                carried = [n for n in operands if n in within or (several and len(values[self.alike[n]]) > 1)]
            vanishes = node in vanishing or len(inside) > 1 or (meets and "sub" in name)
            found[node] = Tie(meets, bool(inside), vanishes, frozenset(carried))
        return found

    def _meet(self, called: Mapping[fx.Node, fx.Node], operands: Collection[fx.Node]) -> bool:
        """Return whether two of the operands are one by what they are `called`, and not by what they are."""
        apart = {self._core[n]: called[n] for n in operands}
        return len(set(apart.values())) < len(apart)

    def _same(self, node: fx.Node, has_atoms: Callable[[fx.Node], bool]) -> fx.Node | None:
        """Return what a result equals in places, up to a factor; None where it is a value of its own."""
        name = _name(node)
        operands = [n for n in node.all_input_nodes if is_tensor(n) and n.meta["val"].dtype != torch.bool]
        alike = [self.alike[n] for n in operands]
        if not alike:
            return None
        first = min(alike, key=self._at.__getitem__)
        if name in names.SUMS - names.CHOICES or name in names.PRODUCTS:
            if sum(map(is_tensor, node.args)) < 2:
                return first if factor(name, node.args) is not None else None
            if name in names.SUMS and len(set(alike)) == 1:
                return first
            left = [a for a, n in zip(alike, operands, strict=True) if not has_atoms(n)]  # as zeros or ones
            return None if len(left) == len(alike) else (left or [first])[0]
        if name in names.WRITES or (name in names.BETWEEN and any(map(has_atoms, operands[1:]))):
            return alike[0]
        if name in names.JOINS:
            wholes = (self.alike[_taken_of(a)] for a in alike)
            return next((w for w in wholes if is_tensor(w) and w.meta["val"].shape == node.meta["val"].shape), None)
        if name in names.CHOICES and (name not in names.BETWEEN or len(set(alike)) == 1):
            return first
        return first if factor(name, node.args) is not None else None


def _taken_of(node: fx.Node) -> fx.Node:
    """Return what a value is a part of; itself where it is none."""
    while _name(node) in names.TAKES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _along_rows(node: fx.Node) -> bool:
    """Return whether values are joined along the first dimension, across which layers mix nothing."""
    name, ndim = _name(node), node.meta["val"].ndim
    at = 2 if name in names.WRITES else 1
    dim = node.kwargs.get("dim", node.args[at] if len(node.args) > at else 0)
    return name == "vstack" or (name not in ("hstack", "dstack") and dim in (0, -ndim))


def _name(node: fx.Node) -> str:
    return bare(op_name(node.target)) if node.op in ("call_function", "call_method") else ""


def is_tensor(x: Any) -> bool:
    """Return whether an argument is a node of a tensor."""
    return isinstance(x, fx.Node) and isinstance(x.meta.get("val"), Tensor)


def _holds_tensors(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (Tensor, list, tuple))


def _as_written(node: fx.Node, first: Mapping[fx.Node, fx.Node]) -> tuple[Hashable, ...]:
    """Return what a node computes of which values, alike for nodes that give or draw the same numbers."""
    args: Any = fx.map_arg((node.args, node.kwargs), lambda n: first[n])
    if _name(node) in names.COMMUTE and len(args[0]) == 2 and not args[1]:  # without a factor of one of them
        args = sorted(map(repr, args[0])), args[1]
    return node.op, node.target, repr(args)


def _as_meant(node: fx.Node, first: Mapping[fx.Node, fx.Node]) -> tuple[Hashable, ...]:
    """Return what a node computes of which values; of one value in whatever words and along whatever dimensions."""
    name, operands = _name(node), [first[n] for n in node.all_input_nodes]
    if name in names.RESHAPES:
        return "view", str(node.meta["val"].shape), operands[0]
    if not name or name in names.MOVES | names.JOINS or len(operands) != 1:
        return _as_written(node, first)
    squares = "mul" in name and node.args[0] is node.args[-1]
    return "pow" if squares else names.SPELLINGS.get(name, name), operands[0]

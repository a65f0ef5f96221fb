"""Interval analysis: between which numbers a value lies, and whether it can be zero, as far as its making tells."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from revfx.rules import arguments, op_name


@dataclass(frozen=True, slots=True)
class Interval:
    """low <= value <= high; `nonzero` where it is never zero in exact arithmetic (it may still underflow)."""

    low: float = -math.inf
    high: float = math.inf
    nonzero: bool = False

    @property
    def least(self) -> float:
        """The smallest magnitude that the interval admits."""
        return self.low if self.low > 0 else -self.high if self.high < 0 else 0.0

    @property
    def most(self) -> float:
        """The largest magnitude that the interval admits."""
        return max(abs(self.low), abs(self.high))

    @property
    def typical(self) -> float:
        """A guess at the usual magnitude: the middle of the interval, on a log scale where it has one; else 1."""
        if self.most == math.inf:
            return max(1.0, self.least)
        return math.sqrt(self.least * self.most) if self.least > 0 else self.most / 2 or 1.0


UNKNOWN = Interval()


def _monotone(f: Callable[[float], float], nonzero: bool = False) -> Callable[[Interval], Interval]:
    return lambda a: Interval(f(a.low), f(a.high), nonzero)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _sigmoid(x: float) -> float:
    return 1 / (1 + _exp(-x)) if x > -700 else 0.0


def _softplus(x: float) -> float:
    return x if x > 700 else math.log1p(_exp(x))


def _add(a: Interval, b: Interval) -> Interval:
    low, high = a.low + b.low, a.high + b.high
    return Interval(low, high, low > 0 or high < 0)


def _neg(a: Interval) -> Interval:
    return Interval(-a.high, -a.low, a.nonzero)


def _mul(a: Interval, b: Interval) -> Interval:
    ends = [0.0 if 0.0 in (x, y) else x * y for x in (a.low, a.high) for y in (b.low, b.high)]
    return Interval(min(ends), max(ends), a.nonzero and b.nonzero)


def _reciprocal(a: Interval) -> Interval:
    if a.low > 0 or a.high < 0:
        return Interval(1 / a.high, 1 / a.low, True)
    return Interval(0.0, math.inf, a.nonzero) if a.low >= 0 else Interval(nonzero=a.nonzero)


def _within(low: float, high: float) -> Callable[[Interval], Interval]:
    return lambda a: Interval(low, high)


def _abs(a: Interval) -> Interval:
    return Interval(a.least, a.most, a.nonzero)


UNARY: dict[str, Callable[[Interval], Interval]] = {
    "exp": _monotone(_exp, nonzero=True),
    "sigmoid": _monotone(_sigmoid, nonzero=True),
    "softplus": _monotone(_softplus, nonzero=True),
    "tanh": _monotone(math.tanh),
    "relu": lambda a: Interval(max(0.0, a.low), max(0.0, a.high)),
    "hardtanh": _within(-1.0, 1.0),
    "hardsigmoid": _within(0.0, 1.0),
    "softmax": _within(0.0, 1.0),
    "softsign": _within(-1.0, 1.0),
    "sin": _within(-1.0, 1.0),
    "cos": _within(-1.0, 1.0),
    "atan": _within(-math.pi / 2, math.pi / 2),
    "erf": _within(-1.0, 1.0),
    "abs": _abs,
    "neg": _neg,
    "reciprocal": _reciprocal,
    "__neg__": _neg,
} | dict.fromkeys(
    ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone",
     "permute", "transpose", "detach", "t", "alias", "_unsafe_view", "slice", "split_with_sizes", "index",
     "expand", "expand_as", "flip", "roll", "getitem", "__getitem__", "chunk", "split", "narrow", "select",
     "unbind", "float", "double", "_to_copy", "convert_element_type",
     "repeat"),
    lambda a: a,
)  # fmt: skip

BINARY: dict[str, Callable[[Interval, Interval], Interval]] = {
    "add": _add,
    "sub": lambda a, b: _add(a, _neg(b)),
    "__rsub__": lambda a, b: _add(b, _neg(a)),
    "rsub": lambda a, b: _add(b, _neg(a)),
    "mul": _mul,
    "div": lambda a, b: _mul(a, _reciprocal(b)),
    "true_divide": lambda a, b: _mul(a, _reciprocal(b)),
    "__rdiv__": lambda a, b: _mul(b, _reciprocal(a)),
}


def bounds(graph: fx.Graph) -> dict[fx.Node, Interval]:
    """For every node of a graph, the interval in which all its elements lie."""
    found: dict[fx.Node, Interval] = {}

    def of(x: Any) -> Interval:
        if isinstance(x, (int, float)):
            return Interval(float(x), float(x), x != 0)
        return found.get(x, UNKNOWN) if isinstance(x, fx.Node) else UNKNOWN

    for node in graph.nodes:
        found[node] = _bound(node, of)
    return found


def _bound(node: fx.Node, of: Callable[[Any], Interval]) -> Interval:
    if node.op not in ("call_function", "call_method"):
        return UNKNOWN
    name = op_name(node.target)
    name = name if name.endswith("__") else name.rstrip("_")
    if name in ("clamp", "clip", "hardtanh"):
        default = (-1.0, 1.0) if name == "hardtanh" else (None, None)
        keys = ("min_val", "max_val") if name == "hardtanh" else ("min", "max")
        a, low, high = arguments(node, "input", **dict(zip(keys, default, strict=True)))
        inner = of(a)
        lowest = low if isinstance(low, (int, float)) else -math.inf
        highest = high if isinstance(high, (int, float)) else math.inf
        if not (low is None or isinstance(low, (int, float))) or not (high is None or isinstance(high, (int, float))):
            return UNKNOWN  # limits that are data
        low_, high_ = (min(max(end, lowest), highest) for end in (inner.low, inner.high))
        return Interval(low_, high_, low_ > 0 or high_ < 0)
    if name == "softplus" and (len(node.args) > 1 or node.kwargs):
        return Interval(0.0, math.inf, True)
    if name in UNARY and node.args:
        return UNARY[name](of(node.args[0]))
    if name in BINARY and len(node.args) == 2 and not node.kwargs:
        return BINARY[name](of(node.args[0]), of(node.args[1]))
    return UNKNOWN

"""Interval analysis: between which numbers a value lies, and whether it can be zero, as far as its making tells."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from revfx.passes.facts import bare
from revfx.passes.sizes import tensors_of
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


ANY_NUMBER = Interval()


def _monotone(f: Callable[[float], float], nonzero: bool = False) -> Callable[[Interval], Interval]:
    return lambda a: Interval(f(a.low), f(a.high), nonzero)


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _sigmoid(x: float) -> float:
    return 1 / (1 + _exp(-x)) if x > 0 else _exp(x) / (1 + _exp(x))


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
    return Interval(nonzero=a.nonzero)  # also from 0 upwards: a zero may have a sign


def _square(a: Interval) -> Interval:
    return Interval(a.least * a.least, a.most * a.most, a.nonzero)


def _sum_interval(a: Interval) -> Interval:
    return Interval(0.0 if a.low >= 0 else -math.inf, 0.0 if a.high <= 0 else math.inf)


WITHIN = {
    (-1.0, 1.0): "hardtanh softsign sin cos erf",
    (0.0, 1.0): "hardsigmoid softmax safe_softmax",
    (-math.pi / 2, math.pi / 2): "atan",
    (0.0, math.inf): "var std",
}  # of any operand
UNARY: dict[str, Callable[[Interval], Interval]] = {
    "exp": _monotone(_exp, nonzero=True),
    "sigmoid": _monotone(_sigmoid, nonzero=True),
    "softplus": lambda a: Interval(a.low if a.low > 20 else _softplus(a.low), _softplus(a.high), True),
    "tanh": _monotone(math.tanh),
    "relu": lambda a: Interval(max(0.0, a.low), max(0.0, a.high)),
    **{name: lambda a, ends=ends: Interval(*ends) for ends, names in WITHIN.items() for name in names.split()},
    "abs": lambda a: Interval(a.least, a.most, a.nonzero),
    "square": _square,
    "mean": _sum_interval,
    "sum": _sum_interval,
    "neg": _neg,
    "reciprocal": _reciprocal,
}

BINARY: dict[str, Callable[[Interval, Interval], Interval]] = {
    "add": _add,
    "sub": lambda a, b: _add(a, _neg(b)),
    "rsub": lambda a, b: _add(b, _neg(a)),
    "mul": _mul,
    "div": lambda a, b: _mul(a, _reciprocal(b)),
    "true_divide": lambda a, b: _mul(a, _reciprocal(b)),
    "rdiv": lambda a, b: _mul(b, _reciprocal(a)),
}


# What these give in floating point is the result in exact arithmetic, rounded to the nearest number.
ROUNDED = frozenset("add sub rsub mul neg abs relu clamp clip hardtanh".split())
MOVES = frozenset(
    """view reshape flatten unflatten squeeze unsqueeze contiguous clone permute transpose detach t alias unsafe_view
    slice split_with_sizes index expand expand_as flip roll getitem chunk split narrow select unbind float
    double to_copy convert_element_type repeat""".split()
)
MOST_WHOLE = 2**53  # beyond which an end of an interval may not be the number itself
ULPS = 8  # by which other functions may miss the nearest number


def bounds(graph: fx.Graph) -> dict[fx.Node, Interval]:
    """Return, for every node, in which interval its elements lie, but for NaN, as floating point computes them."""
    found: dict[fx.Node, Interval] = {}
    for node in graph.nodes:
        dtype = _dtype(node)

        def of(x: Any, dtype: torch.dtype | None = dtype) -> Interval:
            if isinstance(x, (int, float)):  # a number is rounded to the dtype of the other operand
                return _rounded(Interval(float(x), float(x), x != 0), dtype, 1)
            return found.get(x, ANY_NUMBER) if isinstance(x, fx.Node) else ANY_NUMBER

        found[node] = _in_dtype(node, _bound(node, of), dtype)
    return found


def _dtype(node: fx.Node) -> torch.dtype | None:
    return next((t.dtype for t in tensors_of(node.meta.get("val"))), None)


def _in_dtype(node: fx.Node, exact: Interval, dtype: torch.dtype | None) -> Interval:
    """Return the interval that rounding leaves of an exact one; ANY_NUMBER where whole numbers may wrap around."""
    if exact == ANY_NUMBER or dtype is None or dtype.is_complex:
        return exact if dtype is None else ANY_NUMBER
    name = bare(node)
    before = next(filter(None, map(_dtype, node.all_input_nodes)), dtype)
    if not dtype.is_floating_point:
        whole = not before.is_floating_point and dtype != torch.bool
        most = min(torch.iinfo(dtype).max, MOST_WHOLE) if whole else -1
        least = max(torch.iinfo(dtype).min, -MOST_WHOLE) if whole else 0
        return exact if least <= exact.low and exact.high <= most else ANY_NUMBER
    if name in MOVES:
        if before == dtype or name in ("float", "double", "to_copy", "convert_element_type"):
            return exact if before == dtype else _rounded(exact, dtype, 1)
        return ANY_NUMBER  # a view of other bits
    return _rounded(exact, dtype, 1 if name in ROUNDED else ULPS)


def _rounded(a: Interval, dtype: torch.dtype | None, ulps: int) -> Interval:
    """Return an interval with room for rounding, but at ends that are met exactly, as 0 and 1."""
    if dtype is None or not dtype.is_floating_point:
        return a
    info = torch.finfo(dtype)

    def end(x: float, side: int) -> float:
        if math.isnan(x):
            return side * math.inf
        met = x in EXACT or (ulps == 1 and float(torch.tensor(x, dtype=torch.float64).to(dtype)) == x)
        if met and (x == 0 or abs(x) >= info.tiny):
            return x
        if abs(x) < info.tiny:  # it may be flushed to 0, or rounded away from it
            return 0.0 if x * side <= 0 else side * info.tiny
        if abs(x) > info.max:  # overflows, or does not quite
            return side * math.inf if x * side > 0 else -side * info.max
        return x + side * ulps * info.eps * abs(x)

    return Interval(end(a.low, -1), end(a.high, 1), a.nonzero)


EXACT = (0.0, 0.5, -0.5, 1.0, -1.0, math.inf, -math.inf)


def _bound(node: fx.Node, of: Callable[[Any], Interval]) -> Interval:
    if node.op != "call_function":
        return ANY_NUMBER
    name = bare(node)
    if name in ("clamp", "clip", "hardtanh"):
        limits = {"min_val": -1.0, "max_val": 1.0} if name == "hardtanh" else {"min": None, "max": None}
        a, *given = arguments(node, "input", **limits)
        if not all(x is None or isinstance(x, (int, float)) for x in given):
            return ANY_NUMBER  # limits that are data
        lowest, highest = (end if x is None else x for x, end in zip(given, (-math.inf, math.inf), strict=True))
        low, high = (min(max(end, lowest), highest) for end in (of(a).low, of(a).high))
        return Interval(low, high, low > 0 or high < 0)
    if name == "softplus" and (len(node.args) > 1 or node.kwargs):
        beta = node.args[1] if len(node.args) > 1 else node.kwargs.get("beta", 1)
        return Interval(0.0, math.inf, True) if isinstance(beta, (int, float)) and beta > 0 else ANY_NUMBER
    first, *others = node.args or (None,)
    if isinstance(first, fx.Node) and name == "getitem" and op_name(first.target) in ("var_mean", "std_mean"):
        return Interval(0.0) if others == [0] else ANY_NUMBER
    if (name == "pow" and others == [2]) or (name == "mul" and others == [first]):
        return _square(of(first))
    if node.args and (name in MOVES or name in UNARY):
        return UNARY.get(name, lambda a: a)(of(first))
    if name in BINARY and len(node.args) == 2 and not node.kwargs:
        return BINARY[name](of(first), of(others[0]))
    return ANY_NUMBER

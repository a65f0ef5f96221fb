"""Interval analysis: bounds of the values of a graph, and whether they can be zero."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from revfx.passes.facts import plain_name
from revfx.passes.sizes import tensors_of
from revfx.rules import arguments, op_name


@dataclass(frozen=True, slots=True)
class Interval:
    """low <= value <= high; `nonzero`: the value is never zero in exact arithmetic (it may still underflow)."""

    low: float = -math.inf
    high: float = math.inf
    nonzero: bool = False

    @property
    def least(self) -> float:
        """The smallest magnitude in the interval."""
        return max(0.0, self.low, -self.high)

    @property
    def most(self) -> float:
        """The largest magnitude in the interval."""
        return max(abs(self.low), abs(self.high))


ANY_NUMBER = Interval()
IntervalOf = Callable[[Any], Interval]  # of an operand: a node or a number


def _monotone(f: Callable[[float], float], nonzero: bool = False) -> Callable[[Interval], Interval]:
    return lambda a: Interval(f(a.low), f(a.high), nonzero)


def _always(low: float, high: float) -> Callable[[Interval], Interval]:
    return lambda a: Interval(low, high)


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _sigmoid(x: float) -> float:
    if x > 0:
        return 1 / (1 + _exp(-x))
    return _exp(x) / (1 + _exp(x))


def _softplus(x: float) -> float:
    return x if x > 700 else math.log1p(_exp(x))


def _softplus_interval(a: Interval) -> Interval:
    # beyond its threshold of 20 torch returns the operand
    return Interval(a.low if a.low > 20 else _softplus(a.low), _softplus(a.high), True)


def _add(a: Interval, b: Interval) -> Interval:
    low, high = a.low + b.low, a.high + b.high
    return Interval(low, high, low > 0 or high < 0)


def _neg(a: Interval) -> Interval:
    return Interval(-a.high, -a.low, a.nonzero)


def _product(x: float, y: float) -> float:
    if 0.0 in (x, y):  # also of zero and infinity
        return 0.0
    return x * y


def _mul(a: Interval, b: Interval) -> Interval:
    ends = _product(a.low, b.low), _product(a.low, b.high), _product(a.high, b.low), _product(a.high, b.high)
    return Interval(min(ends), max(ends), a.nonzero and b.nonzero)


def _reciprocal(a: Interval) -> Interval:
    if a.low > 0 or a.high < 0:
        return Interval(1 / a.high, 1 / a.low, True)
    return Interval(nonzero=a.nonzero)  # also of an interval from 0 upwards: a zero may have a sign


def _square(a: Interval) -> Interval:
    return Interval(a.least * a.least, a.most * a.most, a.nonzero)


def _sum_interval(a: Interval) -> Interval:
    return Interval(0.0 if a.low >= 0 else -math.inf, 0.0 if a.high <= 0 else math.inf)


UNARY: dict[str, Callable[[Interval], Interval]] = {
    "exp": _monotone(_exp, nonzero=True),
    "sigmoid": _monotone(_sigmoid, nonzero=True),
    "softplus": _softplus_interval,
    "tanh": _monotone(math.tanh),
    "relu": _monotone(lambda x: max(0.0, x)),
    **dict.fromkeys(("hardtanh", "softsign", "sin", "cos", "erf"), _always(-1.0, 1.0)),
    **dict.fromkeys(("hardsigmoid", "softmax", "safe_softmax"), _always(0.0, 1.0)),
    **dict.fromkeys(("var", "std"), _always(0.0, math.inf)),
    "atan": _always(-math.pi / 2, math.pi / 2),
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

# The floating-point result of these is the exact one, rounded to the nearest number.
CORRECTLY_ROUNDED_OPS = frozenset("add sub rsub mul neg abs relu clamp clip hardtanh".split())
ERROR_ULPS = 8  # the largest error of other functions
DTYPE_CASTS = ("float", "double", "to_copy", "convert_element_type")
MOVES = frozenset(
    """view reshape flatten unflatten squeeze unsqueeze contiguous clone permute transpose detach t alias unsafe_view
    slice split_with_sizes index expand expand_as flip roll getitem chunk split narrow select unbind float
    double to_copy convert_element_type repeat""".split()
)
MAX_EXACT_INTEGER = 2**53  # a larger end of an interval may be rounded
EXACT_NUMBERS = (0.0, 0.5, -0.5, 1.0, -1.0, math.inf, -math.inf)  # results that functions meet without an error


def find_bounds(graph: fx.Graph) -> dict[fx.Node, Interval]:
    """Return an interval for every node that holds all elements, as floating point computes them, except NaN."""
    found: dict[fx.Node, Interval] = {}
    for node in graph.nodes:
        dtype = _dtype(node)
        exact = _exact_interval(node, functools.partial(_operand_interval, found, dtype))
        found[node] = _interval_in_dtype(node, exact, dtype)
    return found


def _operand_interval(found: Mapping[fx.Node, Interval], dtype: torch.dtype | None, operand: Any) -> Interval:
    """Return the interval of an operand; a number is rounded to the dtype of the other operand."""
    if isinstance(operand, (int, float)):
        return _rounded_interval(Interval(float(operand), float(operand), operand != 0), dtype, 1)
    if isinstance(operand, fx.Node):
        return found.get(operand, ANY_NUMBER)
    return ANY_NUMBER


def _dtype(node: fx.Node) -> torch.dtype | None:
    return next((t.dtype for t in tensors_of(node.meta.get("val"))), None)


def _exact_interval(node: fx.Node, interval_of: IntervalOf) -> Interval:
    """Return the interval of a node in exact arithmetic, from the intervals of its operands."""
    if node.op != "call_function":
        return ANY_NUMBER
    name = plain_name(node)
    if name in ("clamp", "clip", "hardtanh"):
        return _clamped_interval(node, name, interval_of)
    if name == "softplus" and (len(node.args) > 1 or node.kwargs):
        _, beta = arguments(node, "input", beta=1)
        if isinstance(beta, (int, float)) and beta > 0:
            return Interval(0.0, math.inf, True)
        return ANY_NUMBER
    first, *others = node.args or (None,)
    if name == "getitem" and isinstance(first, fx.Node) and others == [0]:
        if op_name(first.target) in ("var_mean", "std_mean"):
            return Interval(0.0)
    if (name == "pow" and others == [2]) or (name == "mul" and others == [first]):
        return _square(interval_of(first))
    if node.args and name in MOVES:
        return interval_of(first)
    if node.args and name in UNARY:
        return UNARY[name](interval_of(first))
    if name in BINARY and len(node.args) == 2 and not node.kwargs:
        return BINARY[name](interval_of(first), interval_of(others[0]))
    return ANY_NUMBER


def _clamped_interval(node: fx.Node, name: str, interval_of: IntervalOf) -> Interval:
    if name == "hardtanh":
        operand, lowest, highest = arguments(node, "input", min_val=-1.0, max_val=1.0)
    else:
        operand, lowest, highest = arguments(node, "input", min=None, max=None)
    lowest = -math.inf if lowest is None else lowest
    highest = math.inf if highest is None else highest
    if not isinstance(lowest, (int, float)) or not isinstance(highest, (int, float)):
        return ANY_NUMBER  # limits that are data
    a = interval_of(operand)
    low, high = min(max(a.low, lowest), highest), min(max(a.high, lowest), highest)
    return Interval(low, high, low > 0 or high < 0)


def _interval_in_dtype(node: fx.Node, exact: Interval, dtype: torch.dtype | None) -> Interval:
    """Widen an exact interval by the rounding of a node's result; ANY_NUMBER if integers may overflow."""
    if exact == ANY_NUMBER or dtype is None:
        return exact
    name, operand_dtype = plain_name(node), next(filter(None, map(_dtype, node.all_input_nodes)), dtype)
    if dtype.is_floating_point:
        if name in CORRECTLY_ROUNDED_OPS:
            return _rounded_interval(exact, dtype, 1)
        if name not in MOVES:
            return _rounded_interval(exact, dtype, ERROR_ULPS)
        if operand_dtype == dtype:
            return exact
        if name in DTYPE_CASTS:
            return _rounded_interval(exact, dtype, 1)
    elif not dtype.is_complex and _holds_integers(exact, operand_dtype, dtype):
        return exact
    return ANY_NUMBER  # also of a view of other bits


def _holds_integers(a: Interval, operand_dtype: torch.dtype, dtype: torch.dtype) -> bool:
    """Return whether integers of a dtype take all values of an interval without overflow."""
    if operand_dtype.is_floating_point or dtype == torch.bool:
        return False
    info = torch.iinfo(dtype)
    return max(info.min, -MAX_EXACT_INTEGER) <= a.low and a.high <= min(info.max, MAX_EXACT_INTEGER)


def _rounded_interval(a: Interval, dtype: torch.dtype | None, ulps: int) -> Interval:
    """Widen an interval by the rounding error, except at ends that are met exactly, as 0 and 1 are."""
    if dtype is None or not dtype.is_floating_point:
        return a
    return Interval(_rounded_end(a.low, -1, dtype, ulps), _rounded_end(a.high, 1, dtype, ulps), a.nonzero)


def _rounded_end(x: float, side: int, dtype: torch.dtype, ulps: int) -> float:
    """Move an end of an interval outwards by the rounding error.

    Args:
        x: the end.
        side: -1 for the lower end, 1 for the upper one.
        dtype: of the result.
        ulps: the largest error.
    """
    info = torch.finfo(dtype)
    if math.isnan(x):
        return side * math.inf
    is_exact = x in EXACT_NUMBERS or (ulps == 1 and float(torch.tensor(x, dtype=torch.float64).to(dtype)) == x)
    if is_exact and (x == 0 or abs(x) >= info.tiny):
        return x
    if info.tiny <= abs(x) <= info.max:
        return x + side * ulps * info.eps * abs(x)
    if abs(x) < info.tiny:  # flushed to 0, or rounded away from it
        inner, outer = 0.0, side * info.tiny
    else:  # overflows, or nearly does
        inner, outer = -side * info.max, side * math.inf
    return outer if x * side > 0 else inner

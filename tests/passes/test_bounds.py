"""Bounds of factors: no interval that is claimed is left by a value, in any dtype, at any extreme."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch import Tensor, fx
from torch.nn import functional as F

from revfx.passes.bounds import BINARY, MOVES, UNARY, Interval, find_bounds
from revfx.rules import aten


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
UNARY_OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp, "sigmoid": torch.sigmoid, "softplus": F.softplus, "tanh": torch.tanh, "relu": torch.relu,
    "hardtanh": F.hardtanh, "hardsigmoid": F.hardsigmoid, "softmax": functools.partial(torch.softmax, dim=-1),
    "safe_softmax": lambda x: torch.ops.aten._safe_softmax(x, -1),
    "softsign": F.softsign, "sin": torch.sin, "cos": torch.cos, "atan": torch.atan, "erf": torch.erf,
    "abs": torch.abs, "neg": torch.neg, "reciprocal": torch.reciprocal,
    "square": torch.square, "mean": torch.mean, "sum": torch.sum, "var": functools.partial(torch.var, correction=0),
    "std": functools.partial(torch.std, correction=0),
}  # fmt: skip
BINARY_OPS: dict[str, Callable[[Any, Any], Tensor]] = {
    "add": torch.add, "sub": torch.sub, "rsub": torch.rsub, "mul": torch.mul, "div": torch.div,
    "true_divide": torch.true_divide, "rdiv": lambda a, b: b / a,
}  # fmt: skip
EXTREMES = (
    -math.inf, -1e300, -3e38, -65504.0, -1e8 - 3, -700.0, -104.0, -88.0, -20.0, -1.0, -0.7, -1e-5, -1e-38, -1e-45,
    -5e-324, -0.0, 0.0, 5e-324, 1e-45, 1e-38, 6e-5, 0.1, 0.3, 1.0, 1.0000001, 3.0, 19.99999, 20.0, 20.00001, 88.0, 89.0,
    705.0, 1e8 + 3, 65505.0, 3.5e38, 1e300, math.inf,
)  # fmt: skip
numbers = st.sampled_from(EXTREMES) | st.floats(-1e3, 1e3)


class Program:
    """A chain of operations: a graph in which each node carries the value that it has."""

    def __init__(self) -> None:
        self.graph = fx.Graph()

    def call(self, target: Any, *args: Any, method: bool = False) -> fx.Node:
        make = self.graph.call_method if method else self.graph.call_function
        node = make(target, args)
        real = fx.map_arg(args, lambda n: n.meta["val"])
        try:
            node.meta["val"] = getattr(real[0], target)(*real[1:]) if method else target(*real)
        except RuntimeError as e:  # torch takes no number that the dtype of a tensor does not
            assume("overflow" not in str(e) and "out of range" not in str(e))
            raise
        return node

    def data(self, value: Tensor) -> fx.Node:
        node = self.graph.placeholder(f"x{len(self.graph.nodes)}")
        node.meta["val"] = value
        return node

    def check(self) -> None:
        for node, interval in find_bounds(self.graph).items():
            assert_holds(node.meta["val"], interval, str(node))


def assert_holds(value: Any, interval: Interval, what: str) -> None:
    if not isinstance(value, Tensor):
        return
    seen = value.double()
    seen = seen[~seen.isnan()]
    low, high, least = interval.low, interval.high, interval.least
    assert (seen >= low).all() and (seen <= high).all(), f"{what}: {seen.tolist()} not in [{low}, {high}]"
    assert not (seen.abs() < least).any(), f"{what}: {seen.tolist()}, at least {least}"


@st.composite
def values(draw: Callable[..., Any]) -> Tensor:
    drawn = draw(st.lists(numbers, min_size=1, max_size=12))
    return torch.tensor(drawn, dtype=torch.float64).to(draw(st.sampled_from(DTYPES)))


def clamped(p: Program, draw: Callable[..., Any]) -> fx.Node:
    low, high = draw(st.none() | numbers), draw(st.none() | numbers)
    x = p.data(draw(values()))
    return x if low is None and high is None else p.call(torch.clamp, x, low, high)


def named(name: str, made: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def op(*args: Any) -> Tensor:
        return made(*args)

    op.__name__ = name
    return op


def test_operands_the_other_way_round() -> None:
    graph = fx.Graph()
    x = graph.call_function(torch.tanh, (graph.placeholder("x"),))
    y = graph.call_function(torch.ops.aten.rsub.Scalar, (x, 2))
    for node in graph.nodes:
        node.meta["val"] = torch.zeros(3)
    assert (find_bounds(graph)[y].low, find_bounds(graph)[y].high) == (1.0, 3.0)


def test_every_function_with_a_bound_is_tried() -> None:
    assert set(UNARY_OPS) == set(UNARY) and set(BINARY_OPS) == set(BINARY)


@pytest.mark.parametrize("name", UNARY)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_value_of_a_function_leaves_its_interval(name: str, data: st.DataObject) -> None:
    p = Program()
    p.call(named(name, UNARY_OPS[name]), clamped(p, data.draw))
    p.check()


@pytest.mark.parametrize("name", BINARY)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_value_of_two_leaves_its_interval(name: str, data: st.DataObject) -> None:
    p = Program()
    a, b = (clamped(p, data.draw) if data.draw(st.booleans()) else data.draw(numbers) for _ in range(2))
    if not isinstance(a, fx.Node) and not isinstance(b, fx.Node):
        a = clamped(p, data.draw)
    sizes = [n.meta["val"].numel() for n in (a, b) if isinstance(n, fx.Node)]
    if len(sizes) == 2 and sizes[0] != sizes[1]:
        a = p.call(torch.narrow, a, 0, 0, 1)
    op = BINARY_OPS[name] if isinstance(a, fx.Node) or "rsub" not in name else torch.sub
    p.call(named(name, op), a, b) if op is BINARY_OPS[name] else p.call(op, a, b)
    p.check()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_value_of_a_chain_leaves_its_interval(data: st.DataObject) -> None:
    p = Program()
    x = clamped(p, data.draw)
    for _ in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()):
            name = data.draw(st.sampled_from(sorted(UNARY)))
            x = p.call(named(name, UNARY_OPS[name]), x)
        else:
            name = data.draw(st.sampled_from(["add", "sub", "mul", "div"]))
            x = p.call(named(name, BINARY_OPS[name]), x, data.draw(numbers))
        if data.draw(st.integers(0, 3)) == 0:
            x = p.call(aten._to_copy.default, x)
            x = p.call(data.draw(st.sampled_from(["float", "double"])), x, method=True)
    p.check()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_whole_numbers_that_wrap_around_have_no_bound(data: st.DataObject) -> None:
    p = Program()
    dtype = data.draw(st.sampled_from([torch.int8, torch.uint8, torch.int32, torch.int64]))
    info = torch.iinfo(dtype)
    whole = st.integers(max(info.min, -(2**62)), min(info.max, 2**62))
    x = p.data(torch.tensor(data.draw(st.lists(whole, min_size=1, max_size=5)), dtype=dtype))
    x = p.call(torch.clamp, x, *sorted(data.draw(st.tuples(whole, whole))))
    for _ in range(2):
        op = data.draw(st.sampled_from([torch.add, torch.sub, torch.mul]))
        x = p.call(op, x, data.draw(st.integers(0, 127)))
    p.call(torch.abs, x) if info.min else None
    p.check()


# --- what was claimed once, and was wrong
def least_after(*steps: Callable[[Program, fx.Node], fx.Node], dtype: torch.dtype = torch.float32) -> float:
    p = Program()
    x = p.data(torch.zeros(3, dtype=dtype))
    for step in steps:
        x = step(p, x)
    p.check()
    return find_bounds(p.graph)[x].least


def test_a_factor_that_a_cast_makes_zero_is_not_bounded() -> None:
    bounded = lambda p, x: p.call(torch.sigmoid, x)  # noqa: E731
    assert least_after(lambda p, x: p.call(torch.clamp, x, 0, 1), bounded) == pytest.approx(0.5)
    for dtype in (torch.int64, torch.bool):
        prims = torch.ops.prims.convert_element_type.default
        assert least_after(bounded, lambda p, x, op=prims, to=dtype: p.call(op, x, to)) == 0


def test_a_factor_that_cancels_in_its_dtype_is_not_bounded() -> None:
    """100,000,003 is 100,000,000 in float32, and less so much 0: the interval of real numbers was [3, 4]."""
    steps = (lambda p, x: p.call(torch.clamp, x, 1e8 + 3, 1e8 + 4), lambda p, x: p.call(torch.sub, x, 1e8))
    assert least_after(*steps) == 0
    assert least_after(*steps, dtype=torch.float64) == 3


@pytest.mark.parametrize("spread", [
    lambda p, x: p.call(operator.getitem, p.call(torch.var_mean, x), 0),
    lambda p, x: p.call(torch.mean, p.call(torch.pow, x, 2)),
    lambda p, x: p.call(torch.mean, p.call(torch.mul, x, x)),
])  # fmt: skip
def test_a_spread_and_an_epsilon_stay_away_from_zero(spread: Callable[[Program, fx.Node], fx.Node]) -> None:
    assert least_after(spread, lambda p, x: p.call(torch.add, x, 1e-5)) == pytest.approx(1e-5)
    assert least_after(spread) == least_after(lambda p, x: p.call(torch.mul, x, p.data(torch.ones(3)))) == 0


def test_a_limit_below_the_smallest_number_of_its_dtype_bounds_nothing() -> None:
    assert least_after(lambda p, x: p.call(torch.clamp, x, 1e-50, 1)) == 0
    assert least_after(lambda p, x: p.call(torch.clamp, x, 1e-50, 1), dtype=torch.float64) == 1e-50


def test_other_bits_have_other_bounds() -> None:
    steps = (lambda p, x: p.call(torch.clamp, x, 1, 2), lambda p, x: p.call("view", x, torch.float16, method=True))
    assert least_after(*steps) == 0


def test_ends_that_are_met_exactly_stay() -> None:
    """Else factors of at least 1, which nothing has to guard, would be measured in every step."""
    assert least_after(lambda p, x: p.call(torch.relu, x), lambda p, x: p.call(torch.exp, x)) == 1
    assert least_after(lambda p, x: p.call(torch.sigmoid, x), lambda p, x: p.call(torch.add, x, 1)) == 1
    assert "view" in MOVES

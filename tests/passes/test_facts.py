"""What is said of values without looking at them: masks, places that hold zeros, permutations, folded constants."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, fx, nn
from torch._dynamo import mark_static_address

from revfx.passes.facts import (
    PERMUTATION,
    ZEROS_AND_ONES,
    Fact,
    ancestors,
    annotate,
    facts_of,
    find_masks,
    fold_constants,
    is_mask,
    make_fact_check,
)
from revfx.rules import aten


MANY = settings(max_examples=150, deadline=None, derandomize=True)
WIDTH = 4
PAIRS: tuple[Callable[[Any, Any], Tensor], ...] = (
    torch.mul, torch.add, torch.sub, torch.div, torch.rsub, torch.maximum, operator.mul, operator.sub,
    aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor,
)  # fmt: skip
TURNED: tuple[Callable[[Any], Tensor], ...] = (
    torch.neg, torch.logical_not, torch.clone, torch.detach, torch.sin, torch.abs,
    lambda t: t.float(), lambda t: t.to(torch.int64), lambda t: t.bool(),
)  # fmt: skip
NUMBERED: tuple[Callable[[Any, Any], Tensor], ...] = (torch.rsub, torch.mul, operator.sub, operator.truediv)
MOVED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("transpose", (0, -1)), ("flip", (-1,)), ("roll", (1, -1)), ("expand", (3, WIDTH)), ("unsqueeze", (0,)),
    ("contiguous", ()), ("float", ()), ("to", (torch.int64,)), ("bool", ()), ("double", ()), ("neg", ()),
    ("__rsub__", (1,)),
)  # fmt: skip


class Values:
    """A graph whose nodes carry the values that they have, and what is known of them at first."""

    def __init__(self) -> None:
        self.graph = fx.Graph()

    def given(self, value: Tensor) -> fx.Node:
        node = self.graph.placeholder(f"x{len(self.graph.nodes)}")
        node.meta["val"] = value
        if is_mask(value):
            node.meta["facts"] = (ZEROS_AND_ONES,)
        return node

    def call(self, target: Any, *args: Any) -> fx.Node | None:
        """The node of an operation; None where torch does not take these operands."""
        real = fx.map_arg(args, lambda n: n.meta["val"])
        try:
            value = getattr(real[0], target)(*real[1:]) if isinstance(target, str) else target(*real)
        except (RuntimeError, TypeError, IndexError):
            return None
        made = (
            self.graph.call_method(target, args) if isinstance(target, str) else self.graph.call_function(target, args)
        )
        made.meta["val"] = value
        return made


def grown(data: st.DataObject, starts: list[fx.Node], values: Values) -> None:
    """Draws operations on what there is."""
    found = [*starts]
    for _ in range(data.draw(st.integers(1, 10))):
        a, kind = data.draw(st.sampled_from(found)), data.draw(st.integers(0, 4))
        if kind == 0:
            name, args = data.draw(st.sampled_from(MOVED))
            node = values.call(name, a, *args)
        elif kind == 1:
            node = values.call(data.draw(st.sampled_from(TURNED)), a)
        elif kind == 2:
            node = values.call(data.draw(st.sampled_from(NUMBERED)), *_one_and(a, data))
        else:
            node = values.call(data.draw(st.sampled_from(PAIRS)), a, data.draw(st.sampled_from(found)))
        if node is not None:
            found.append(node)


def _one_and(a: fx.Node, data: st.DataObject) -> tuple[Any, Any]:
    number = data.draw(st.sampled_from((0, 1, 1.0, 2)))
    return data.draw(st.sampled_from(((a, number), (number, a))))


def tensors(draw: st.DrawFn | Any, like: str) -> Tensor:
    shape = draw(st.sampled_from(((WIDTH,), (3, WIDTH), (1, WIDTH), (3, 1))))
    numbers = {"mask": st.sampled_from((0.0, 1.0)), "data": st.sampled_from((-1.5, 0.0, 0.25, 1.0, 3.0))}[like]
    count = torch.Size(shape).numel()
    flat = draw(st.lists(numbers, min_size=count, max_size=count))
    return torch.tensor(flat, dtype=torch.float64).reshape(shape)


@MANY
@given(data=st.data())
def test_masks_are_what_they_are_said_to_be_and_zeros_are_there(data: st.DataObject) -> None:
    values = Values()
    starts = [values.given(tensors(data.draw, "mask")) for _ in range(2)]
    starts += [values.given(tensors(data.draw, "data")), values.given(tensors(data.draw, "mask") != 0)]
    grown(data, starts, values)
    found = find_masks(values.graph)
    for node, mask in found.of.items():
        root, held = mask.root.meta["val"] != 0, node.meta["val"]
        assert torch.equal(held.double(), (root == mask.value).double().broadcast_to(held.shape)), node.format_node()
    for node, places in found.zero.items():
        held = node.meta["val"]
        for root, value in places:
            there = ((root.meta["val"] != 0) == value).broadcast_to(held.shape)
            assert not (there & (held.nan_to_num() != 0)).any(), node.format_node()


def test_masked_couplings_are_seen_in_the_property() -> None:
    """The terms of `b*x + (1-b)*t`, without which it would hold of nothing."""
    values = Values()
    b, x = values.given(torch.tensor([1.0, 0.0, 0.0, 1.0])), values.given(torch.randn(3, 4))
    kept, turned = values.call(torch.mul, b, x), values.call(torch.rsub, b, 1)
    assert kept is not None and turned is not None
    other = values.call(torch.mul, turned, x)
    found = find_masks(values.graph)
    assert other is not None and not found.of[turned].value
    assert (found.zero[kept], found.zero[other]) == (frozenset({(b, False)}), frozenset({(b, True)}))


class Holds(nn.Module):
    """A graph's owner, with a permutation."""

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.register_buffer("order", order)


@MANY
@given(data=st.data())
def test_what_is_said_to_be_a_permutation_is_one(data: st.DataObject) -> None:
    values = Values()
    order = torch.tensor(data.draw(st.permutations(range(WIDTH))))
    start = values.graph.get_attr("order")
    start.meta["val"] = order
    other = values.given(torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=WIDTH, max_size=WIDTH))))
    known = {other: [f for _, f in facts_of([other.meta["val"]])]}
    grown(data, [start, other], values)
    found = annotate(values.graph, known, Holds(order))
    assert PERMUTATION in found[start]
    for node, facts in found.items():
        if PERMUTATION in facts:
            assert sorted(node.meta["val"].tolist()) == list(range(WIDTH)), node.format_node()


@MANY
@given(data=st.data())
def test_constants_are_what_the_operations_give(data: st.DataObject) -> None:
    values, start = Values(), data.draw(st.integers(0, 2))
    made = [values.call(aten.arange.start, start, start + WIDTH), values.call(aten.full.default, [WIDTH], start)]
    made += [values.call(aten.ones.default, [WIDTH]), values.given(torch.arange(WIDTH))]
    index = values.given(torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=WIDTH, max_size=WIDTH))))
    mark_static_address(index.meta["val"], guard=False)
    facts = {index: tuple(f for _, f in facts_of([index.meta["val"]]) if f != ZEROS_AND_ONES)}
    found = [*(n for n in made if n is not None), index]
    for _ in range(data.draw(st.integers(1, 6))):
        a, b = data.draw(st.sampled_from(found)), data.draw(st.sampled_from(found))
        pair = data.draw(st.sampled_from((aten.add.Tensor, aten.remainder.Tensor, aten.lt.Tensor, aten.mul.Tensor)))
        one = data.draw(st.sampled_from((aten.flip.default, aten.cumsum.default)))
        node = values.call(one, a, [0] if one is aten.flip.default else 0) if a is b else values.call(pair, a, b)
        found += [] if node is None else [node]
    unknown = PERMUTATION in facts[index]
    folded = fold_constants(values.graph, facts)
    assert all(n in folded for n in made[:1]) and (index in folded) is not unknown
    for node, held in folded.items():
        assert held.dtype == node.meta["val"].dtype and torch.equal(held, node.meta["val"])
        assert not held.is_floating_point()
        if node is not index and index in ancestors([node]):  # what rests on an input is to be checked in a run
            (fact,) = facts[node]
            assert make_fact_check(fact, "", "")[0](held) and not make_fact_check(fact, "", "")[0](held + 1)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor([2, 0, 1]), (PERMUTATION,)),
        (torch.tensor([1, 0]), (PERMUTATION, ZEROS_AND_ONES)),
        (torch.tensor([1, 1]), ((1, 1),)),
        (torch.tensor([3]), ((3,),)),
        (torch.tensor([0.0, 1.0, 1.0]), (ZEROS_AND_ONES,)),
        (torch.tensor([0.0, 1.0, 2.0]), ()),
        (torch.tensor([0.0, 1.0], requires_grad=True), ()),
        (torch.tensor([[1, 0], [0, 1]]), (ZEROS_AND_ONES,)),
        (torch.tensor([True, False]), ()),
        (torch.zeros(0), ()),
    ],
    ids=str,
)
def test_facts_of_an_input(value: Tensor, expected: tuple[Fact, ...]) -> None:
    given = tuple(f for f in expected if isinstance(f, str))
    assert tuple(f for _, f in facts_of([value])) == given, "numbers are those of one call"
    mark_static_address(value, guard=False)
    assert tuple(f for _, f in facts_of([value])) == expected

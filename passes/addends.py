"""Which values of a compiled graph may be so large that a stream loses its digits next to them.

What a network computes is of ordinary size. Of masks this can't be said: they hold -1e9, the lowest number or -inf, as
a buffer, as a number in the program, or as an input. Whatever follows from them is followed, up to where a function is
bounded; a stream that such a value is added to is kept.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from revfx.passes.bounds import Interval, bounds
from revfx.passes.facts import HUGE as SEEN
from revfx.passes.names import MIXERS, SUMS, bare
from revfx.rules import op_name


ORDINARY, GIVEN, HUGE = 0, 1, 2  # as networks compute it; an input of the step, or a multiple of one; a mask
# Of these an argument that is a number is one that elements of the result may be, or are multiplied by.
VALUED = frozenset("full full_like fill mul div add sub rsub masked_fill where scalar_tensor constant_pad_nd".split())
NORMALISED = frozenset(
    """exp native_layer_norm native_group_norm _native_batch_norm_legit_functional native_batch_norm
    _native_batch_norm_legit _fused_rms_norm""".split()
)  # `exp`: of a mask it is 0


def addends(graph: fx.Graph, inputs: Collection[fx.Node], facts: Mapping[fx.Node, Sequence[str]]) -> frozenset[fx.Node]:
    """Return the nodes of a graph whose values may be huge, as far as that follows from numbers in the program and from
    `facts`: also `inputs` of the step, of which nothing is known, until they are mixed.
    """
    found: dict[fx.Node, int] = {}
    within = bounds(graph)
    for node in graph.nodes:
        if SEEN in facts.get(node, ()):
            found[node] = HUGE
        elif node.op == "placeholder":
            floating = isinstance(val := node.meta.get("val"), Tensor) and val.is_floating_point()
            found[node] = GIVEN if node in inputs and floating else ORDINARY
        else:
            found[node] = _level(node, found, within) if node.op == "call_function" else ORDINARY
    return frozenset(n for n, level in found.items() if level > ORDINARY)


def _level(node: fx.Node, found: Mapping[fx.Node, int], within: Mapping[fx.Node, Interval]) -> int:
    val, name = node.meta.get("val"), bare(op_name(node.target))
    dtype = val.dtype if isinstance(val, Tensor) else None
    if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
        return ORDINARY
    if dtype is not None and name in VALUED and has_huge(node, dtype):
        return HUGE
    if name in NORMALISED or (dtype is not None and within[node].most < hides(dtype)):
        return ORDINARY
    operands: Any = node.all_input_nodes
    if "scaled_dot_product" in name:  # means of the values; masks only tell of which
        operands = [n for n in node.args[2:3] if isinstance(n, fx.Node)]
    level = max((found[n] for n in operands), default=ORDINARY)
    mixes = name in MIXERS or (name in SUMS and len(operands) > 1)
    return ORDINARY if level == GIVEN and mixes else level


def has_huge(node: fx.Node, dtype: torch.dtype) -> bool:
    """Return whether an argument of a node is a number next to which ordinary ones lose digits."""
    numbers = [
        x for x in (*node.args, *node.kwargs.values()) if isinstance(x, (int, float)) and not isinstance(x, bool)
    ]
    if bare(op_name(node.target)) == "div":
        numbers = [1 / x if x else math.inf for x in numbers]
    return any(not abs(x) < hides(dtype) for x in numbers)


def hides(dtype: torch.dtype) -> float:
    """Return the size of a number next to which a number of size 1 loses half of its digits."""
    return torch.finfo(dtype).eps ** -0.5

"""Which sums may come as near to zero as rounding, without being zero: those of numbers on grids.

The sum of 0.1, 0.2 and -0.3 is 6e-17, and which side of zero it lies on is all that relu's backward asks for. A value
whose zeros alone are put back where they were (see `revfx.passes.regenerate`) can't be such a sum. Inputs, weights and
rows of tables are taken for numbers without a pattern: only what was rounded to a grid, or comes from a function of
which nothing is known, makes sums of this kind.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx

from revfx.passes.atoms import (
    JOINS,
    MAKERS,
    MIXERS,
    NONE,
    PERHAPS,
    PICKS,
    PRODUCTS,
    RARE,
    SMOOTH,
    SUMS,
    SUMS_WITH_PRODUCT,
)
from revfx.rules import op_name


ROUNDERS = frozenset(
    """round floor ceil trunc fix frac sign sgn heaviside floor_divide floordiv __floordiv__ trunc_divide bucketize
    searchsorted fake_quantize_per_tensor_affine fake_quantize_per_channel_affine quantize_per_tensor""".split()
)
KNOWN = MAKERS | PICKS | JOINS | SMOOTH | SUMS | SUMS_WITH_PRODUCT | PRODUCTS | {"copy"}

# The numbers that a value takes with positive probability: zero at most, any, those of a grid, and sums of these.
ZERO, ANY, GRID, SUM = 0, 1, 2, 3


def near_zeros(graph: fx.Graph, levels: Mapping[fx.Node, int]) -> list[fx.Node]:
    """The nodes of a graph that may be sums of numbers on grids; `levels` says which have atoms."""
    kinds: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            kinds[node] = ANY
        elif node.op != "output":
            kinds[node] = _kind(node, levels, kinds)
    return [node for node, kind in kinds.items() if kind == SUM]


def _kind(node: fx.Node, levels: Mapping[fx.Node, int], kinds: Mapping[fx.Node, int]) -> int:
    if node.op == "call_module" or node.meta.get("opaque", False):
        return GRID
    if levels[node] == NONE:
        return ZERO
    name = op_name(node.target)
    bare = name if name.endswith("__") else name.rstrip("_")
    operands = [kinds[n] if levels[n] > NONE else ZERO for n in node.all_input_nodes]
    if bare in ROUNDERS or node.kwargs.get("rounding_mode") is not None or _to_whole_numbers(node):
        return GRID
    if bare in MIXERS or not operands:
        return ZERO if bare in MIXERS else ANY
    if bare in SUMS and len(operands) == 2:
        theirs = [levels[n] for n in node.all_input_nodes]
        if levels[node] > min(PERHAPS, *theirs):  # one of them cancels, and leaves some part of the other
            return GRID
        return SUM if max(operands) >= GRID and min(operands) >= ANY else max(operands)
    if bare in PRODUCTS and len(operands) == 2 and min(levels[n] for n in node.all_input_nodes) <= RARE:
        return ZERO
    return (
        max(operands) if bare in KNOWN or bare in SUMS or bare in PRODUCTS or bare == "copy" else max(GRID, *operands)
    )


def _to_whole_numbers(node: fx.Node) -> bool:
    made, read = node.meta.get("val"), [n.meta.get("val") for n in node.all_input_nodes]
    return (
        isinstance(made, Tensor)
        and not (made.is_floating_point() or made.is_complex() or str(made.dtype) == "torch.bool")
        and any(isinstance(t, Tensor) and t.is_floating_point() for t in read)
    )

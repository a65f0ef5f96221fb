"""Values that cross the border between two steps, which a fusing compiler must not defer.

A fusing compiler computes a cheap value where it is read, from the inputs of its maker, and merges readers of the
same values into one kernel. Over a chain of steps that keeps alive what every step made: the velocity's gradient in a
momentum net, `0.9*g + h`, is read four steps on as a sum of five `h`; a log-determinant, or the gradient of a shared
weight, becomes one sum at the very end; what only depends on a side input is computed for all steps at once. So a value
that is read in a later step is *stored* where it is made, and nodes are marked with their `STEP`, by which the compiler
is told not to fuse beyond neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from operator import getitem
from typing import Any

from torch import Tensor, fx

from revfx.passes import _torch
from revfx.passes.sizes import fixed


STEP = "revfx_step"  # key of `node.meta`
POLICY = ("recompute", "ac_graph_id")  # keys by which torch's partitioner is told what to do with this very node


Stored = tuple[Callable[..., Tensor], Callable[[Tensor], tuple[object, ...]]]


def store_borders(step_of: Mapping[fx.Node, int], spared: Collection[fx.Node], stored: Stored) -> None:
    """Mark nodes with their step (`step_of`), and store values that cross a border, except the `spared` nodes.

    `stored` is an operator, an identity that the compiler does not look through, and its further arguments for a value.
    """
    operator, further = stored
    # of a part of a split, the split says whether it lies in another's memory
    makers = {n: n.args[0] if n.target is getitem else n for n in step_of}
    views = {n for n, maker in makers.items() if isinstance(maker, fx.Node) and _torch.may_alias(maker.target)}
    for node in [n for n in step_of if n not in spared and n not in views and _outlives(n, step_of[n], step_of, views)]:
        if not isinstance(val := node.meta.get("val"), Tensor) or not fixed(val.shape):
            continue
        with node.graph.inserting_before(node.next):
            arguments: tuple[Any, ...] = (node, *further(val))
            new = node.graph.call_function(operator, arguments)
        new.meta = {k: v for k, v in node.meta.items() if k not in POLICY}
        node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
        new.meta[STEP] = step_of[node]
    for node, step in step_of.items():
        node.meta[STEP] = step


def _outlives(node: fx.Node, step: int, step_of: Mapping[fx.Node, int], views: Collection[fx.Node]) -> bool:
    """Return whether a value is read after a step, itself or through views."""
    return any(step_of.get(u, step) > step or (u in views and _outlives(u, step, step_of, views)) for u in node.users)

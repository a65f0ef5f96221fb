"""Values that cross the border between two steps: a fusing compiler must store them rather than defer them.

A fusing compiler computes a cheap value where it is read, from the operands of its maker. It also merges readers of the
same values into one kernel. Over a chain of steps this keeps the values of every step alive:

- The gradient of the velocity in a momentum net, `0.9*g + h`, is read four steps on as a sum of five `h`.
- A log-determinant, or the gradient of a shared weight, becomes one sum at the very end.
- Values that depend on a side input alone are computed for all steps at once.

So a value that is read in a later step is *stored* where it is made. Nodes are marked with their `STEP`, and the
compiler does not fuse beyond neighbouring steps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from operator import getitem
from typing import Any

from torch import Tensor, fx

from revfx.passes import _torch
from revfx.passes.sizes import is_fixed


STEP = "revfx_step"  # key of `node.meta`
POLICY = ("recompute", "ac_graph_id")  # keys of instructions to torch's partitioner that hold for one node alone


# An operator, an identity that the compiler does not look through, and its further arguments for a value.
Stored = tuple[Callable[..., Tensor], Callable[[Tensor], tuple[object, ...]]]


def store_borders(step_of: Mapping[fx.Node, int], spared: Collection[fx.Node], stored: Stored) -> None:
    """Mark nodes with their step, and store values that cross a border.

    Args:
        step_of: the number of each node's step.
        spared: nodes that are not stored.
        stored: the identity that stores.
    """
    operator, further = stored
    views: set[fx.Node] = set()
    for node in step_of:
        # For a part of a split, the split tells whether it shares memory with its operand.
        maker = node.args[0] if node.target is getitem else node
        if isinstance(maker, fx.Node) and _torch.may_alias(maker.target):
            views.add(node)
    crossing: list[fx.Node] = []
    for node, step in step_of.items():
        if node not in spared and node not in views and _outlives(node, step, step_of, views):
            crossing.append(node)
    for node in crossing:
        val = node.meta.get("val")
        if not isinstance(val, Tensor) or not is_fixed(val.shape):
            continue
        with node.graph.inserting_before(node.next):
            arguments: tuple[Any, ...] = (node, *further(val))
            new = node.graph.call_function(operator, arguments)
        new.meta = copy_meta(node)
        node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
        new.meta[STEP] = step_of[node]
    for node, step in step_of.items():
        node.meta[STEP] = step


def copy_meta(node: fx.Node) -> dict[str, Any]:
    """Return the metadata for another node with the result of `node`."""
    return {k: v for k, v in node.meta.items() if k not in POLICY}


def _outlives(node: fx.Node, step: int, step_of: Mapping[fx.Node, int], views: Collection[fx.Node]) -> bool:
    """Return whether a value is read after a step, itself or through views."""
    for user in node.users:
        if step_of.get(user, step) > step:
            return True
        if user in views and _outlives(user, step, step_of, views):
            return True
    return False

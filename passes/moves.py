"""The rules of a graph's nodes, and the nodes that take values apart."""

from __future__ import annotations

import operator

from torch import Tensor, fx

from revfx.passes.sizes import no_new_guards
from revfx.rules import Direction, rule_for


def directions_of(node: fx.Node) -> list[Direction]:
    """Return the directions of a node's rule, if all sizes are fixed, and declared inverses of the node."""
    if "directions" in node.meta:
        return list(node.meta["directions"])
    rule, declared = rule_for(node), [*node.meta.get("declared", ())]
    if rule is None or node.meta.get("barrier") is not None or not node.all_input_nodes:
        return declared
    with no_new_guards(node):
        return [*rule(node), *declared]
    return declared


def taken_apart(node: fx.Node) -> fx.Node | None:
    """Return the tuple, list or dict that this node takes a part of; None for other nodes."""
    source = node.args[0] if node.target is operator.getitem else None
    return source if isinstance(source, fx.Node) and not isinstance(source.meta.get("val"), Tensor) else None

"""The directions of a graph's nodes by their rules, and nodes that take a tuple, list or dict apart."""

from __future__ import annotations

import operator
from collections.abc import Iterable

from torch import Tensor, fx

from revfx.passes.sizes import no_new_guards
from revfx.rules import Direction, Inverse, rule_for


def directions_of(node: fx.Node) -> list[Direction]:
    """Return the directions of a node's rule and its declared inverses.

    A rule that needs a symbolic size yields nothing.
    """
    rule, declared = rule_for(node), [*node.meta.get("declared", ())]
    if rule is None or node.meta.get("barrier") is not None or not node.all_input_nodes:
        return declared
    with no_new_guards(node):
        return [*rule(node), *declared]
    return declared  # the context ended early


def container_of(node: fx.Node) -> fx.Node | None:
    """Return the tuple, list or dict from which this node takes a part; None for other nodes."""
    if node.target is not operator.getitem:
        return None
    source = node.args[0]
    if isinstance(source, fx.Node) and not isinstance(source.meta.get("val"), Tensor):
        return source
    return None


def given_nodes(inverse: Inverse) -> list[fx.Node]:
    """Return the operands that an inverse reads besides the result; others of `given` are numbers."""
    return [g for g in inverse.given if isinstance(g, fx.Node)]


def arc_text(head: fx.Node, tail: Iterable[fx.Node], how: str) -> str:
    """Return the readable line of an arc."""
    return f"{head.name} <- {', '.join(node.name for node in tail)}  ({how})"

"""Inverses that are calls of the user's, or of a library's: given what the call was given, with the result in place of
its first tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from revfx.rules import Direction, Inverse, Rule


def by_call(back: Callable[..., Any], node: fx.Node, x: fx.Node, y: fx.Node, name: str, runs: bool = False) -> Inverse:
    """Return the inverse of `y, ... = node(x, ...)`; `x, ... = back(y, ...)`."""
    others = tuple(n for n in node.all_input_nodes if n is not x)

    def by(result: Tensor, *tensors: Tensor) -> Tensor:
        values: dict[fx.Node, Any] = {**dict(zip(others, tensors, strict=True)), x: result}
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        return pytree.tree_leaves(back(*args, **kwargs))[0]

    return Inverse(x, by, others, result=y, declared=name, runs=runs)


def by_method(by: str | Callable[..., Any]) -> Rule:
    """Return the rule of modules called whole: `y, ... = m(x, ...)`; `x, ... = m.inverse(y, ...)`, of that name, or
    what a function gives of the module and the same arguments.
    """

    def rule(node: fx.Node) -> Iterator[Direction]:
        ref, first = node.meta["module"], next(iter(pytree.tree_leaves(node.meta["val"])), None)
        y = next((n for n in _parts(node) if n.meta.get("val") is first), None)

        def back(*args: Any, **kwargs: Any) -> Any:
            return getattr(ref(), by)(*args, **kwargs) if isinstance(by, str) else by(ref(), *args, **kwargs)

        if y is not None and node.all_input_nodes:
            yield by_call(back, node, node.all_input_nodes[0], y, type(ref()).__name__, runs=True)

    return rule


def _parts(node: fx.Node) -> Iterator[fx.Node]:
    """Yield a node and what takes its result apart."""
    yield node
    for part in (n for n in node.users if n.target is operator.getitem):
        yield from _parts(part)

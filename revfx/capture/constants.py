"""What Python asks of buffers while a forward is recorded: whether a flag is set, where a mask is.

It gets the numbers that are there, and the plan that this leads to is valid while they stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from revfx.ambient import all_generators, drew
from revfx.capture.untraceable import ASKS, Untraceable
from revfx.capture.whole import told_to_invert
from revfx.eager.calls import tensors
from revfx.errors import Reason
from revfx.passes._torch import may_draw, no_dispatch
from revfx.passes.facts import LIMIT, ancestors, is_mask
from revfx.rules import op_name


class Constants:
    """The values of a graph's nodes that follow from buffers, and from Python's numbers, alone.

    `held` is what attributes stand for that are no parameters and have not been written to.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.held: dict[fx.Node, Tensor] = {}
        self.values: dict[fx.Node, Any] = {}
        self.made: dict[int, list[fx.Node]] = {}  # what was folded, by the memory that it lives in

    def hold(self, node: fx.Node, t: Tensor) -> None:
        """Note what an attribute stands for."""
        if not t.requires_grad:
            self.held[node] = t
        if _is_whole(t) or is_mask(t):
            node.meta["constant"] = t

    def forget(self, memory: int) -> None:
        """Forget what lives in some memory, which is written to; refuse that where its numbers were asked for."""
        spoilt = [n for n in self.held if n.meta["storage"][0] == memory]
        if any("asked" in n.meta for n in spoilt):
            raise Untraceable(f"{ASKS}, and then it writes to that", once=True, kind=Reason.DATA_DEPENDENT)
        for node in spoilt:
            del self.held[node]
            if not any("constant" in user.meta for user in node.users):
                node.meta.pop("constant", None)
        for node in self.made.pop(memory, ()):
            node.meta.pop("constant", None)

    def asked(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Return what `function` gives of nodes; the attributes that they follow from are marked, to be guarded.
        Untraceable where they do not follow from constants alone; it names the function that may be called whole.
        """
        asked: list[fx.Node] = []
        fx.map_arg((args, kwargs), asked.append)
        above = ancestors(asked)
        drawn = all_generators()
        try:
            for node in self.graph.nodes:
                if node in above and node not in self.values:
                    if node not in self.held and not is_pure(node):
                        raise Untraceable(ASKS, kind=Reason.DATA_DEPENDENT)
                    self.values[node] = self.held[node] if node in self.held else _result(node, self.values)
            found = _called(function, args, kwargs, self.values)
            if may_draw(op_name(function), args, kwargs) or drew(drawn, all_generators()) is not None:
                raise Untraceable(ASKS, kind=Reason.DATA_DEPENDENT)
        except Untraceable as e:
            e.whole = told_to_invert()
            raise
        for node in above:
            if node.op == "get_attr":
                node.meta.update(constant=self.values[node], asked=True)
        return found

    def fold(self, node: fx.Node) -> None:
        """Note what a node holds that is computed from indices and masks whose numbers are noted, or from none."""
        made, inputs = tensors(node.meta.get("val")), node.all_input_nodes
        known = "constant" not in node.meta and all("constant" in n.meta for n in inputs)
        if made and known and all(t.numel() <= LIMIT for t in made) and is_pure(node):
            found = _result(node, {n: n.meta["constant"] for n in inputs})
            # masks may be large, and are made again
            node.meta.update(constant=found, kept=all(_is_whole(t) and t.dtype != torch.bool for t in made))
            self.made.setdefault(_memory(node), []).append(node)

    def fold_all(self) -> None:
        """Note the same of all nodes, once writes that nothing else sees are functional."""
        writes = [n for n in self.graph.nodes if "mutates" in n.meta and "made_functional" not in n.meta]
        written = {w.meta["storage"][0] for n in writes for w in n.meta["mutates"]}
        for node in self.graph.nodes:
            if _memory(node) not in written:
                self.fold(node)


def positions(index: Any, nodes: Mapping[int, fx.Node], call: Callable[..., Any]) -> Any:
    """Return an index with the positions that masks hold, where their numbers are known, in place of these.

    `nodes` has the node of a tensor by its id; `call` records a function, given its types, arguments and keywords.
    """
    if isinstance(index, tuple):
        return tuple(positions(i, nodes, call) for i in index)
    if isinstance(index, Tensor) and (index.dtype, index.dim()) == (torch.bool, 1):
        if (node := nodes.get(id(index))) is not None and "constant" in node.meta:
            return call(torch.flatten, (), (call(torch.nonzero, (), (index,)),))
    return index


def _memory(node: fx.Node) -> int:
    return node.meta["storage"][0] if "storage" in node.meta else -1


def is_pure(node: fx.Node) -> bool:
    """Return whether running an operation again gives the same, and changes nothing."""
    runs = node.op in ("call_function", "call_method") and not node.meta.get("opaque")
    writes = "mutates" in node.meta and "made_functional" not in node.meta
    return runs and not writes and not may_draw(op_name(node.target), node.args, node.kwargs)


def _result(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    function: Any = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
    return _called(function, node.args, node.kwargs, values)


def _called(function: Callable[..., Any], args: Any, kwargs: Any, values: Mapping[fx.Node, Any]) -> Any:
    with torch.no_grad(), no_dispatch():
        args, kwargs = fx.map_arg((args, kwargs), values.__getitem__)
        return function(*args, **kwargs)


def _is_whole(t: Tensor) -> bool:
    """Return whether a tensor may be an index or a mask of few elements."""
    return not (t.is_floating_point() or t.is_complex()) and t.numel() <= LIMIT


# --- numbers that change from call to call, such as an annealed temperature: inputs of plans
# What takes a number of the model's as it takes a tensor of one element.
LINEAR = frozenset(
    """add sub subtract rsub lerp mul multiply div divide true_divide truediv iadd isub imul itruediv radd rmul
    rdiv""".split()
)


class Numbers:
    """Numbers recorded as tensors, `of` which module and attribute; `known`: ids, also of what they alone make."""

    def __init__(self) -> None:
        self.of: dict[tuple[int, str], Tensor] = {}
        self.known: set[int] = set()

    def follow(self, name: str, operands: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        """Note what an operation computes of numbers alone; refuse one that takes them otherwise than such a tensor."""
        others = [t for t in operands if id(t) not in self.known]
        if len(others) == len(operands):
            return
        if name.strip("_") not in LINEAR or not all(t.is_floating_point() and t.dim() for t in others):
            text = f"`{name}` reads a number of the model that changes from call to call"
            raise Untraceable(text, kind=Reason.HIDDEN_STATE)
        self.known.update(id(t) for t in made if not others)

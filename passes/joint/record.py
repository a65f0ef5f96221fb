"""Recording of functions of tensors: their aten operations are appended to a graph, with fake results."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._sympy import functions

from revfx.passes import _torch


SYMBOLIC = (torch.SymInt, torch.SymFloat)


class Unrecordable(Exception):
    """A function needs a size or a tensor that the graph does not have."""


class Recorder:
    """Runs functions on the fake results of nodes and appends their operations to the same graph.

    `decompositions` maps operators to functions of the operators that the graph consists of.
    """

    def __init__(self, graph: fx.Graph, decompositions: Mapping[Any, Callable[..., Any]]) -> None:
        self.graph: fx.Graph = graph
        self.decompositions: Mapping[Any, Callable[..., Any]] = decompositions
        self.symbols: dict[str, fx.Node] = {}  # the nodes of symbolic numbers
        for node in graph.nodes:
            val = node.meta.get("val")
            if isinstance(val, SYMBOLIC):
                self.symbols.setdefault(str(val.node.expr), node)

    def record(
        self, function: Callable[..., Tensor], operands: Sequence[fx.Node], tag: str | None, like: fx.Node
    ) -> fx.Node:
        """Record a function, and return the node of its result.

        Args:
            function: the function.
            operands: nodes that it is called with.
            tag: the partitioner's tag for the new nodes.
            like: the node with the same place in the user's code.
        """
        meta: dict[str, Any] = {"partitioner_tag": tag}
        for key in PLACE_KEYS:
            if key in like.meta:
                meta[key] = like.meta[key]
        fakes = [n.meta["val"] for n in operands]
        with torch.no_grad(), fakes[0].fake_mode:
            if len(set(map(id, fakes))) < len(set(operands)):  # copies of a node share their result
                fakes = [t.detach() for t in fakes]
            mode = _RecordingMode(self, dict(zip(map(id, fakes), operands, strict=True)), meta, fakes[0].device)
            with mode:
                result = function(*fakes)
        return mode.nodes[id(result)]

    def size(self, expr: Any) -> fx.Node | float:
        """Return the node of a symbolic number; compute it from others if the graph has none."""
        if expr.is_number:
            return int(expr) if expr.is_integer else float(expr)
        if str(expr) in self.symbols:
            return self.symbols[str(expr)]
        function = SIZE_FUNCTIONS.get(type(expr))
        if function is None:
            raise Unrecordable(f"the size {expr} is not at hand")
        parts = list(map(self.size, expr.args))
        if len(parts) > 1:  # sums and products may have more than two
            result = functools.reduce(functools.partial(self._call, function), parts)
        else:
            result = self._call(function, *parts)
        if isinstance(result, fx.Node):
            self.symbols[str(expr)] = result
        return result

    def _call(self, function: Callable[..., Any], *parts: fx.Node | float) -> fx.Node | float:
        """Return the node of a function of numbers, or the number itself if all of them are constant."""
        val = function(*(n.meta["val"] if isinstance(n, fx.Node) else n for n in parts))
        if isinstance(val, (int, float)):
            return val
        node = self.graph.call_function(function, parts)
        node.meta["val"] = val
        return node


SIZE_FUNCTIONS: dict[type, Callable[..., Any]] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    sympy.Pow: operator.pow,
    functions.PowByNatural: operator.pow,
    functions.Max: torch.sym_max,
    functions.Min: torch.sym_min,
    functions.FloorDiv: operator.floordiv,
    functions.CleanDiv: operator.floordiv,
    functions.Mod: operator.mod,
    functions.PythonMod: operator.mod,
    functions.ToFloat: torch.sym_float,
    functions.IntTrueDiv: operator.truediv,
    functions.FloatTrueDiv: operator.truediv,
    functions.TruncToInt: math.trunc,
    functions.FloorToInt: math.floor,
    functions.CeilToInt: math.ceil,
}
PLACE_KEYS = ("stack_trace", "nn_module_stack", "seq_nr")


class _RecordingMode(TorchDispatchMode):
    """Appends a node for each operator that runs on the fake tensors of `nodes`, by their ids."""

    def __init__(
        self, recorder: Recorder, nodes: dict[int, fx.Node], meta: Mapping[str, Any], device: torch.device
    ) -> None:
        super().__init__()
        self.recorder, self.nodes, self.meta, self.device = recorder, nodes, meta, device
        self.alive: list[Any] = []  # results, as their ids are keys

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.lift_fresh.default and id(args[0]) not in self.nodes:
            return self._constant(*args)
        # Calls from a decomposition arrive here undecomposed, even those that autograd decomposes (`flatten`).
        by_default = None if func.namespace == "prim" else func.decompose
        decomposition = self.recorder.decompositions.get(func, by_default)
        if decomposition is not None:
            with self:
                out = decomposition(*args, **kwargs)
            if out is not NotImplemented:
                return out
        node_args, node_kwargs = pytree.tree_map(self._argument, (args, kwargs))
        out = func(*args, **kwargs)
        if not isinstance(out, (Tensor, list, tuple)):
            return out  # for example the device of a tensor
        node = self._add(func, node_args, node_kwargs, out)
        if not isinstance(out, Tensor):
            for i, part in enumerate(out):
                self._add(operator.getitem, (node, i), {}, part)
        return out

    def _add(self, target: Any, args: Any, kwargs: Any, out: Any) -> fx.Node:
        node = self.recorder.graph.call_function(target, args, kwargs)
        node.meta.update(self.meta, val=out)
        self.alive.append(out)
        self.nodes[id(out)] = node
        return node

    def _constant(self, held: Tensor) -> Tensor:
        """Register a constant of the function as a buffer of the graph's owner; return its fake tensor."""
        graph = self.recorder.graph
        name, owner = f"_revfx_constant{len(graph.nodes)}", graph.owning_module
        assert owner is not None
        with _torch.no_dispatch():
            held = held.to(self.device)  # once, not in every run
        owner.register_buffer(name, held, persistent=False)
        out = torch.ops.aten.lift_fresh.default(held)
        self._add(torch.ops.aten.lift_fresh_copy.default, (graph.get_attr(name),), {}, out)
        return out

    def _argument(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            if id(x) not in self.nodes:
                raise Unrecordable("a tensor that is made from data is not at hand")
            return self.nodes[id(x)]
        if isinstance(x, SYMBOLIC):
            return self.recorder.size(x.node.expr)
        return x


def order_lazily(nodes: Sequence[fx.Node], attached: Mapping[fx.Node, Sequence[fx.Node]]) -> Iterator[fx.Node]:
    """Yield `nodes` in order, each after its operands, which come as late as possible, and before its `attached`."""
    done: set[fx.Node] = set()
    for root in nodes:
        stack = [root]
        while stack:
            node = stack[-1]
            missing = [n for n in node.all_input_nodes if n not in done]
            if node in done:
                stack.pop()
            elif missing:
                stack.extend(reversed(missing))
            else:
                done.add(stack.pop())
                yield node
                stack.extend(reversed(attached.get(node, ())))

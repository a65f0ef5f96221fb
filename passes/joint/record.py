"""Recording of functions of tensors: aten operations with fake results, appended to a graph."""

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
    """A size that the function uses is not at hand in the graph."""


class Recorder:
    """Runs functions on the fake results of nodes and appends their operations to the same graph.

    `decompositions` says how operators are spelled in this graph, as the program around was traced.
    """

    def __init__(self, graph: fx.Graph, decompositions: Mapping[Any, Callable[..., Any]]) -> None:
        self.graph, self.decompositions = graph, decompositions
        self.symbols: dict[str, fx.Node] = {}
        for node in graph.nodes:
            val = node.meta.get("val")
            if isinstance(val, SYMBOLIC):
                self.symbols.setdefault(str(val.node.expr), node)

    def record(self, by: Callable[..., Tensor], tail: Sequence[fx.Node], tag: str | None, like: fx.Node) -> fx.Node:
        """Return the node of `by(*tail)`; new nodes carry the partitioner's `tag` and tell where `like` was written."""
        meta = {"partitioner_tag": tag, **{k: like.meta[k] for k in KEPT if k in like.meta}}
        fakes = [n.meta["val"] for n in tail]
        with torch.no_grad(), fakes[0].fake_mode:
            if len(set(map(id, fakes))) < len(set(tail)):  # copies of a node share their result
                fakes = [t.detach() for t in fakes]
            mode = _Mode(self, dict(zip(map(id, fakes), tail, strict=True)), meta, fakes[0].device)
            with mode:
                result = by(*fakes)
        return mode.nodes[id(result)]

    def size(self, expr: Any) -> fx.Node | float:
        """Return the node that holds a symbolic number; computed from others where there is none."""
        if expr.is_number:
            return int(expr) if expr.is_integer else float(expr)
        if str(expr) in self.symbols:
            return self.symbols[str(expr)]
        if (by := SIZES.get(type(expr))) is None:
            raise Unrecordable(f"the size {expr} is not at hand")
        parts = [self.size(part) for part in expr.args]
        several = len(parts) > 1  # sums and products may have more than two
        result = functools.reduce(lambda a, b: self._made(by, a, b), parts) if several else self._made(by, *parts)
        if isinstance(result, fx.Node):
            self.symbols[str(expr)] = result
        return result

    def _made(self, by: Callable[..., Any], *parts: fx.Node | float) -> fx.Node | float:
        val = by(*(n.meta["val"] if isinstance(n, fx.Node) else n for n in parts))
        if isinstance(val, (int, float)):
            return val
        node = self.graph.call_function(by, parts)
        node.meta["val"] = val
        return node


SIZES: dict[type, Callable[..., Any]] = {
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
KEPT = ("stack_trace", "nn_module_stack", "seq_nr")


class _Mode(TorchDispatchMode):
    def __init__(
        self, recorder: Recorder, nodes: dict[int, fx.Node], meta: Mapping[str, Any], device: torch.device
    ) -> None:
        super().__init__()
        self.recorder, self.nodes, self.meta, self.device = recorder, nodes, meta, device
        self.alive: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.lift_fresh.default and id(args[0]) not in self.nodes:
            return self._constant(*args)
        # calls of a decomposition come here whole, also if autograd would have taken them apart (`flatten`)
        spelled = self.recorder.decompositions.get(func, None if func.namespace == "prim" else func.decompose)
        if spelled is not None:
            with self:
                out = spelled(*args, **kwargs)
            if out is not NotImplemented:
                return out
        node_args, node_kwargs = pytree.tree_map(self._argument, (args, kwargs))
        out = func(*args, **kwargs)
        if not isinstance(out, (Tensor, list, tuple)):
            return out  # such as the device of a tensor
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
        """Return the fake tensor of numbers that the function knows, which the graph's owner now holds."""
        graph = self.recorder.graph
        name, owner = f"_revfx_constant{len(graph.nodes)}", graph.owning_module
        assert owner is not None
        with _torch.no_dispatch():
            held = held.to(self.device)  # at once, not in every run
        owner.register_buffer(name, held, persistent=False)
        out = torch.ops.aten.lift_fresh.default(held)
        self._add(torch.ops.aten.lift_fresh_copy.default, (graph.get_attr(name),), {}, out)
        return out

    def _argument(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            if id(x) not in self.nodes:
                raise Unrecordable("a tensor that is made from data is not at hand")
            return self.nodes[id(x)]
        return self.recorder.size(x.node.expr) if isinstance(x, SYMBOLIC) else x


def pulled(nodes: Sequence[fx.Node], attached: Mapping[fx.Node, Sequence[fx.Node]]) -> Iterator[fx.Node]:
    """Yield `nodes` in order, each as late as it is read, after its operands and before the nodes `attached` to it."""
    done: set[fx.Node] = set()
    for wanted in nodes:
        stack = [wanted]
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

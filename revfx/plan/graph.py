"""The forward of a tape as an fx graph of functional aten operators, for the graph passes."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from revfx.engine.operators import OF_SHAPE, STATISTICS, UNINITIALIZED, is_repeatable
from revfx.engine.tape import Op, Ref, Tape
from revfx.passes._torch import packet_name
from revfx.passes.facts import ZEROS_AND_ONES
from revfx.rules import Inverse


aten: Any = torch.ops.aten


def overwrite(*args: Any) -> Tensor:
    """Stand for an operator that writes to a part of its first argument, or moves it; it is never called."""
    raise AssertionError("a write has no function")


def reread(written: Tensor) -> Tensor:
    """Stand for another view of memory that was written to; it is never called."""
    raise AssertionError("a view of written memory has no function")


@dataclass
class TapeGraph:
    """A graph, and the values and operators of the tape that its nodes stand for."""

    graph: fx.Graph
    lasting: list[fx.Node] = field(default_factory=list[fx.Node])
    node_of: dict[int, fx.Node] = field(default_factory=dict[int, fx.Node])
    value_of: dict[fx.Node, int] = field(default_factory=dict[fx.Node, int])
    op_of: dict[fx.Node, int] = field(default_factory=dict[fx.Node, int])


def graph_of(tape: Tape, is_inverted: bool = False) -> TapeGraph:
    """Build the graph of the operators that the returned values need; nodes carry the metadata that `lower` reads.

    Args:
        tape: the tape.
        is_inverted: the graph is that of a function of the inputs, and not of memory: views of inputs are computed, and
            the content written to a part of a tensor is a value of that part.
    """
    return _Builder(tape, is_inverted).run()


class _Builder:
    def __init__(self, tape: Tape, is_inverted: bool) -> None:
        self.tape, self.made, self.is_inverted = tape, TapeGraph(fx.Graph()), is_inverted
        self.needed = _needed(tape)

    def run(self) -> TapeGraph:
        for number, op in enumerate(self.tape.ops):
            if number in self.needed:
                self._add(number, op)
        self._declare()
        self.made.graph.output(tuple(self._node(v) for v in dict.fromkeys(self.tape.returned)))
        return self.made

    def _declare(self) -> None:
        """Add the declared inverses to the nodes that make their results."""
        nodes = self.made.node_of
        for d in self.tape.declared:
            if d.head not in nodes or d.result not in nodes or d.head == d.result:
                continue
            result = nodes[d.result]
            owner: Any = result.args[0] if result.target is operator.getitem else result
            if owner.op != "call_function":
                continue
            given = tuple(self._node(v) for v in d.given)
            inverse = Inverse(nodes[d.head], d.by, given, result=result, declared=d.name)
            owner.meta["declared"] = (*owner.meta.get("declared", ()), inverse)

    def _node(self, value: int) -> fx.Node:
        """Return the node of a value; if no operator of the graph makes it, a placeholder or another view."""
        node = self.made.node_of.get(value)
        if node is not None:
            return node
        known = self.tape.values[value]
        if known.op is not None and not self.tape.is_outside(value):
            after = next((b for _, b in self.tape.ops[known.op].written if b in self.made.node_of), None)
            if after is not None:
                node = self.made.graph.call_function(reread, (self.made.node_of[after],))
                self.made.op_of[node] = known.op
                self._note(node, value)
                return node
        return self._placeholder(value)

    def _placeholder(self, value: int) -> fx.Node:
        graph = self.made.graph
        first = next((n for n in graph.nodes if n.op != "placeholder"), None)
        with graph.inserting_before(first) if first is not None else graph.inserting_after():
            node = graph.create_node("placeholder", f"x{value}", name=f"x{value}")
        self._note(node, value)
        known = self.tape.values[value]
        role = self.tape.allocations[known.allocation].role
        is_constant = value in self.tape.constants or value in self.tape.fixed
        if (role and role != "input") or is_constant:
            self.made.lasting.append(node)
        elif not (known.view.shape and (known.view.dtype.is_floating_point or known.view.dtype.is_complex)):
            node.meta["kept"] = True  # an index, or a single number
        return node

    def _note(self, node: fx.Node, value: int) -> None:
        """Note the result of a node, and where it lies."""
        known, view = self.tape.values[value], self.tape.values[value].view
        allocation = self.tape.allocations[known.allocation]
        if allocation.is_strided:
            val = torch.empty_strided(view.shape, view.stride, dtype=view.dtype, device="meta")
        else:
            val = torch.empty(view.shape, dtype=view.dtype, device="meta")
            node.meta["kept"] = True
        node.meta["val"] = val
        node.meta["storage"] = known.allocation
        node.meta["storage_nbytes"] = allocation.nbytes
        self.made.node_of[value], self.made.value_of[node] = node, value

    def _add(self, number: int, op: Op) -> None:
        outs = [v for v in op.outs if v is not None]
        fresh = [v for v in (*outs, *(b for _, b in op.written)) if v not in self.made.node_of]
        if not fresh or all(self._is_there(v) for v in fresh):
            return
        target, args, kwargs = self._call(op)
        name = packet_name(target) or getattr(target, "__name__", "")
        node = self.made.graph.create_node("call_function", target, args, kwargs, name=name)
        self.made.op_of[node] = number
        node.meta["where"] = op.where
        if packet_name(target) == "bernoulli":
            node.meta["facts"] = (ZEROS_AND_ONES,)
        keeps = not is_repeatable(op.func)
        results = [*op.outs] if not op.written else [b for _, b in op.written]
        if op.is_single or op.written:
            self._note(node, results[0] if results[0] is not None else fresh[0])
            node.meta["kept"] = node.meta.get("kept", False) or keeps
            for other in results[1:]:
                part = self.made.graph.call_function(reread, (node,))
                self.made.op_of[part] = number
                if other is not None:
                    self._note(part, other)
            return
        node.meta["val"] = tuple(None for _ in op.outs)
        for position, v in enumerate(op.outs):
            if v is None:
                continue
            part = self.made.graph.call_function(operator.getitem, (node, position))
            if v in self.made.node_of:  # such as a part that is the whole
                part.meta.update(self.made.node_of[v].meta)
                self.made.value_of[part] = v
                continue
            self._note(part, v)
            part.meta["kept"] = part.meta.get("kept", False) or keeps
        node.meta["val"] = tuple(None if v is None else self.made.node_of[v].meta["val"] for v in op.outs)

    def _is_there(self, value: int) -> bool:
        """Return whether a value is a view of one that is there anyway."""
        allocation = self.tape.allocations[self.tape.values[value].allocation]
        return allocation.is_outside and not (self.is_inverted and allocation.role == "input")

    def _call(self, op: Op) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Return the functional form of an operator."""
        name = packet_name(op.func)
        if name in UNINITIALIZED or name in OF_SHAPE:
            value = self.tape.values[op.outs[0] or 0]
            target = aten.rand.default if op.state is not None else aten.full.default
            return target, (list(value.view.shape), *(() if op.state is not None else (0,))), {}
        if self._moves(op):
            return overwrite, tuple(self._node(v) for v in op.reads), {}  # the graph's tensors have no devices
        args, kwargs = self._nodes(op.args), {k: self._nodes(v) for k, v in op.kwargs.items()}
        if op.func in STATISTICS and op.args[5]:
            args = tuple(None if i in STATISTICS[op.func] else a for i, a in enumerate(args))
        if op.func is aten.bernoulli_.float and self._is_whole(op.written[0][0]):
            return aten.bernoulli.p, args, {}
        if op.written:
            packet = getattr(aten, name.removesuffix("_"), None)
            functional = getattr(packet, op.func._overloadname, None) if name.endswith("_") else None
            whole = len(op.written) == 1 and (self.is_inverted or self._is_whole(op.written[0][0]))
            if functional is None or not whole:
                return overwrite, tuple(self._node(v) for v in op.reads), {}
            return functional, args, kwargs
        return op.func, args, kwargs

    def _moves(self, op: Op) -> bool:
        """Return whether an operator copies a tensor to another device; single numbers may lie elsewhere."""
        made = [self.tape.values[v].device for v in op.outs if v is not None]
        read = [self.tape.values[v].device for v in op.reads if self.tape.values[v].view.shape]
        return bool(made) and any(device != made[0] for device in read)

    def _is_whole(self, value: int) -> bool:
        view = self.tape.values[value].view
        count = 1
        for n in view.shape:
            count *= n
        return count * view.dtype.itemsize == self.tape.nbytes(value)

    def _nodes(self, tree: Any) -> Any:
        if type(tree) is Ref:
            return self._node(int(tree))
        if isinstance(tree, (list, tuple)):
            return type(tree)([self._nodes(x) for x in tree])
        return tree


def _needed(tape: Tape) -> set[int]:
    """Return the operators that the returned values follow from."""
    needed: set[int] = set()
    todo: list[int] = [*tape.returned]
    seen: set[int] = set()
    while todo:
        value = todo.pop()
        at = tape.values[value].op
        if value in seen or at is None:
            continue
        seen.add(value)
        if at not in needed:
            needed.add(at)
            todo += tape.ops[at].reads
    return needed

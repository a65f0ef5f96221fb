"""The forward of a tape as an fx graph of functional aten operators, for the graph passes."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from revfx.engine.operators import OF_SHAPE, UNINITIALIZED, is_repeatable
from revfx.engine.tape import Op, Ref, Tape
from revfx.passes._torch import packet_name
from revfx.passes.facts import ZEROS_AND_ONES
from revfx.plan.nodes import add_placeholder, without_statistics
from revfx.rules import Inverse


aten: Any = torch.ops.aten
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]  # a target with its arguments


def overwrite(*args: Any) -> Tensor:
    """Stand for an operator that writes to a part of its first argument, or moves it; it is never called."""
    raise AssertionError("a write has no function")


def reread(written: Tensor) -> Tensor:
    """Stand for another view of memory that was written to; it is never called."""
    raise AssertionError("a view of written memory has no function")


@dataclass
class TapeGraph:
    """A graph, and the values and operators of the tape that its nodes stand for.

    `lasting`: placeholders that are no inputs of the forward.
    """

    graph: fx.Graph
    lasting: list[fx.Node] = field(default_factory=list[fx.Node])
    node_of: dict[int, fx.Node] = field(default_factory=dict[int, fx.Node])
    value_of: dict[fx.Node, int] = field(default_factory=dict[fx.Node, int])
    op_of: dict[fx.Node, int] = field(default_factory=dict[fx.Node, int])


def graph_of(tape: Tape, is_inverted: bool = False) -> TapeGraph:
    """Build the graph of the operators that the returned values need; nodes carry the metadata that `lower` reads.

    `is_inverted`: the graph is a function of the inputs, without memory. Views of inputs are computed, and the content
    that is written to a part of a tensor is a value of that part.
    """
    return _GraphBuilder(tape, is_inverted).run()


class _GraphBuilder:
    def __init__(self, tape: Tape, is_inverted: bool) -> None:
        self.tape, self.is_inverted = tape, is_inverted
        self.result = TapeGraph(fx.Graph())
        self.graph, self.node_of = self.result.graph, self.result.node_of

    def run(self) -> TapeGraph:
        for number in sorted(_needed_ops(self.tape)):
            self._add(number, self.tape.ops[number])
        self._add_declared_inverses()
        self.graph.output(tuple(map(self._node, dict.fromkeys(self.tape.returned))))
        return self.result

    def _add_declared_inverses(self) -> None:
        """Add the declared inverses to the nodes that compute their results."""
        for d in self.tape.declared:
            if d.head not in self.node_of or d.result not in self.node_of or d.head == d.result:
                continue
            result = self.node_of[d.result]
            owner: Any = result.args[0] if result.target is operator.getitem else result
            if owner.op != "call_function":
                continue
            given = tuple(map(self._node, d.given))
            inverse = Inverse(self.node_of[d.head], d.by, given, result=result, declared=d.name)
            owner.meta["declared"] = (*owner.meta.get("declared", ()), inverse)

    # --- nodes
    def _node(self, value: int) -> fx.Node:
        """Return the node of a value; if no operator of the graph computes it, a placeholder or another view."""
        if value in self.node_of:
            return self.node_of[value]
        at = self.tape.values[value].op
        if at is not None and not self.tape.is_outside(value):
            for _, after in self.tape.ops[at].written:
                if after in self.node_of:
                    return self._reread(self.node_of[after], value, at)
        return self._placeholder(value)

    def _reread(self, written: fx.Node, value: int, at: int) -> fx.Node:
        """Add a node for another view of memory that operator `at` wrote to."""
        node = self.graph.call_function(reread, (written,))
        self.result.op_of[node] = at
        self._note(node, value)
        return node

    def _placeholder(self, value: int) -> fx.Node:
        node = add_placeholder(self.graph, f"x{value}")
        self._note(node, value)
        known = self.tape.values[value]
        role = self.tape.allocations[known.allocation].role
        is_constant = value in self.tape.constants or value in self.tape.fixed
        if role not in ("", "input") or is_constant:
            self.result.lasting.append(node)
        elif not known.view.shape or not (known.view.dtype.is_floating_point or known.view.dtype.is_complex):
            node.meta["kept"] = True  # an index, or a single number
        return node

    def _note(self, node: fx.Node, value: int) -> None:
        """Note the value of a node, and its place in memory."""
        known, view = self.tape.values[value], self.tape.values[value].view
        allocation = self.tape.allocations[known.allocation]
        if allocation.is_strided:
            val = torch.empty_strided(view.shape, view.stride, dtype=view.dtype, device="meta")
        else:
            val = torch.empty(view.shape, dtype=view.dtype, device="meta")
            node.meta["kept"] = True
        node.meta.update(val=val, storage=known.allocation, storage_nbytes=allocation.nbytes)
        self.node_of[value], self.result.value_of[node] = node, value

    # --- operators
    def _add(self, number: int, op: Op) -> None:
        """Add the node of an operator, and nodes for its results, unless all of them are there anyway."""
        written = [after for _, after in op.written]
        fresh = [v for v in (*op.outs, *written) if v is not None and v not in self.node_of]
        if all(map(self._is_there, fresh)):
            return
        target, args, kwargs = self._call(op)
        name = packet_name(target) or getattr(target, "__name__", "")
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        self.result.op_of[node] = number
        node.meta["where"] = op.where
        if packet_name(target) == "bernoulli":
            node.meta["facts"] = (ZEROS_AND_ONES,)
        if not op.is_single and not written:
            self._add_parts(node, op)
            return
        first = written[0] if written else op.outs[0]
        assert first is not None
        self._note(node, first)
        if not is_repeatable(op.func):
            node.meta["kept"] = True
        for other in written[1:]:
            self._reread(node, other, number)

    def _add_parts(self, node: fx.Node, op: Op) -> None:
        """Add nodes for the results of an operator that returns several."""
        vals: list[Tensor | None] = [None] * len(op.outs)
        for position, v in enumerate(op.outs):
            if v is None:
                continue
            part = self.graph.call_function(operator.getitem, (node, position))
            if v in self.node_of:  # such as a part that is the whole
                part.meta.update(self.node_of[v].meta)
                self.result.value_of[part] = v
            else:
                self._note(part, v)
                if not is_repeatable(op.func):
                    part.meta["kept"] = True
            vals[position] = part.meta["val"]
        node.meta["val"] = tuple(vals)

    def _is_there(self, value: int) -> bool:
        """Return whether a value is a view of one that is there anyway."""
        allocation = self.tape.allocations[self.tape.values[value].allocation]
        return allocation.is_outside and not (self.is_inverted and allocation.role == "input")

    def _call(self, op: Op) -> Call:
        """Return the functional form of an operator."""
        name = packet_name(op.func)
        if name in UNINITIALIZED or name in OF_SHAPE:
            shape = list(self.tape.values[op.outs[0] or 0].view.shape)
            if op.state is not None:
                return aten.rand.default, (shape,), {}
            return aten.full.default, (shape, 0), {}
        if self._moves(op):  # the tensors of the graph have no devices
            return self._overwrite(op)
        args, kwargs = map_aggregate((op.args, op.kwargs), self._argument)
        args = without_statistics(op.func, args)
        if not op.written:
            return op.func, args, kwargs

        # A write to a whole tensor, by an operator with a functional form, is a new value.
        target, _ = op.written[0]
        if op.func is aten.bernoulli_.float and self._is_whole(target):
            return aten.bernoulli.p, args, {}
        functional = None
        if name.endswith("_"):
            functional = getattr(getattr(aten, name.removesuffix("_"), None), op.func._overloadname, None)
        is_whole = len(op.written) == 1 and (self.is_inverted or self._is_whole(target))
        if functional is None or not is_whole:
            return self._overwrite(op)
        return functional, args, kwargs

    def _overwrite(self, op: Op) -> Call:
        return overwrite, tuple(map(self._node, op.reads)), {}

    def _moves(self, op: Op) -> bool:
        """Return whether an operator copies a tensor to another device; single numbers may lie elsewhere."""
        values = self.tape.values
        sources = {values[v].device for v in op.reads if values[v].view.shape}
        results = [values[v].device for v in op.outs if v is not None]
        return bool(results) and not sources <= {results[0]}

    def _is_whole(self, value: int) -> bool:
        """Return whether a value fills its allocation."""
        view = self.tape.values[value].view
        return math.prod(view.shape) * view.dtype.itemsize == self.tape.nbytes(value)

    def _argument(self, leaf: Any) -> Any:
        return self._node(int(leaf)) if type(leaf) is Ref else leaf


def _needed_ops(tape: Tape) -> set[int]:
    """Return the operators that the returned values follow from."""
    needed: set[int] = set()
    todo = [*tape.returned]
    while todo:
        at = tape.values[todo.pop()].op
        if at is not None and at not in needed:
            needed.add(at)
            todo += tape.ops[at].reads
    return needed

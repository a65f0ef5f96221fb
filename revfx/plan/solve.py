"""From the tape of a forward to the graph of its inverse, which computes the inputs from the outputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_aggregate

from revfx.engine.operators import OF_SHAPE, UNINITIALIZED
from revfx.engine.replaying import item, python_runner
from revfx.engine.tape import Ref, Tape
from revfx.errors import NotReversibleError, Reason, Refusal
from revfx.passes._torch import boxed_codegen, is_overload, is_random, packet_name
from revfx.passes.arcs import Lowered
from revfx.passes.closure import Closure, Derivation, Invert, read_by
from revfx.passes.cuts import DeadEnd, needed
from revfx.passes.diagnose import diagnose
from revfx.passes.formula import formula
from revfx.passes.program import Operation
from revfx.plan.couplings import lowered_tape
from revfx.plan.graph import TapeGraph, overwrite, reread
from revfx.plan.nodes import add_placeholder, empty, layout_of


MAX_AMPLIFICATION = 2.0**20  # of rounding errors by an inverse; with more, its result is meaningless
WRITES = (overwrite, reread)  # targets that stand for writes to a part of a tensor, and never run


@dataclass(frozen=True)
class RecordedForward:
    """A recorded forward.

    Attributes:
        tape: its tape.
        inputs: the arguments that an inverse has to compute: by the number of the leaf, the value.
        conditions: the other arguments, in the same form.
        outputs: the results, in the same form.
        names: of the leaves of the arguments.
    """

    tape: Tape
    inputs: dict[int, int]
    conditions: dict[int, int]
    outputs: dict[int, int]
    names: Sequence[str]


@dataclass(frozen=True)
class Solution:
    """The inverse of a forward, as a function.

    Attributes:
        run: computes a tuple of the inputs from a list of tensors: results, conditions, and those from outside.
        reads: the leaves of the result that are read.
        conditions: the leaves of the arguments that have to be given.
        inputs: the leaves of the arguments that are computed.
        outside: values of the tape that are parameters, buffers and other tensors of the model.
        shapes: of the results that are read.
        believed: the names of calls that are inverted as a library or the user declares.
        code: the program, a line for each derivation.
    """

    run: Callable[[list[Any]], tuple[Tensor, ...]]
    reads: tuple[int, ...]
    conditions: tuple[int, ...]
    inputs: tuple[int, ...]
    outside: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    believed: tuple[str, ...]
    code: str


def solve(forward: RecordedForward, name: str) -> Solution:
    """Find the inverse of a forward; `name` is that of its model.

    Raises:
        NotReversibleError: an input does not follow from the outputs.
    """
    tape_graph, lowered = lowered_tape(forward.tape, lossless=True, from_inputs=True)
    program = lowered.program
    values = tuple(replace(v, kept=False) for v in program.values)  # no forward runs that could keep any
    ops: list[Operation] = []
    for op in program.ops:
        arcs = tuple(a for a in op.arcs if a.amplification <= MAX_AMPLIFICATION)
        ops.append(replace(op, arcs=arcs))
    lowered = replace(lowered, program=replace(program, values=values, ops=tuple(ops)))
    return _Solver(forward, tape_graph, lowered, name).run()


def compile_values(
    tape: Tape, tape_graph: TapeGraph, lowered: Lowered, values: Sequence[int]
) -> tuple[Callable[[list[Any]], tuple[Tensor, ...]], tuple[int, ...]]:
    """Return a function that computes values of a forward, and the values of the tape that it takes, in a list."""
    emitter = _Emitter(tape, tape_graph, lowered, ())
    return python_runner(emitter.end(values)), tuple(emitter.outside)


class _Solver:
    def __init__(self, forward: RecordedForward, tape_graph: TapeGraph, lowered: Lowered, name: str) -> None:
        self.forward, self.tape_graph, self.lowered, self.name = forward, tape_graph, lowered, name
        self.inputs, self.conditions = self._known(forward.inputs), self._known(forward.conditions)
        self.outputs: dict[int, int] = {}
        for leaf, v in self._known(forward.outputs).items():
            if lowered.program.values[v].dtype.is_floating_point:
                self.outputs[leaf] = v

    def _known(self, leaves: dict[int, int]) -> dict[int, int]:
        """Return leaves with values of the program in the place of the tape's; values off the graph are left out."""
        found: dict[int, int] = {}
        for leaf, value in leaves.items():
            node = self.tape_graph.node_of.get(value)
            if node is not None and node in self.lowered.index:
                found[leaf] = self.lowered.index[node]
        return found

    def run(self) -> Solution:
        wanted = [*self.inputs.values()]
        if not wanted or self.inputs.keys() != self.forward.inputs.keys():
            raise self._refusal()
        candidates = [[leaf] for leaf in self.outputs]  # one output may suffice
        candidates.append([*self.outputs])
        for leaves in candidates:
            closure = self._closure([*map(self.outputs.__getitem__, leaves), *self.conditions.values()])
            if all(v in closure for v in wanted):
                return self._solution(needed(self.lowered.program, closure.order, wanted), leaves)
        raise self._refusal()

    def _closure(self, known: Collection[int]) -> Closure:
        """Return the closure of some values; operators that draw, or write to a part of a tensor, run only once."""
        once: set[int] = set()
        for i, node in enumerate(self.lowered.op_nodes):
            op = self.forward.tape.ops[self.tape_graph.op_of[node]]
            if node.target in WRITES or (is_overload(op.func) and is_random(op.func, op.args, op.kwargs)):
                once.add(i)
        closure = Closure(self.lowered.program, known, trusted=True, once=once)
        closure.add(range(len(self.lowered.op_nodes)))
        return closure

    def _solution(self, order: Sequence[Derivation], leaves: Sequence[int]) -> Solution:
        program = self.lowered.program
        read: set[int] = {*self.inputs.values()}
        for d in order:
            read.update(read_by(program, d))
        reads = tuple(leaf for leaf in leaves if self.outputs[leaf] in read)
        conditions = tuple(leaf for leaf, v in self.conditions.items() if v in read)
        outputs = [self.outputs[leaf] for leaf in reads]
        given = [*outputs, *map(self.conditions.__getitem__, conditions)]
        emitter = _Emitter(self.forward.tape, self.tape_graph, self.lowered, given)
        believed: dict[str, None] = {}
        for d in order:
            emitter.add(d)
            if isinstance(d, Invert) and d.arc.declared:
                believed[d.arc.declared] = None
        return Solution(
            run=python_runner(emitter.end(self.inputs.values())),
            reads=reads,
            conditions=conditions,
            inputs=tuple(self.inputs),
            outside=tuple(emitter.outside),
            shapes=tuple(tuple(program.values[v].shape) for v in outputs),
            believed=tuple(believed),
            code="\n".join(map(self._line, order)),
        )

    def _line(self, d: Derivation) -> str:
        program = self.lowered.program
        if isinstance(d, Invert):
            return formula(program, d.arc, {})
        op = program.ops[d.op]
        outs = ", ".join(program.values[v].name for v in op.outs)
        ins = ", ".join(program.values[v].name for v in op.ins)
        return f"{outs} <- {op.name}({ins})"

    def _refusal(self) -> NotReversibleError:
        program = self.lowered.program
        closure = self._closure({*self.outputs.values(), *self.conditions.values()})
        unknown = {leaf: v for leaf, v in self.inputs.items() if v not in closure}
        live: dict[int, None] = dict.fromkeys(unknown.values())
        for op in program.ops:
            live.update(dict.fromkeys(v for v in op.ins if v not in closure))
        reasons = diagnose(program, DeadEnd(0, len(program.ops), tuple(live)))
        explained = "\n  ".join(dict.fromkeys(map(_explain_refusal, reasons[:4])))
        explained = explained or "only floating-point outputs are followed back"
        unread = self.forward.inputs.keys() - self.inputs.keys()
        names = [self.forward.names[leaf] for leaf in sorted({*unknown, *unread})]
        lost = ", ".join(f"`{name}`" for name in dict.fromkeys(names)) or "the input"
        text = f"`inverse`: {lost} of {self.name} does not follow from its outputs:\n  {explained}"
        return NotReversibleError(text, reasons[0].op if reasons else None, tuple(reasons))


def _explain_refusal(refusal: Refusal) -> str:
    if refusal.kind is not Reason.NO_COUPLING:
        return str(refusal)
    return f"{refusal}; that takes a fixed point, or one element after the other (autoregression)"


class _Emitter:
    """Writes derivations into a graph.

    Args:
        tape, tape_graph, lowered: the forward, as a graph and as a program.
        given: values of the program that the graph takes first.
    """

    def __init__(self, tape: Tape, tape_graph: TapeGraph, lowered: Lowered, given: Iterable[int]) -> None:
        self.tape, self.tape_graph, self.lowered = tape, tape_graph, lowered
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}  # by the forward's node
        self.outside: list[int] = []  # values of the tape that the graph takes after `given`
        self.model_tensors: dict[int, fx.Node] = {}  # by value: those from outside, and views of them
        for v in given:
            node = lowered.value_nodes[v]
            self.env[node] = add_placeholder(self.graph, node.name)

    def add(self, d: Derivation) -> None:
        """Add a derivation."""
        if isinstance(d, Invert):
            tail = tuple(map(self._node, d.arc.tail))
            head = self.lowered.value_nodes[d.arc.head]
            self.env[head] = self.graph.create_node("call_function", d.arc.solve, tail, {}, name="solve")
            return
        for v in self.lowered.program.ops[d.op].outs:
            self._node(v)

    def end(self, results: Iterable[int]) -> fx.Graph:
        """Return the graph, with some values of the program as results."""
        self.graph.output(tuple(map(self._node, results)))
        self.graph.set_codegen(boxed_codegen())
        return self.graph

    def _node(self, value: int) -> fx.Node:
        """Return the node of a value of the program."""
        return self._copied(self.lowered.value_nodes[value])

    def _copied(self, node: fx.Node) -> fx.Node:
        """Return the node that stands for one of the forward's."""
        if node not in self.env:
            is_outside = node.op == "placeholder"
            self.env[node] = self._model_tensor(self.tape_graph.value_of[node]) if is_outside else self._rerun(node)
        return self.env[node]

    def _rerun(self, node: fx.Node) -> fx.Node:
        """Return a node that runs an operator of the forward again; the forward's graph has stand-ins for some."""
        if node not in self.tape_graph.op_of:
            return self.graph.node_copy(node, self._copied)
        op = self.tape.ops[self.tape_graph.op_of[node]]
        name = packet_name(op.func)
        if name in UNINITIALIZED:
            assert op.outs[0] is not None
            return self._call(empty, (layout_of(self.tape, op.outs[0]),))
        if name in OF_SHAPE:
            like = self._call(empty, (layout_of(self.tape, op.reads[0]),))
            return self._call(op.func, (like, *op.args[1:]), op.kwargs)
        return self.graph.node_copy(node, self._copied)

    def _model_tensor(self, value: int) -> fx.Node:
        """Return a node for a tensor of the model, or a view of one."""
        if value in self.model_tensors:
            return self.model_tensors[value]
        at = self.tape.values[value].op
        if at is None:
            self.outside.append(value)
            node = add_placeholder(self.graph, f"outside_{value}")
        else:
            op = self.tape.ops[at]
            args, kwargs = map_aggregate((op.args, op.kwargs), self._argument)
            node = self._call(op.func, args, kwargs)
            if not op.is_single:
                node = self._call(item, (node, op.outs.index(value)))
        self.model_tensors[value] = node
        return node

    def _argument(self, leaf: Any) -> Any:
        return self._model_tensor(int(leaf)) if type(leaf) is Ref else leaf

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: Any = None) -> fx.Node:
        return self.graph.call_function(target, args, kwargs, name=packet_name(target) or None)

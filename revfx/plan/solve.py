"""From the tape of a forward to the graph of its inverse, which computes the inputs from the outputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from revfx.engine.operators import OF_SHAPE, UNINITIALIZED
from revfx.engine.replaying import python_runner
from revfx.engine.tape import Ref, Tape
from revfx.errors import NotReversibleError, Reason, Refusal
from revfx.passes._torch import boxed_codegen, draws, is_overload, packet_name
from revfx.passes.arcs import Lowered
from revfx.passes.closure import Closure, Derivation, Invert, read_by
from revfx.passes.cuts import Stuck, needed
from revfx.passes.diagnose import diagnose
from revfx.passes.formula import formula
from revfx.plan.couplings import lowered_tape
from revfx.plan.graph import TapeGraph, overwrite, reread
from revfx.plan.nodes import empty


MOST_AMPLIFIED = 2.0**20  # by how much an inverse may multiply rounding errors; beyond, what it gives says nothing
NEVER_RUN = (overwrite, reread)  # targets that stand for writes to a part of a tensor


@dataclass(frozen=True)
class Forward:
    """A forward that was learnt.

    Attributes:
        tape: its tape.
        inputs: the values of those leaves of its arguments that have to come back, by the numbers of the leaves.
        conditions: the values of the other ones.
        outputs: the values of its results, by the numbers of the leaves.
        names: of the leaves of its arguments.
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
        run: takes a list of tensors, the results that are read, the conditions, and those from outside; returns a tuple
            of the inputs.
        reads: the leaves of the result that are read.
        conditions: the leaves of the arguments that have to be given.
        inputs: the leaves of the arguments that come back.
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


def solve(forward: Forward, name: str) -> Solution:
    """Find how the inputs of a forward come back.

    Args:
        forward: the forward.
        name: of its model.

    Raises:
        NotReversibleError: they don't.
    """
    of, lowered = lowered_tape(forward.tape, lossless=True, from_inputs=True)
    program = lowered.program
    values = tuple(replace(v, kept=False) for v in program.values)  # none is held, as there is no forward
    ops = tuple(replace(o, arcs=tuple(a for a in o.arcs if a.amplification <= MOST_AMPLIFIED)) for o in program.ops)
    lowered = replace(lowered, program=replace(program, values=values, ops=ops))
    return _Solver(forward, of, lowered, name).run()


def computed(
    tape: Tape, of: TapeGraph, lowered: Lowered, values: Sequence[int]
) -> tuple[Callable[[list[Any]], tuple[Tensor, ...]], tuple[int, ...]]:
    """Return a function that computes values of a forward, and the values of the tape that it takes, in a list."""
    emitter = _Emitter(tape, of, lowered, ())
    return python_runner(emitter.end(values)), tuple(emitter.outside)


class _Solver:
    def __init__(self, forward: Forward, of: TapeGraph, lowered: Lowered, name: str) -> None:
        self.forward, self.of, self.lowered, self.name = forward, of, lowered, name
        self.inputs, self.conditions = self._known(forward.inputs), self._known(forward.conditions)
        self.outputs: dict[int, int] = {}
        for leaf, v in self._known(forward.outputs).items():
            if lowered.program.values[v].dtype.is_floating_point:
                self.outputs[leaf] = v

    def _known(self, leaves: dict[int, int]) -> dict[int, int]:
        """Return the program's values in the place of the tape's, of those that the graph has."""
        found: dict[int, int] = {}
        for leaf, value in leaves.items():
            node = self.of.node_of.get(value)
            if node is not None and node in self.lowered.index:
                found[leaf] = self.lowered.index[node]
        return found

    def run(self) -> Solution:
        if self.inputs.keys() != self.forward.inputs.keys():
            raise self._refusal()
        wanted = [*self.inputs.values()]
        single: list[list[int]] = [[leaf] for leaf in self.outputs]
        for leaves in (*single, [*self.outputs]) if wanted else ():
            known = [*(self.outputs[leaf] for leaf in leaves), *self.conditions.values()]
            closure = self._closure(known)
            if all(v in closure for v in wanted):
                return self._solution([*needed(self.lowered.program, closure.order, wanted)], leaves)
        raise self._refusal()

    def _closure(self, known: Collection[int]) -> Closure:
        """Return the closure of some values; operators that draw, or write to a part of a tensor, run once."""
        once: set[int] = set()
        for i, node in enumerate(self.lowered.op_nodes):
            op = self.forward.tape.ops[self.of.op_of[node]]
            if node.target in NEVER_RUN or (is_overload(op.func) and draws(op.func, op.args, op.kwargs)):
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
        given = [self.outputs[leaf] for leaf in reads] + [self.conditions[leaf] for leaf in conditions]
        emitter = _Emitter(self.forward.tape, self.of, self.lowered, given)
        for d in order:
            emitter.add(d)
        graph = emitter.end(self.inputs.values())
        declared = [d.arc.declared for d in order if isinstance(d, Invert) and d.arc.declared]
        return Solution(
            run=python_runner(graph),
            reads=reads,
            conditions=conditions,
            inputs=tuple(self.inputs),
            outside=tuple(emitter.outside),
            shapes=tuple(tuple(program.values[self.outputs[leaf]].shape) for leaf in reads),
            believed=tuple(dict.fromkeys(declared)),
            code="\n".join(self._line(d) for d in order),
        )

    def _line(self, d: Derivation) -> str:
        program = self.lowered.program
        if isinstance(d, Invert):
            return formula(program, d.arc, {})
        op = program.ops[d.op]
        outs, ins = (", ".join(program.values[v].name for v in values) for values in (op.outs, op.ins))
        return f"{outs} <- {op.name}({ins})"

    def _refusal(self) -> NotReversibleError:
        program = self.lowered.program
        closure = self._closure({*self.outputs.values(), *self.conditions.values()})
        unknown = {leaf: v for leaf, v in self.inputs.items() if v not in closure}
        live: dict[int, None] = dict.fromkeys(unknown.values())
        for op in program.ops:
            live.update(dict.fromkeys(v for v in op.ins if v not in closure))
        reasons = diagnose(program, Stuck(0, len(program.ops), tuple(live)))
        said = "\n  ".join(dict.fromkeys(map(_worded, reasons[:4])))
        said = said or "of what it returns only floating-point tensors are followed back"
        unread = self.forward.inputs.keys() - self.inputs.keys()
        names = [self.forward.names[leaf] for leaf in sorted({*unknown, *unread})]
        lost = ", ".join(f"`{name}`" for name in dict.fromkeys(names)) or "what it takes"
        text = f"`inverse`: {lost} of {self.name} does not follow from its outputs:\n  {said}"
        return NotReversibleError(text, reasons[0].op if reasons else None, tuple(reasons))


def _worded(refusal: Refusal) -> str:
    if refusal.kind is not Reason.NO_COUPLING:
        return str(refusal)
    return f"{refusal}; that takes a fixed point, or one element after the other (autoregression)"


class _Emitter:
    """Writes derivations into a graph.

    Args:
        tape, of, lowered: the forward, as a graph and as a program.
        given: values of the program that the graph takes first.
    """

    def __init__(self, tape: Tape, of: TapeGraph, lowered: Lowered, given: Iterable[int]) -> None:
        self.tape, self.of, self.lowered = tape, of, lowered
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}  # by the forward's node
        self.outside: dict[int, fx.Node] = {}
        self.views: dict[int, fx.Node] = {}  # of tensors from outside
        for v in given:
            node = lowered.value_nodes[v]
            self.env[node] = self._placeholder(node.name)

    def add(self, d: Derivation) -> None:
        """Add a derivation."""
        if isinstance(d, Invert):
            tail = tuple(self._get(self.lowered.value_nodes[v]) for v in d.arc.tail)
            head = self.lowered.value_nodes[d.arc.head]
            self.env[head] = self.graph.create_node("call_function", d.arc.solve, tail, {}, name="solve")
            return
        for v in self.lowered.program.ops[d.op].outs:
            self._get(self.lowered.value_nodes[v])

    def end(self, results: Iterable[int]) -> fx.Graph:
        """Return the graph, with some values of the program as results."""
        self.graph.output(tuple(self._get(self.lowered.value_nodes[v]) for v in results))
        self.graph.set_codegen(boxed_codegen())
        return self.graph

    def _get(self, node: fx.Node) -> fx.Node:
        if node not in self.env:
            is_outside = node.op == "placeholder"
            self.env[node] = self._from_outside(self.of.value_of[node]) if is_outside else self._run(node)
        return self.env[node]

    def _run(self, node: fx.Node) -> fx.Node:
        """Return a node that runs an operator of the forward again; the graph has stand-ins for some."""
        op = self.tape.ops[self.of.op_of.get(node, 0)]
        name = packet_name(op.func) if node in self.of.op_of else ""
        if name in UNINITIALIZED:
            return self._call(empty, (self._layout(op.outs[0]),))
        if name in OF_SHAPE:
            like = self._call(empty, (self._layout(op.reads[0]),))
            return self._call(op.func, (like, *op.args[1:]), op.kwargs)
        return self.graph.node_copy(node, self._get)

    def _from_outside(self, value: int) -> fx.Node:
        """Return a node for a tensor of the model, or a view of one."""
        at = self.tape.values[value].op
        if at is None:
            if value not in self.outside:
                self.outside[value] = self._placeholder(f"outside_{value}")
            return self.outside[value]
        if value not in self.views:
            op = self.tape.ops[at]
            args, kwargs = self._filled(op.args), {k: self._filled(v) for k, v in op.kwargs.items()}
            node = self._call(op.func, args, kwargs)
            if not op.is_single:
                node = self._call(_item, (node, op.outs.index(value)))
            self.views[value] = node
        return self.views[value]

    def _filled(self, tree: Any) -> Any:
        if type(tree) is Ref:
            return self._from_outside(int(tree))
        if isinstance(tree, (list, tuple)):
            return type(tree)([self._filled(x) for x in tree])
        return tree

    def _layout(self, value: int | None) -> Any:
        assert value is not None
        known = self.tape.values[value]
        return known.view.shape, known.view.stride, 0, known.view.dtype, known.device

    def _placeholder(self, name: str) -> fx.Node:
        last = next((n for n in reversed(self.graph.nodes) if n.op == "placeholder"), None)
        first = next(iter(self.graph.nodes), None)
        with self.graph.inserting_before(first) if last is None else self.graph.inserting_after(last):
            return self.graph.create_node("placeholder", name, name=name)

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: Any = None) -> fx.Node:
        return self.graph.create_node(
            "call_function", target, args, dict(kwargs or {}), name=packet_name(target) or None
        )


def _item(t: Any, position: int) -> Any:
    return t[position]

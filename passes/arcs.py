"""Lowering of an fx graph to a program: values, operations, and the inverse arcs whose conditions hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from revfx.errors import Cause, Reason
from revfx.passes.bounds import ANY_NUMBER, find_bounds
from revfx.passes.elimination import ONE
from revfx.passes.facts import find_masks, index_facts
from revfx.passes.masks import MaskedArcs
from revfx.passes.moves import arc_text, container_of, directions_of, given_nodes
from revfx.passes.program import SELECTS, Arc, DataFactor, Operation, Program, Value
from revfx.passes.sizes import NUMBERS, as_number, is_fixed, is_same_shape
from revfx.passes.tilings import tiling_arcs
from revfx.rules import (
    NOT_INJECTIVE,
    Direction,
    Inverse,
    NoInverse,
    Patch,
    Tile,
    declared_by_user,
    op_name,
    rule_for,
    why_none,
)


STATISTIC_SIZE_RATIO = 16  # an operand of a statistic is at least this many times larger


@dataclass(frozen=True)
class Lowered:
    """A program, and the fx nodes of its operations and of its values."""

    program: Program
    op_nodes: tuple[fx.Node, ...]
    value_nodes: tuple[fx.Node, ...]

    @cached_property
    def index(self) -> dict[fx.Node, int]:
        """The value of each node."""
        return {node: value for value, node in enumerate(self.value_nodes)}


def lower(
    graph: fx.Graph,
    sources: Collection[fx.Node] = (),
    barred: Mapping[fx.Node, str] | None = None,
    lossless: bool = True,
) -> Lowered:
    """Translate a graph to a program.

    A node that returns a tuple becomes one operation together with the getitem nodes of its parts. Nodes that return a
    (symbolic) number are left out.

    Args:
        graph: the graph. Each node has its fake result in `meta["val"]`. Optional keys of `meta`: `storage`, the
            allocation of a value; `barrier`, the reason why no region may contain the node; `where`, the user's file
            and line; `declared`, inverses that the user declared; `constant`, `facts` and `kept`.
        sources: nodes that are sources besides the attributes.
        barred: nodes that no rounding inverse may regenerate, with the reasons. None: codes correct every inverse.
        lossless: every value is regenerated with the forward's bits, not only up to rounding.
    """
    return _Lowering(graph, sources, barred, lossless and barred is None).run()


@dataclass(eq=False)
class _Lowering:
    """The state of one call of `lower`.

    `owner`: for each node, the index of the operation that computes it. `constants`: nodes that depend on sources and
    index inputs alone.
    """

    graph: fx.Graph
    sources: Collection[fx.Node]
    barred: Mapping[fx.Node, str] | None
    lossless: bool

    def __post_init__(self) -> None:
        self.bounds, self.masks = find_bounds(self.graph), find_masks(self.graph)
        self.constants = _constant_nodes(self.graph, self.sources)
        self.values: list[Value] = []
        self.index: dict[fx.Node, int] = {}
        self.storages: dict[object, int] = {}
        self.owner: dict[fx.Node, int] = {}
        self.directions: dict[fx.Node, list[Direction]] = {}

    def run(self) -> Lowered:
        outs: list[list[int]] = []
        outputs: tuple[int, ...] = ()
        # Number the values first: an operation may have results in later nodes, which take its tuple apart.
        for node in self.graph.nodes:
            if node.op == "output":
                outputs = self._indices(node)
            elif isinstance(node.meta.get("val"), NUMBERS) or (node.op == "get_attr" and "val" not in node.meta):
                continue
            elif node.op == "get_attr" or node in self.sources:
                self._add_value(node, source=True, given=node.op == "placeholder")
            elif node.op == "placeholder":
                self._add_value(node, given=True)
            else:
                container = container_of(node)
                if container is None:
                    self.owner[node] = len(outs)
                    self.directions[node] = directions_of(node)
                    outs.append([])
                else:
                    self.owner[node] = self.owner[container]
                if isinstance(node.meta["val"], Tensor):
                    outs[self.owner[node]].append(self._add_value(node))

        # Then the arcs: those of single operations, and those that combine several.
        ops = [self._op(node, tuple(outs[i])) for i, node in enumerate(self.directions)]
        masked = MaskedArcs(self.directions, self.masks, self.index, self.barred, self._arc)
        for i, arc in (*tiling_arcs(self.values, self.index, self.directions, outs), *masked.run()):
            ops[i] = replace(ops[i], arcs=(*ops[i].arcs, arc))
        program = Program(self._mark_allocations(ops), tuple(ops), outputs)
        return Lowered(program, tuple(self.directions), tuple(self.index))

    def _indices(self, node: fx.Node) -> tuple[int, ...]:
        """Return the values that a node reads, each once."""
        return tuple(dict.fromkeys(self.index[n] for n in node.all_input_nodes if n in self.index))

    def _mark_allocations(self, ops: Sequence[Operation]) -> tuple[Value, ...]:
        """Return the values with `written` and `given` set for all views of an allocation."""
        written, given = set[int](), set[int]()
        for op in ops:
            if op.barrier is not None and op.barrier.kind is Reason.WRITES_IN_PLACE:
                written.update(self.values[v].storage for v in op.ins)
        for v in self.values:
            if v.given or v.source:
                given.add(v.storage)
        return tuple(replace(v, written=v.storage in written, given=v.storage in given) for v in self.values)

    def _add_value(self, node: fx.Node, source: bool = False, given: bool = False) -> int:
        val = node.meta["val"]
        storage = self.storages.setdefault(node.meta.get("storage", node), len(self.storages))
        nbytes = node.meta.get("storage_nbytes", as_number(val.numel()) * val.element_size())
        index = self.index[node] = len(self.values)
        kept = node.meta.get("kept", False)
        self.values.append(Value(node.name, tuple(val.shape), val.dtype, nbytes, storage, source, given, kept=kept))
        return index

    def _op(self, node: fx.Node, outs: tuple[int, ...]) -> Operation:
        """Return a node's operation with its own arcs."""
        name, ins, directions = op_name(node.target), self._indices(node), self.directions[node]
        has_rule = rule_for(node) is not None
        is_unknown = not has_rule or (name in NOT_INJECTIVE and not directions)
        has_matrix = any(isinstance(d, Inverse) and d.matrix is not None for d in directions)
        arcs, refused = self._inverses(node) if outs else ([], {})
        arcs += self._statistics(name, ins, outs)
        if is_unknown:
            refused = {v: why_none(name) for v in ins if not self.values[v].source}
        for arc in arcs:
            refused.pop(arc.head, None)
        return Operation(
            name=name,
            ins=ins,
            outs=outs,
            arcs=tuple(arcs),
            refused=tuple(refused.items()),
            where=node.meta.get("where", ""),
            barrier=node.meta.get("barrier"),
            opaque=is_unknown or has_matrix,
            moves=bool(directions) and all(map(_moves_elements, directions)),
            terms=self._terms(node, ins),
        )

    def _inverses(self, node: fx.Node) -> tuple[list[Arc], dict[int, Cause]]:
        """Return the arcs of an operation, and the reasons why other operands have none."""
        arcs: list[Arc] = []
        refused: dict[int, Cause] = {}
        for direction in self.directions[node]:
            if not isinstance(direction, (Inverse, NoInverse)):
                continue
            solved = direction.solves
            if not isinstance(solved, fx.Node) or solved.op == "get_attr" or solved not in self.index:
                continue
            if isinstance(direction, NoInverse):
                refused[self.index[solved]] = Cause(direction.kind, direction.reason)
                continue
            arc = self._arc(node, direction)
            if isinstance(arc, Cause):
                refused[self.index[solved]] = arc
            else:
                arcs.append(arc)
        return arcs, refused

    def _statistics(self, name: str, ins: tuple[int, ...], outs: tuple[int, ...]) -> Iterator[Arc]:
        """Yield results to save instead of an inverse, as they are small: a mean, or the scale of a batch."""
        if not self.lossless and name.strip("_") in SELECTS:
            return  # its operand comes back up to rounding, and a reader compares both
        largest = max((_num_elements(self.values[v]) for v in ins if not self.values[v].source), default=0)
        for v in outs:
            if 0 < _num_elements(self.values[v]) * STATISTIC_SIZE_RATIO <= largest:
                yield Arc(v, (), _never_run, exact=False, barred="it is small beside its operands")

    def _terms(self, node: fx.Node, ins: tuple[int, ...]) -> tuple[tuple[int, float], ...]:
        """Return the terms of a sum: its operands, and `ONE`, each times a number. Empty for other operations."""
        y, inputs = node.meta["val"], node.all_input_nodes
        inverses = [d for d in self.directions[node] if isinstance(d, Inverse) and d.solves in inputs]
        solved = {self.index.get(d.solves) for d in inverses}
        if not solved or solved != set(ins) or not isinstance(y, Tensor) or not y.is_floating_point():
            return ()
        factors, number = dict.fromkeys(ins, 0.0), 0.0
        for d in inverses:
            a, factor = d.solves.meta["val"], 1.0 if d.factor is None else d.factor
            if d.rest is None or d.solves in (self.barred or ()):
                return ()
            if d.solves.op != "get_attr" and not (a.dtype == y.dtype and is_same_shape(a.shape, y.shape)):
                return ()
            if not isinstance(factor, (int, float)) or isinstance(self._factor(d, y.dtype), str):
                return ()
            factors[self.index[d.solves]] += 1 / factor if d.reciprocal else factor
            number = d.rest(*(0.0 if isinstance(g, fx.Node) else g for g in d.given))
        if not all(factors.values()) or not math.isfinite(number):
            return ()
        return (*factors.items(), (ONE, float(number)))

    def _arc(self, node: fx.Node, inverse: Inverse) -> Arc | Cause:
        """Return the arc of an inverse, or the reason why its conditions do not hold."""
        name, solved = op_name(node.target), inverse.solves
        result: fx.Node = inverse.result or node
        y = result.meta["val"]
        if not isinstance(y, Tensor):
            return Cause(Reason.NO_RULE, "the result is not one tensor")
        cause = self._violation(name, inverse, y)
        if cause is not None:
            return cause
        factor = self._factor(inverse, y.dtype)
        if isinstance(factor, str):
            return Cause(Reason.ZERO_FACTOR, factor)
        operands = given_nodes(inverse)
        assumes, barred = (), (self.barred or {}).get(solved)
        if inverse.exact:
            assumes, barred = index_facts(operands, self.index), None
        return Arc(
            head=self.index[solved],
            tail=tuple(self.index[n] for n in (result, *operands)),
            solve=_bind_numbers(inverse.by, inverse.given),
            exact=inverse.exact,
            factor=factor,
            text=arc_text(solved, (node, *operands), name),
            assumes=assumes,
            coded=inverse.coded,
            declared=inverse.declared or declared_by_user(node),
            runs=(self.owner[node],) if inverse.runs else (),
            barred=barred,
        )

    def _violation(self, name: str, inverse: Inverse, y: Tensor) -> Cause | None:
        """Return the condition of an inverse that does not hold, apart from the one on its factor.

        Args:
            name: of the operation.
            inverse: the inverse.
            y: the fake result that it starts from.
        """
        a, has_codes = inverse.solves.meta["val"], self.barred is None
        if inverse.coded and not has_codes:
            if a.dtype != y.dtype:
                return Cause(Reason.LOSES_BITS, f"the cast from {a.dtype} to {y.dtype} loses bits")
            return why_none(name)
        for operand in (*inverse.given, inverse.factor):
            if isinstance(operand, fx.Node) and operand not in self.index:
                return Cause(Reason.DATA_DEPENDENT, f"`{name}` reads a number that only the run knows")
        if inverse.solves in given_nodes(inverse):
            return Cause(Reason.NON_INVERTIBLE, f"both operands of `{name}` are the same value")
        if inverse.exact:
            return None
        if not a.is_floating_point() and not a.is_complex():
            return Cause(Reason.NON_INVERTIBLE, f"it is {a.dtype}, and only floating-point values are inverted")
        if a.dtype != y.dtype and not inverse.coded:
            return Cause(Reason.LOSES_BITS, f"`{name}` turns {a.dtype} into {y.dtype}")
        if inverse.matrix is not None and inverse.matrix not in self.constants:
            return Cause(Reason.NON_INVERTIBLE, f"`{name}` multiplies by a matrix that is computed from data")
        if inverse.matrix is None and not is_same_shape(a.shape, y.shape):
            return Cause(Reason.LAYOUT, f"`{name}` broadcasts it from {tuple(a.shape)} to {tuple(y.shape)}")
        return None

    def _factor(self, inverse: Inverse, dtype: torch.dtype) -> float | DataFactor | str | None:
        """Return the factor of an arc's head, None if it amplifies no error, or the reason why it may be zero."""
        f = inverse.factor
        if f is None:
            return None
        if not isinstance(f, fx.Node):
            value = float(abs(1 / f if inverse.reciprocal and f else f))
            info = torch.finfo(dtype) if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype)
            if not getattr(info, "tiny", 1) <= value <= info.max:  # in this dtype it is 0, infinite or NaN
                return f"the factor is {f}"
            return None if value == 1 else value
        interval = self.bounds.get(f, ANY_NUMBER)
        least = interval.least
        if inverse.reciprocal:
            least = 1 / max(interval.most, 1e-300)
        elif f in self.masks.of:
            return f"the factor `{f.name}` is a mask"
        elif f in self.masks.zero:
            return f"the factor `{f.name}` is zero under a mask"
        elif least == 0 and not interval.nonzero and self.barred is not None:
            return f"the factor `{f.name}` is not bounded away from zero"
        return None if least >= 1 else DataFactor(self.index[f], inverse.reciprocal, least)


def _constant_nodes(graph: fx.Graph, sources: Collection[fx.Node]) -> set[fx.Node]:
    """Return the nodes that depend on sources and index inputs alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            val = node.meta.get("val")
            is_constant = isinstance(val, Tensor) and not (val.is_floating_point() or val.is_complex())
        else:
            is_constant = found.issuperset(node.all_input_nodes)
        if is_constant or node in sources:
            found.add(node)
    return found


def _num_elements(value: Value) -> int:
    """Return the number of a value's elements; 0 if it is not fixed."""
    if not is_fixed(value.shape):
        return 0
    return math.prod(value.shape)


def _moves_elements(direction: Direction) -> bool:
    """Return whether the result holds elements of the operand, unchanged up to their sign."""
    return isinstance(direction, (Tile, Patch)) or (isinstance(direction, Inverse) and direction.exact)


def _never_run() -> Tensor:
    raise AssertionError("a barred inverse is never run")


def _bind_numbers(by: Callable[..., Any], given: tuple[Any, ...]) -> Callable[..., Any]:
    """Return `by` as a function of the result and of the nodes in `given`; the numbers in it are bound."""
    numbers = [(i, g) for i, g in enumerate(given) if not isinstance(g, fx.Node)]
    if not numbers:
        return by

    def solve(result: Tensor, *operands: Tensor) -> Any:
        arguments: list[Any] = [*operands]
        for i, number in numbers:
            arguments.insert(i, number)
        return by(result, *arguments)

    return solve

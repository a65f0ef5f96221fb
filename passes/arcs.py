"""Lowering of an fx graph to a program: values, operations and all arcs with a domain that holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from revfx.errors import Cause, Reason
from revfx.passes.bounds import ANY_NUMBER, bounds
from revfx.passes.elimination import ONE
from revfx.passes.facts import assumed, masks
from revfx.passes.masks import MaskedArcs
from revfx.passes.moves import container_of, directions_of
from revfx.passes.program import SELECTS, Arc, Op, Program, Value
from revfx.passes.sizes import NUMBERS, as_number, same
from revfx.passes.tilings import tilings
from revfx.rules import (
    NOT_INJECTIVE,
    Inverse,
    NoInverse,
    Patch,
    Tile,
    declared_by_user,
    op_name,
    rule_for,
    why_none,
)


SMALLER = 16  # times the operand of a statistic is larger


@dataclass(frozen=True)
class Lowered:
    """A program with the fx nodes that it came from: one per operation, and one per value."""

    program: Program
    op_nodes: tuple[fx.Node, ...]
    value_nodes: tuple[fx.Node, ...]

    @cached_property
    def index(self) -> dict[fx.Node, int]:
        """The value that each node stands for."""
        return {n: i for i, n in enumerate(self.value_nodes)}

    @cached_property
    def inputs(self) -> tuple[int, ...]:
        """The values that the placeholders stand for."""
        return tuple(i for i, n in enumerate(self.value_nodes) if n.op == "placeholder")


def lower(
    graph: fx.Graph,
    sources: Collection[fx.Node] = (),
    barred: Mapping[fx.Node, str] | None = None,
    lossless: bool = True,
) -> Lowered:
    """Return the program of a graph; its nodes have fake results in `meta["val"]`.

    Attributes are sources, and so are the nodes of `sources`; nodes whose result is a (symbolic) number are left out.
    `barred`: the reason why no rounding inverse may give a node back, where no code corrects it; None: codes do.
    `lossless`: every value comes back with the forward's bits; else some are off by rounding.

    Further keys of `meta` that are read: `storage` (which memory a value lives in), `barrier` (why no region may
    contain the node), `where` (the user's file and line), `constant`, `facts`, `kept` and `directions` (the
    directions that its rule would yield). A node whose result is a tuple and the getitem nodes that take it apart
    become one operation with several outputs.
    """
    return _Lowering(graph, sources, barred, lossless and barred is None).run()


@dataclass(eq=False)
class _Lowering:
    graph: fx.Graph
    sources: Collection[fx.Node]
    barred: Mapping[fx.Node, str] | None
    lossless: bool

    def __post_init__(self) -> None:
        self.bounds, self.masks = bounds(self.graph), masks(self.graph)
        self.constant = _constant(self.graph, self.sources)
        self.coded = self.barred is None
        self.values: list[Value] = []
        self.index: dict[fx.Node, int] = {}
        self.storages: dict[object, int] = {}
        self.owner: dict[fx.Node, int] = {}

    def run(self) -> Lowered:
        op_nodes: list[fx.Node] = []
        outs: list[list[int]] = []
        outputs: tuple[int, ...] = ()
        for node in self.graph.nodes:
            if node.op == "output":
                outputs = tuple(dict.fromkeys(self.index[n] for n in node.all_input_nodes if n in self.index))
            elif isinstance(node.meta.get("val"), NUMBERS) or (node.op == "get_attr" and "val" not in node.meta):
                continue
            elif node.op in ("placeholder", "get_attr") or node in self.sources:
                source = node.op == "get_attr" or node in self.sources
                self._value(node, source=source, given=node.op == "placeholder")
            elif container_of(node) is not None:
                self.owner[node] = self.owner[node.args[0]]
                if isinstance(node.meta["val"], Tensor):
                    outs[self.owner[node]].append(self._value(node))
            else:
                self.owner[node] = len(op_nodes)
                op_nodes.append(node)
                outs.append([self._value(node)] if isinstance(node.meta["val"], Tensor) else [])
        self.directions = {node: directions_of(node) for node in op_nodes}
        ops = [self._op(node, tuple(outs[i])) for i, node in enumerate(op_nodes)]
        masked = MaskedArcs(self.directions, self.masks, self.index, self.barred, self._arc)
        for i, arc in (*tilings(self.values, self.index, self.directions, outs), *masked.run()):
            ops[i] = replace(ops[i], arcs=(*ops[i].arcs, arc))
        program = Program(self._with_memory(ops), tuple(ops), outputs)
        return Lowered(program, tuple(op_nodes), tuple(self.index))

    def _with_memory(self, ops: Sequence[Op]) -> tuple[Value, ...]:
        """The values, with the operations that write to their memory, and the inputs that it belongs to, noted."""
        written, theirs = set[int](), set[int]()
        for op in ops:
            if op.barrier is not None and op.barrier.kind is Reason.WRITES_IN_PLACE:
                written.update(self.values[v].storage for v in op.ins)
        for v in self.values:
            if v.given or v.source:
                theirs.add(v.storage)
        return tuple(replace(v, written=v.storage in written, given=v.storage in theirs) for v in self.values)

    def _value(self, node: fx.Node, source: bool = False, given: bool = False) -> int:
        val = node.meta["val"]
        storage = self.storages.setdefault(node.meta.get("storage", node), len(self.storages))
        nbytes = node.meta.get("storage_nbytes", as_number(val.numel()) * val.element_size())
        index = self.index[node] = len(self.values)
        kept = node.meta.get("kept", False)
        self.values.append(Value(node.name, tuple(val.shape), val.dtype, nbytes, storage, source, given, kept=kept))
        return index

    def _op(self, node: fx.Node, outs: tuple[int, ...]) -> Op:
        ins = tuple(dict.fromkeys(self.index[n] for n in node.all_input_nodes if n in self.index))
        arcs: list[Arc] = []
        refused: dict[int, Cause] = {}
        directions = self.directions[node]
        for direction in directions if outs else ():
            if not isinstance(direction, (Inverse, NoInverse)):
                continue
            solved = direction.solves
            if not isinstance(solved, fx.Node) or solved.op == "get_attr" or solved not in self.index:
                continue
            if isinstance(direction, NoInverse):
                arc = Cause(direction.kind, direction.reason)
            else:
                arc = self._arc(node, direction)
            if isinstance(arc, Cause):
                refused[self.index[solved]] = arc
            else:
                arcs.append(arc)
        name = op_name(node.target)
        ruled = "directions" in node.meta or rule_for(node) is not None
        unknown = not ruled or (name in NOT_INJECTIVE and not directions)
        whole = any(getattr(d, "matrix", None) for d in directions)
        arcs += self._statistics(name, ins, outs)
        solved = {a.head for a in arcs}
        moved = [isinstance(d, (Tile, Patch)) or (isinstance(d, Inverse) and d.exact) for d in directions]
        if unknown:
            refused = {v: why_none(name) for v in ins if not self.values[v].source}
        return Op(
            name=name,
            ins=ins,
            outs=outs,
            arcs=tuple(arcs),
            refused=tuple((v, r) for v, r in refused.items() if v not in solved),
            where=node.meta.get("where", ""),
            barrier=node.meta.get("barrier"),
            opaque=unknown or whole,
            moves=bool(moved) and all(moved),
            terms=self._terms(node, ins) if len(outs) == 1 else (),
        )

    def _statistics(self, name: str, ins: tuple[int, ...], outs: tuple[int, ...]) -> Iterator[Arc]:
        """Yield results that may be kept for want of an inverse, as the mean and scale that a batch is freed of."""
        most = max((_size(self.values[v]) for v in ins if not self.values[v].source), default=0)
        # where inverses round, none that was selected from what may come back by one
        for v in outs if self.lossless or name.strip("_") not in SELECTS else ():
            if 0 < _size(self.values[v]) * SMALLER <= most:
                yield Arc(v, (), _never_run, exact=False, barred="it is small beside its operands")

    def _terms(self, node: fx.Node, ins: tuple[int, ...]) -> tuple[tuple[int, float], ...]:
        """Return the terms of a sum, if each operand is multiplied by a number."""
        y, factors, number = node.meta["val"], dict.fromkeys(ins, 0.0), 0.0
        found = [d for d in self.directions[node] if isinstance(d, Inverse) and d.solves in node.all_input_nodes]
        solved = {self.index.get(d.solves) for d in found}
        if not solved or solved != {*ins} or not (isinstance(y, Tensor) and y.is_floating_point()):
            return ()
        for d in found:
            a, f = d.solves.meta["val"], 1.0 if d.factor is None else d.factor
            alike = d.solves.op == "get_attr" or (a.dtype == y.dtype and same(a.shape, y.shape))
            scaled = isinstance(f, (int, float)) and not isinstance(self._factor(d, y.dtype), str)
            if d.rest is None or not alike or not scaled or d.solves in (self.barred or ()):
                return ()
            factors[self.index[d.solves]] += 1 / f if d.reciprocal else f
            number = d.rest(*(0.0 if isinstance(g, fx.Node) else g for g in d.given))
        return (*factors.items(), (ONE, float(number))) if all(factors.values()) and math.isfinite(number) else ()

    def _arc(self, node: fx.Node, inverse: Inverse) -> Arc | Cause:
        """Return the arc of one direction, or the reason why its domain does not hold."""
        name = op_name(node.target)
        result = node if inverse.result is None else inverse.result
        a, y = inverse.solves.meta["val"], result.meta["val"]
        if not isinstance(y, Tensor):
            return Cause(Reason.NO_RULE, "the result is not one tensor")
        if inverse.coded and not self.coded:
            if a.dtype != y.dtype:
                return Cause(Reason.LOSES_BITS, f"the cast from {a.dtype} to {y.dtype} loses bits")
            return why_none(name)
        given = [g for g in inverse.given if isinstance(g, fx.Node)]
        if any(isinstance(n, fx.Node) and n not in self.index for n in (*given, inverse.factor)):
            return Cause(Reason.DATA_DEPENDENT, f"`{name}` reads a number that only the run knows")
        if inverse.solves in given:
            return Cause(Reason.NON_INVERTIBLE, f"both operands of `{name}` are the same value")
        if not inverse.exact:
            if not a.is_floating_point() and not a.is_complex():
                text = f"it is {a.dtype}, and only floating-point values are inverted"
                return Cause(Reason.NON_INVERTIBLE, text)
            if a.dtype != y.dtype and not inverse.coded:
                return Cause(Reason.LOSES_BITS, f"`{name}` turns {a.dtype} into {y.dtype}")
            if inverse.matrix is not None and inverse.matrix not in self.constant:
                return Cause(Reason.NON_INVERTIBLE, f"`{name}` multiplies by a matrix that is computed from data")
            if inverse.matrix is None and not same(a.shape, y.shape):
                return Cause(Reason.LAYOUT, f"`{name}` broadcasts it from {tuple(a.shape)} to {tuple(y.shape)}")
        factor = self._factor(inverse, y.dtype)
        if isinstance(factor, str):
            return Cause(Reason.ZERO_FACTOR, factor)
        return Arc(
            head=self.index[inverse.solves], tail=(self.index[result], *(self.index[g] for g in given)),
            solve=_with_numbers(inverse.by, 1, inverse.given), exact=inverse.exact,
            reciprocal=inverse.reciprocal, **factor,
            text=f"{inverse.solves.name} <- {', '.join(n.name for n in (node, *given))}  ({name})",
            assumes=assumed(given, self.index) if inverse.exact else (),
            coded=inverse.coded,
            declared=inverse.declared or declared_by_user(node),
            runs=(self.owner[node],) if inverse.runs else (),
            barred=None if inverse.exact else (self.barred or {}).get(inverse.solves),
        )  # fmt: skip

    def _factor(self, inverse: Inverse, dtype: torch.dtype) -> dict[str, Any] | str:
        """Return the condition on the factor of the solved operand, or the reason why it may be zero."""
        f = inverse.factor
        if f is None:
            return {}
        if not isinstance(f, fx.Node):
            value = float(abs(1 / f if inverse.reciprocal and f else f))
            info = torch.finfo(dtype) if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype)
            # 0 or infinite, also where it only is so in this dtype; or NaN
            if not getattr(info, "tiny", 1) <= value <= info.max:
                return f"the factor is {f}"
            return {} if value == 1 else {"factor": value}
        interval = self.bounds.get(f, ANY_NUMBER)
        least = interval.least
        if inverse.reciprocal:
            least = 1 / max(interval.most, 1e-300)
        elif f in self.masks.of:
            return f"the factor `{f.name}` is a mask"
        elif f in self.masks.zero:
            return f"the factor `{f.name}` is zero under a mask"
        elif least == 0 and not interval.nonzero and not self.coded:
            return f"the factor `{f.name}` is not bounded away from zero"
        return {} if least >= 1 else {"factor": self.index[f], "measured": True, "least": least}


def _constant(graph: fx.Graph, sources: Collection[fx.Node]) -> set[fx.Node]:
    """Return the nodes that follow from sources, and from inputs that are indices, alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        val = node.meta.get("val")
        index = isinstance(val, Tensor) and not (val.is_floating_point() or val.is_complex())
        made = node.op != "placeholder" and found.issuperset(node.all_input_nodes)
        if made or node in sources or (node.op == "placeholder" and index):
            found.add(node)
    return found


def _size(value: Value) -> int:
    """Return how many elements a value has; 0 where that is not fixed."""
    return math.prod(value.shape) if all(type(n) is int for n in value.shape) else 0


def _never_run() -> Tensor:
    raise AssertionError("a barred inverse is never run")


def _with_numbers(by: Callable[..., Any], results: int, given: tuple[Any, ...]) -> Callable[..., Any]:
    """Return a function of results and `given` operands, with those that are plain numbers put in their places."""
    constants = {i: g for i, g in enumerate(given, results) if not isinstance(g, fx.Node)}
    n = results + len(given)

    def filled(*tail: Tensor) -> Any:
        rest = iter(tail)
        return by(*(constants[i] if i in constants else next(rest) for i in range(n)))

    return filled if constants else by

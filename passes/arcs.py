"""From an fx graph to a program: values, operations and every arc whose domain holds."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from revfx.passes.atoms import CERTAIN, NONE, PERHAPS, atoms
from revfx.passes.bounds import UNKNOWN, Interval, bounds
from revfx.passes.masks import masked_arcs
from revfx.passes.program import Arc, Op, Program, Value
from revfx.rules import Inverse, Masked, NoInverse, Tile, op_name, rule_for, why_none


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


def lower(graph: fx.Graph, module_of: Callable[[str], torch.nn.Module] | None = None) -> Lowered:
    """The program of a graph whose nodes carry fake results in `meta["val"]`.

    Further keys of `meta` that are read: `storage` (which memory a value lives in), `barrier` (why no region may
    contain the node), `where` (the user's file and line), `atoms` and `constant`. A node whose result is a tuple and
    the getitem nodes that take it apart become one operation with several outputs.
    """
    return _Lowering(graph, module_of).run()


class _Lowering:
    def __init__(self, graph: fx.Graph, module_of: Callable[[str], torch.nn.Module] | None) -> None:
        self.graph, self.module_of = graph, module_of
        self.atoms, self.bounds = atoms(graph), bounds(graph)
        self.values: list[Value] = []
        self.value_nodes: list[fx.Node] = []
        self.index: dict[fx.Node, int] = {}
        self.storages: dict[object, int] = {}
        self.owner: dict[fx.Node, int] = {}

    def run(self) -> Lowered:
        op_nodes: list[fx.Node] = []
        outs: list[list[int]] = []
        outputs: tuple[int, ...] = ()
        for node in self.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self._value(node, source=node.op == "get_attr", given=node.op == "placeholder")
            elif node.op == "output":
                outputs = tuple(dict.fromkeys(self.index[n] for n in node.all_input_nodes))
            elif self._takes_apart(node):
                self.owner[node] = self.owner[node.args[0]]
                if isinstance(node.meta["val"], Tensor):
                    outs[self.owner[node]].append(self._value(node))
            else:
                self.owner[node] = len(op_nodes)
                op_nodes.append(node)
                outs.append([self._value(node)] if isinstance(node.meta["val"], Tensor) else [])
        ops = [self._op(node, tuple(outs[i])) for i, node in enumerate(op_nodes)]
        for i, arcs in (*self._tilings(op_nodes, outs), *masked_arcs(op_nodes, self.index, self._arc)):
            ops[i] = replace(ops[i], arcs=ops[i].arcs + arcs)
        written = {self.values[v].storage for op in ops if op.barrier for v in op.ins if self._writes(op)}
        theirs = {v.storage for v in self.values if v.given or v.source}
        values = tuple(replace(v, written=v.storage in written, given=v.storage in theirs) for v in self.values)
        return Lowered(Program(values, tuple(ops), outputs), tuple(op_nodes), tuple(self.value_nodes))

    @staticmethod
    def _writes(op: Op) -> bool:
        return op.barrier is not None and "writes" in op.barrier

    @staticmethod
    def _takes_apart(node: fx.Node) -> bool:
        source = node.args[0] if node.args else None
        return (
            node.target is operator.getitem
            and isinstance(source, fx.Node)
            and not isinstance(source.meta.get("val"), Tensor)
        )

    def _value(self, node: fx.Node, source: bool = False, given: bool = False) -> int:
        val = node.meta["val"]
        storage = self.storages.setdefault(node.meta.get("storage", node), len(self.storages))
        nbytes = node.meta.get("storage_nbytes", val.numel() * val.element_size())
        index = self.index[node] = len(self.values)
        self.values.append(Value(node.name, tuple(val.shape), val.dtype, nbytes, storage, source, given))
        self.value_nodes.append(node)
        return index

    def _op(self, node: fx.Node, outs: tuple[int, ...]) -> Op:
        ins = tuple(dict.fromkeys(self.index[n] for n in node.all_input_nodes if n in self.index))
        module = self.module_of(str(node.target)) if node.op == "call_module" and self.module_of else None
        rule = rule_for(node, module)
        arcs: list[Arc] = []
        refused: dict[int, str] = {}
        if rule is not None and node.meta.get("barrier") is None and len(outs) >= 1:
            for direction in rule(node):
                if isinstance(direction, Masked):
                    continue
                solved = direction.whole if isinstance(direction, Tile) else direction.solves
                if not isinstance(solved, fx.Node) or solved.op == "get_attr" or solved not in self.index:
                    continue
                if isinstance(direction, NoInverse):
                    refused[self.index[solved]] = direction.reason
                elif isinstance(direction, Inverse):
                    arc = self._arc(node, direction)
                    if isinstance(arc, str):
                        refused[self.index[solved]] = arc
                    else:
                        arcs.append(arc)
        name = str(node.target) if node.op == "call_module" else op_name(node.target)
        solved = {a.head for a in arcs}
        if rule is None:
            refused = {v: f"`{name}` {why_none(name)}" for v in ins if not self.values[v].source}
        return Op(
            name=name,
            ins=ins,
            outs=outs,
            arcs=tuple(arcs),
            refused=tuple((v, r) for v, r in refused.items() if v not in solved),
            where=node.meta.get("where", ""),
            barrier=node.meta.get("barrier"),
            opaque=rule is None or node.op == "call_module",
        )

    def _arc(self, node: fx.Node, inverse: Inverse) -> Arc | str:
        """The arc of one direction, or why its domain does not hold."""
        a, y = inverse.solves.meta["val"], node.meta["val"]
        if not isinstance(y, Tensor):
            return "the result is not one tensor"
        given = [g for g in inverse.given if isinstance(g, fx.Node)]
        if inverse.solves in given:
            return f"both operands of `{op_name(node.target)}` are the same value"
        if not inverse.exact:
            if not a.is_floating_point() and not a.is_complex():
                return f"it is {a.dtype}, and only floating-point values are inverted"
            if a.dtype != y.dtype:
                return f"`{op_name(node.target)}` turns {a.dtype} into {y.dtype}"
            if a.shape != y.shape:
                return f"`{op_name(node.target)}` broadcasts it from {tuple(a.shape)} to {tuple(y.shape)}"
        factor = self._factor(inverse)
        if isinstance(factor, str):
            return factor
        constants = {i: g for i, g in enumerate(inverse.given) if not isinstance(g, fx.Node)}
        barred, atoms = None, NONE if inverse.exact else self.atoms[inverse.solves]
        if atoms == CERTAIN:
            barred = "it can hold exact zeros, which a rounding inverse would return as +-1e-17"
        return Arc(
            head=self.index[inverse.solves], tail=(self.index[node], *(self.index[g] for g in given)),
            solve=_filled(inverse.by, constants) if constants else inverse.by,
            exact=inverse.exact, barred=barred, suspect=atoms == PERHAPS,
            factor=factor[0], measured=factor[1], reciprocal=inverse.reciprocal,
            text=f"{inverse.solves.name} <- {', '.join(n.name for n in (node, *given))}  ({op_name(node.target)})",
            partial=a.numel() < y.numel(),
        )  # fmt: skip

    def _factor(self, inverse: Inverse) -> tuple[float | int | None, bool] | str:
        """What the solved operand was multiplied by and whether it must be measured, or why it may be zero."""
        f = inverse.factor
        if f is None:
            return None, False
        if not isinstance(f, fx.Node):
            value = float(abs(1 / f if inverse.reciprocal and f else f))
            if value == 0 or value != value or value == float("inf"):
                return f"the factor is {f}"
            return (None if value == 1 else value), False
        interval: Interval = self.bounds.get(f, UNKNOWN)
        if inverse.reciprocal:
            return (None, False) if interval.most <= 1 else (self.index[f], True)
        if interval.least == 0 and not interval.nonzero:
            return f"the factor `{f.name}` is not bounded away from zero"
        return (None, False) if interval.least >= 1 else (self.index[f], True)

    def _tilings(self, op_nodes: list[fx.Node], outs: list[list[int]]) -> Iterator[tuple[int, tuple[Arc, ...]]]:
        """Arcs from parts that tile a value to the whole, each with the first operation that makes one of the parts."""
        tiles: dict[tuple[int, int], list[tuple[int, int, Tile]]] = {}
        for i, node in enumerate(op_nodes):
            rule = rule_for(node)
            if rule is None or node.op == "call_module" or node.meta.get("barrier") is not None:
                continue
            for t in rule(node):
                if isinstance(t, Tile) and t.whole in self.index and t.part < len(outs[i]):
                    tiles.setdefault((self.index[t.whole], t.dim), []).append((i, outs[i][t.part], t))
        for (whole, dim), parts in tiles.items():
            chosen = _exact_cover([t.index for _, _, t in parts], self.values[whole].shape[dim])
            if chosen is None or self.values[whole].source:
                continue
            use = [parts[k] for k in chosen]
            solve = _assemble(self.values[whole].shape, dim, tuple((t.index, t.squeezed) for _, _, t in use))
            names = ", ".join(self.values[v].name for _, v, _ in use)
            text = f"{self.values[whole].name} <- {names}  (put together)"
            yield min(i for i, _, _ in use), (Arc(whole, tuple(v for _, v, _ in use), solve, exact=True, text=text),)


def _filled(by: Callable[..., Tensor], constants: dict[int, Any]) -> Callable[..., Tensor]:
    """`by` with the operands that are plain numbers put in their places."""

    def solve(y: Tensor, *given: Tensor) -> Tensor:
        rest = iter(given)
        return by(y, *(constants[i] if i in constants else next(rest) for i in range(len(given) + len(constants))))

    return solve


def _exact_cover(ranges: list[range], size: int) -> list[int] | None:
    """Indices of ranges that together hit each of 0..size-1 once, longest first from each start; None if none do."""
    chosen: list[int] = []
    covered = [False] * size
    for want in range(size):
        if covered[want]:
            continue
        fits = [
            k
            for k, r in enumerate(ranges)
            if len(r) and r[0] == want and r.step > 0 and not any(covered[i] for i in r) and k not in chosen
        ]
        if not fits:
            return None
        best = max(fits, key=lambda k: (ranges[k].step > 1, len(ranges[k])))
        chosen.append(best)
        for i in ranges[best]:
            covered[i] = True
    return chosen or None


def _assemble(shape: tuple[int, ...], dim: int, parts: tuple[tuple[range, bool], ...]) -> Callable[..., Tensor]:
    def solve(*tensors: Tensor) -> Tensor:
        whole = tensors[0].new_empty(shape)
        for tensor, (index, squeezed) in zip(tensors, parts, strict=True):
            at = (*[slice(None)] * dim, slice(index.start, index.stop, index.step))
            whole[at] = tensor.unsqueeze(dim) if squeezed else tensor
        return whole

    return solve


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in a nested structure, in order."""
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]

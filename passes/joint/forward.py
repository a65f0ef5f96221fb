"""The forward half of a joint graph, as a graph of its own that can be lowered to a program.

AOTAutograd traces forward and backward into one graph of aten operations: placeholders `primals_i` and `tangents_i`,
outputs first those of the forward, then the gradients; the functional updates of mutated inputs are `copy_` nodes at
its end.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from revfx.errors import Cause, Reason
from revfx.passes import _torch
from revfx.passes.arcs import Lowered, lower
from revfx.passes.facts import Facts, ancestors, annotate, constants
from revfx.passes.sizes import NUMBERS, as_number, fixed, of_its_shape, tensors_of
from revfx.passes.traits import barred, trained


NAMESPACES = ("aten", "prims", "inductor")  # operators that do nothing but compute their result
FORWARD, BACKWARD = "must_be_in_forward", "must_be_in_backward"
SEEDS = "inductor_seeds"  # inductor's random numbers are functions of such a tensor and of nothing else


@dataclass(frozen=True)
class ForwardGraph:
    """The part of the joint graph that forward outputs need: `nodes`, their program, and the map between them.

    `origin` maps the nodes of the lowered graph to those of the joint graph. `mutated` holds the placeholders that are
    written after the forward.
    """

    lowered: Lowered
    nodes: frozenset[fx.Node]
    origin: dict[fx.Node, fx.Node]
    mutated: frozenset[fx.Node]

    def value_node(self, value: int) -> fx.Node:
        """Return the joint graph's node for a value."""
        return self.origin[self.lowered.value_nodes[value]]

    def op_node(self, op: int) -> fx.Node:
        """Return the joint graph's node for an operation."""
        return self.origin[self.lowered.op_nodes[op]]


def forward_half(
    joint: fx.Graph, num_outputs: int, static: Collection[int], facts: Facts, coded: bool = False
) -> ForwardGraph:
    """Return the forward half of `joint`; `static` numbers the primals that outlive the step: parameters and buffers.

    `facts`: about the values of the compiled function's inputs. `coded`: codes correct the
    inverses, so that these may give back anything.
    """
    _read_no_shapes(joint)
    outputs = [n for n in pytree.tree_leaves(output_args(joint)[:num_outputs]) if isinstance(n, fx.Node)]
    held = [n for n in joint.nodes if n.meta.get("kept")]
    updates = [n for n in joint.nodes if n.target is torch.ops.aten.copy_.default]
    late = after_tangents(joint.nodes)
    written = [n.args[1] for n in updates if n.args[1] not in late]
    nodes = ancestors([*outputs, *held, *written])
    # what only updates an input, such as running statistics, is no part of the program
    used = ancestors([*outputs, *held, *read_later(joint, nodes)], stateless_inputs)
    primals = [n for n in joint.nodes if n.op == "placeholder" and str(n.target).startswith("primals")]
    lasting = [p for i, p in enumerate(primals) if i in static]
    mutated = frozenset(written_inputs(joint))
    # nothing of the values of a model's own inputs, which differ from step to step
    inputs = {p: _torch.plain_input(p) for p in lasting}
    known = annotate(joint, {p: [f for i, f in facts if i == at] for p, at in inputs.items()}, joint.owning_module)
    constant = constants(joint, known)
    for node in known:
        node.meta["facts"] = known[node]
    given = {p for p in primals if p not in mutated and _is_no_data(p.meta["val"])}
    # also by a backward of the user's own
    apart = {} if coded else barred(joint, trained(joint, output_args(joint), lasting))
    half = fx.Graph()
    copy: dict[fx.Node, fx.Node] = {}
    for node in joint.nodes:
        if node in used:
            copy[node] = new = half.node_copy(node, copy.get)
            _annotate(node, new)
            if node in constant:
                new.meta["constant"] = constant[node]
            if node in given:
                new.meta["kept"] = True
    for new in (n for n in half.nodes if "directions" in n.meta):  # which tell of nodes further down, too
        new.meta["directions"] = tuple(
            replace(d, solves=copy[d.solves], given=fx.map_arg(d.given, copy.__getitem__))
            for d in new.meta["directions"]
        )
    half.output([copy[n] for n in outputs])
    sources = {copy[n] for n in find_sources(joint, lasting, mutated, nodes) if n in copy}
    theirs = {copy[n]: why for n, why in apart.items() if n in copy}
    lowered = lower(half, sources=sources, barred=None if coded else theirs)
    return ForwardGraph(lowered, frozenset(nodes), {new: old for old, new in copy.items()}, mutated)


def _read_no_shapes(joint: fx.Graph) -> None:
    """Replace operations that read the shape of a tensor alone by ones that do not read it."""
    for node in joint.nodes:
        name = _torch.packet_name(node.target) if node.op == "call_function" else ""
        spelled = of_its_shape(name, node.args, node.kwargs, node.meta.get("val"))
        if spelled is not None and node.all_input_nodes:
            node.target, node.args = getattr(torch.ops.aten, spelled[0]).default, spelled[1]
            node.kwargs = {**spelled[2], "pin_memory": False}


MIN_CONSTANT_BYTES = 1024  # bytes of a constant that are not worth computing again


def find_sources(
    joint: fx.Graph, lasting: Iterable[fx.Node], mutated: Collection[Any], ahead: Collection[fx.Node]
) -> set[fx.Node]:
    """Return what the backward can read at little cost: parameters and buffers, what follows from them alone and is not
    larger than they are (views, casts, masks turned round), what is filled with a number, inductor's seeds, and masks
    that are drawn once for several readers.
    """
    found = set(lasting)
    held = {n for n in joint.nodes if n.op == "get_attr" and is_strided(n.meta.get("val"))}
    copies = {n for n in joint.nodes if n.meta.get("copy_of") in found}
    clean = {n for n in found | held if n not in mutated} | copies
    for node in joint.nodes:
        val = node.meta.get("val")
        if node.op != "call_function" or not all(n in clean for n in node.all_input_nodes):
            continue
        if _torch.packet_name(node.target) == SEEDS:
            clean.add(node)
        elif draws_numbers(node):
            parts = [node] if is_strided(val) else list(node.users)
            clean.update(p for p in parts if sum(u in ahead for u in p.users) > 1)
        elif is_strided(val) and _barrier(node) is None:
            theirs = sum(_nbytes(n.meta["val"]) for n in node.all_input_nodes)
            filled = not node.all_input_nodes and "empty" not in _torch.packet_name(node.target)
            if filled or _nbytes(val) <= max(MIN_CONSTANT_BYTES, theirs):
                clean.add(node)
    return found | clean


def _is_no_data(val: Any) -> bool:
    """Return whether an input can be no activation: an index, or a single number."""
    return isinstance(val, torch.Tensor) and not (val.dim() and (val.is_floating_point() or val.is_complex()))


def _nbytes(val: Any) -> int:
    return as_number(val.numel()) * val.element_size() if isinstance(val, torch.Tensor) else 0


def written_inputs(joint: fx.Graph) -> list[fx.Node]:
    """Return the inputs that the step writes: itself, or from what the forward graph returns, when it has returned."""
    of = (getattr(d, "mutated_input", None) for d in joint.output_node().meta.get("desc", ()))
    theirs = [t for t in of if t is not None]
    updated = {n.args[0] for n in joint.nodes if n.target is torch.ops.aten.copy_.default}
    inputs = joint.find_nodes(op="placeholder")
    return [p for p in inputs if p in updated or (theirs and p.meta.get("desc") in theirs)]


def is_strided(val: Any) -> bool:
    """Return whether a node's result is one tensor that has memory of its own or another's."""
    return isinstance(val, torch.Tensor) and val.layout == torch.strided


def output_args(graph: fx.Graph) -> Sequence[Any]:
    """Return the results of the graph, flat."""
    returned = graph.output_node().args[0]
    return returned if isinstance(returned, (list, tuple)) else [returned]


def draws_numbers(node: fx.Node) -> bool:
    """Return whether running a node again would give other random numbers."""
    return _torch.is_overload(node.target) and _torch.draws(node.target, node.args, node.kwargs)


def after_tangents(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the nodes that depend on a gradient coming in."""
    found: set[fx.Node] = set()
    for node in nodes:
        tangent = node.op == "placeholder" and str(node.target).startswith("tangents")
        if tangent or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def read_later(joint: fx.Graph, ahead: Collection[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Return those of the nodes `ahead` that the backward reads, each with the nodes of the backward that read it."""
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in joint.nodes:
        update = _torch.is_overload(node.target) and _torch.writes(node.target)
        if node in ahead or node.op == "output" or node.meta.get("partitioner_tag") == FORWARD or update:
            continue
        for n in node.all_input_nodes:
            if n in ahead:
                readers.setdefault(n, []).append(node)
    return readers


def stateless_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the operands that a node's saved results depend on: not statistics that are only updated."""
    if node.target is torch.ops.aten._native_batch_norm_legit_functional.default and node.args[5]:
        return [n for n in node.args[:3] if isinstance(n, fx.Node)]
    return node.all_input_nodes


def _annotate(node: fx.Node, new: fx.Node) -> None:
    """Note the metadata that `lower` reads: the user's line, the memory of the value, and bars."""
    val: Any = node.meta.get("val")
    new.meta["where"] = _where(node.meta.get("stack_trace"))
    if is_strided(val):
        new.meta["storage"] = _torch.storage_key(val)
        new.meta["storage_nbytes"] = as_number(val.untyped_storage().nbytes())
    if node.op == "call_function" and (barrier := _barrier(node)) is not None:
        new.meta["barrier"] = barrier


def _barrier(node: fx.Node) -> Cause | None:
    """Return the reason why an operation can't be run again, or None."""
    target: Any = node.target
    val = node.meta.get("val")
    if isinstance(val, NUMBERS) or getattr(target, "__module__", None) == "_operator":
        return None
    if not _torch.is_overload(target):
        name = getattr(target, "__name__", target)
        return Cause(Reason.OPAQUE, f"`{name}` is a higher-order operator, which is not run again")
    if target.namespace not in NAMESPACES:
        if "c10d" in target.namespace:
            return Cause(Reason.OPAQUE, f"`{target}` is a collective, which is run once")
        text = f"`{target}` is a custom operator: whether it only computes its result is not known"
        return Cause(Reason.OPAQUE, text)
    if _torch.writes(target):
        return Cause(Reason.WRITES_IN_PLACE, f"`{target}` writes its argument")
    if _torch.packet_name(target) == "as_strided":
        return Cause(Reason.LAYOUT, "`as_strided` reads memory, not a value")
    tensors = tensors_of(val)
    if any(free_unbacked_symbols(t) for t in tensors if not fixed(t.shape)):
        return Cause(Reason.DATA_DEPENDENT, f"the size of the result of `{target}` depends on data")
    if node.kwargs.get("generator") is not None:
        return Cause(Reason.HIDDEN_STATE, f"`{target}` draws from a generator of its own")
    if any(t.layout != torch.strided for t in tensors):
        return Cause(Reason.LAYOUT, f"`{target}` returns a tensor that is not strided")
    return None


@functools.cache
def _where(trace: str | None) -> str:
    """Return the user's file and line out of a stack trace: `model.py:41`."""
    places = re.findall(r'File "([^"]+)", line (\d+)', trace or "")
    theirs = [p for p in places if "/torch/" not in p[0] and "/revfx/" not in p[0]] or places
    return f"{theirs[-1][0]}:{theirs[-1][1]}" if theirs else ""

"""The forward half of a joint graph, as a graph of its own that can be lowered to a program.

AOTAutograd traces forward and backward into one graph of aten operations, with placeholders `primals_i` and
`tangents_i`. Its outputs are those of the forward, then the gradients. `copy_` nodes at its end update mutated inputs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from revfx.errors import Cause, Reason
from revfx.passes import _torch
from revfx.passes.arcs import Lowered, lower
from revfx.passes.facts import Fact, Facts, ancestors, annotate, fold_constants
from revfx.passes.sizes import NUMBERS, as_number, is_fixed, replace_shape_reader, tensors_of
from revfx.passes.traits import find_barred, find_trained


NAMESPACES = ("aten", "prims", "inductor")  # operators without other effects than their result
FORWARD, BACKWARD = "must_be_in_forward", "must_be_in_backward"
SEEDS = "inductor_seeds"  # the operator with a result that determines inductor's random numbers


@dataclass(frozen=True)
class ForwardGraph:
    """The part of the joint graph that forward outputs need.

    Attributes:
        lowered: its graph and program.
        nodes: its nodes in the joint graph.
        origin: the nodes of the joint graph, by those of the lowered graph.
        mutated: the placeholders that are written after the forward.
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
    """Return the forward half of a joint graph.

    Args:
        joint: the joint graph; operations that read the shape of a tensor alone are replaced in it.
        num_outputs: the number of the forward's outputs.
        static: the numbers of the primals that outlive the step: parameters and buffers.
        facts: facts about the values of the compiled function's inputs.
        coded: codes correct the inverses, so no inverse is barred.
    """
    _replace_shape_readers(joint)

    # The nodes that the forward computes. Those that only update an input, like running statistics, are no part of
    # the program.
    outputs = output_nodes(joint, num_outputs)
    nodes = ancestors([*outputs, *written_values(joint)])
    used = ancestors([*outputs, *read_later(joint, nodes)], stateless_inputs)

    # Facts about parameters and buffers; the values of the model's own inputs differ from step to step.
    primals = [n for n in joint.find_nodes(op="placeholder") if str(n.target).startswith("primals")]
    lasting = [p for i, p in enumerate(primals) if i in static]
    facts_of_input: dict[fx.Node, list[Fact]] = {}
    for p in lasting:
        index = _torch.input_number(p)
        facts_of_input[p] = [fact for i, fact in facts if i == index]
    known = annotate(joint, facts_of_input, joint.owning_module)
    constant = fold_constants(joint, known)
    for node, facts_of_node in known.items():
        node.meta["facts"] = facts_of_node

    # A copy of these nodes, with the metadata that the lowering reads.
    mutated = frozenset(written_inputs(joint))
    half = fx.Graph()
    copy: dict[fx.Node, fx.Node] = {}
    for node in joint.nodes:
        if node in used:
            copy[node] = new = half.node_copy(node, copy.get)
            _annotate(node, new)
            if node in constant:
                new.meta["constant"] = constant[node]
    for primal in primals:
        if primal in copy and primal not in mutated and _is_no_data(primal.meta["val"]):
            copy[primal].meta["kept"] = True
    half.output([copy[n] for n in outputs])

    # Without codes, inverses that round are barred from nodes that the backward reads exactly, the user's own as well.
    reasons: dict[fx.Node, str] | None = None
    if not coded:
        reasons = {}
        for node, reason in find_barred(joint, find_trained(joint, output_args(joint), lasting)).items():
            if node in copy:
                reasons[copy[node]] = reason
    sources = {copy[n] for n in find_sources(joint, lasting, mutated, nodes) if n in copy}
    lowered = lower(half, sources=sources, barred=reasons)
    return ForwardGraph(lowered, frozenset(nodes), dict(zip(copy.values(), copy, strict=True)), mutated)


def _replace_shape_readers(joint: fx.Graph) -> None:
    """Replace operations that read the shape of a tensor alone by ones that do not read the tensor."""
    for node in joint.nodes:
        name = _torch.packet_name(node.target) if node.op == "call_function" else ""
        replacement = replace_shape_reader(name, node.args, node.kwargs, node.meta.get("val"))
        if replacement is not None and node.all_input_nodes:
            name, args, options = replacement
            node.target, node.args = getattr(torch.ops.aten, name).default, args
            node.kwargs = {**options, "pin_memory": False}


MIN_CONSTANT_BYTES = 1024  # a smaller constant is kept rather than recomputed


def find_sources(
    joint: fx.Graph, lasting: Iterable[fx.Node], mutated: Collection[Any], ahead: Collection[fx.Node]
) -> set[fx.Node]:
    """Return the nodes that the backward can read at little cost.

    These are parameters and buffers; values that follow from them alone and are not larger than they are (views, casts,
    inverted masks); tensors filled with a number; inductor's seeds; and random masks with several readers.

    Args:
        joint: the graph.
        lasting: its parameters and buffers.
        mutated: inputs that the step writes.
        ahead: nodes of the forward.
    """
    found = set(lasting)
    held = {n for n in joint.find_nodes(op="get_attr") if is_strided(n.meta.get("val"))}
    copies = {n for n in joint.nodes if n.meta.get("copy_of") in found}
    clean = (found | held).difference(mutated) | copies
    for node in joint.nodes:
        if node.op == "call_function" and all(n in clean for n in node.all_input_nodes):
            clean.update(_cheap_results(node, ahead))
    return found | clean


def _cheap_results(node: fx.Node, ahead: Collection[fx.Node]) -> Iterator[fx.Node]:
    """Yield the results of an operation on sources that are sources as well."""
    val = node.meta.get("val")
    if _torch.packet_name(node.target) == SEEDS:
        yield node
    elif draws_numbers(node):
        for part in [node] if is_strided(val) else node.users:
            if sum(user in ahead for user in part.users) > 1:
                yield part
    elif is_strided(val) and _barrier(node) is None:
        operand_bytes = sum(_nbytes(n.meta["val"]) for n in node.all_input_nodes)
        is_filled = not node.all_input_nodes and "empty" not in _torch.packet_name(node.target)
        if is_filled or _nbytes(val) <= max(MIN_CONSTANT_BYTES, operand_bytes):
            yield node


def _is_no_data(val: Any) -> bool:
    """Return whether an input can be no activation: an index, or a single number."""
    return isinstance(val, torch.Tensor) and not (val.dim() and (val.is_floating_point() or val.is_complex()))


def _nbytes(val: Any) -> int:
    return as_number(val.numel()) * val.element_size() if isinstance(val, torch.Tensor) else 0


def find_updates(joint: fx.Graph) -> list[Any]:
    """Return the nodes that write to inputs of the graph."""
    return joint.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)


def written_values(joint: fx.Graph) -> list[Any]:
    """Return the nodes that the forward computes for the updates of inputs."""
    late = after_tangents(joint.nodes)
    return [n.args[1] for n in find_updates(joint) if n.args[1] not in late]


def written_inputs(joint: fx.Graph) -> list[fx.Node]:
    """Return the inputs that the step writes: in the graph, or with results of the forward after it has returned."""
    updated = {n.args[0] for n in find_updates(joint)}
    written_after: list[Any] = []
    for desc in joint.output_node().meta.get("desc", ()):
        if getattr(desc, "mutated_input", None) is not None:
            written_after.append(desc.mutated_input)
    inputs: list[fx.Node] = []
    for p in joint.find_nodes(op="placeholder"):
        if p in updated or (written_after and p.meta.get("desc") in written_after):
            inputs.append(p)
    return inputs


def is_strided(val: Any) -> bool:
    """Return whether a node's result is one tensor in an allocation."""
    return isinstance(val, torch.Tensor) and val.layout == torch.strided


def output_args(graph: fx.Graph) -> Sequence[Any]:
    """Return the results of the graph, flat."""
    returned = graph.output_node().args[0]
    return returned if isinstance(returned, (list, tuple)) else [returned]


def output_nodes(graph: fx.Graph, count: int) -> list[fx.Node]:
    """Return the nodes among the first `count` results of a graph."""
    return [n for n in pytree.tree_leaves(output_args(graph)[:count]) if isinstance(n, fx.Node)]


def first_operation(graph: fx.Graph) -> fx.Node:
    """Return the first node of a graph after its placeholders."""
    return next(n for n in graph.nodes if n.op != "placeholder")


def draws_numbers(node: fx.Node) -> bool:
    """Return whether a node draws random numbers."""
    return _torch.is_overload(node.target) and _torch.is_random(node.target, node.args, node.kwargs)


def after_tangents(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the nodes that depend on an incoming gradient."""
    found: set[fx.Node] = set()
    for node in nodes:
        is_tangent = node.op == "placeholder" and str(node.target).startswith("tangents")
        if is_tangent or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def read_later(joint: fx.Graph, ahead: Collection[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Return the nodes of the backward that read nodes of the forward (`ahead`), by the nodes that they read."""
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in joint.nodes:
        writes = _torch.is_overload(node.target) and _torch.is_mutating(node.target)
        if node in ahead or node.op == "output" or node.meta.get("partitioner_tag") == FORWARD or writes:
            continue
        for n in node.all_input_nodes:
            if n in ahead:
                readers.setdefault(n, []).append(node)
    return readers


def stateless_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the operands that a node's saved results depend on: no statistics that are only updated."""
    if node.target is torch.ops.aten._native_batch_norm_legit_functional.default and node.args[5]:
        return [n for n in node.args[:3] if isinstance(n, fx.Node)]
    return node.all_input_nodes


def _annotate(node: fx.Node, new: fx.Node) -> None:
    """Set the metadata that `lower` reads: the user's line, the allocation of the value, and barriers."""
    val: Any = node.meta.get("val")
    new.meta["where"] = _where(node.meta.get("stack_trace"))
    if is_strided(val):
        new.meta["storage"] = _torch.storage_key(val)
        new.meta["storage_nbytes"] = as_number(val.untyped_storage().nbytes())
    barrier = _barrier(node) if node.op == "call_function" else None
    if barrier is not None:
        new.meta["barrier"] = barrier


def _barrier(node: fx.Node) -> Cause | None:
    """Return the reason why an operation can't be recomputed, or None."""
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
    if _torch.is_mutating(target):
        return Cause(Reason.WRITES_IN_PLACE, f"`{target}` writes its argument")
    if _torch.packet_name(target) == "as_strided":
        return Cause(Reason.LAYOUT, "`as_strided` reads memory, not a value")
    tensors = tensors_of(val)
    if any(free_unbacked_symbols(t) for t in tensors if not is_fixed(t.shape)):
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
    for file, line in reversed(places):
        if "/torch/" not in file and "/revfx/" not in file:
            return f"{file}:{line}"
    return ":".join(places[-1]) if places else ""

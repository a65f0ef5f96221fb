"""Saved tensors in the memory of an input or output: the rewrite saves that input or output itself, or a copy.

Autograd raises if a saved tensor was written to before the backward. It counts writes by tensor, for all views of it.
But a view that a compiled forward returns is a tensor of its own, so a write to its memory stays unseen: the gradient
is wrong, without an error (pytorch/pytorch#197887). So the backward gets the tensor itself, and takes the view of it.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping

import torch
from torch import fx

from revfx.passes import _torch
from revfx.passes.joint.forward import first_operation, output_args, output_nodes
from revfx.passes.sizes import tensors_of


def save_bases(forward: fx.Graph, backward: fx.Graph, num_outputs: int) -> None:
    """Rewrite the halves of a joint graph. The forward returns `num_outputs` results, then the saved tensors."""
    results = list(output_args(forward))
    outputs = set(output_nodes(forward, num_outputs))
    inputs = set(forward.find_nodes(op="placeholder"))
    memory = set[int]().union(*map(_memory, inputs | outputs))
    given = {str(n.target): n for n in backward.find_nodes(op="placeholder")}
    first = first_operation(backward)
    end = forward.output_node()
    kept = list(range(num_outputs))  # indices of the results that the forward still returns
    for i, node in enumerate(results[num_outputs:], num_outputs):
        is_inside = isinstance(node, fx.Node) and node not in inputs and not memory.isdisjoint(_memory(node))
        # A function of the user's may keep a tensor where autograd looks for no writes (`ctx.x = x`).
        if not is_inside or node.meta.get("saved_tensor_with_no_vc_check"):
            kept.append(i)
            continue
        base, views = None, list[fx.Node]()
        if node not in outputs:
            base, views = _find_base(node, outputs, given)

        # No base that the backward can take the view of: save the node as it is, or a copy.
        if base is None:
            kept.append(i)
            if _needs_copy(node, outputs, given):
                with forward.inserting_before(end):
                    results[i] = forward.call_function(torch.ops.aten.clone.default, (node,))
                results[i].meta = {**node.meta, "val": node.meta["val"].clone()}
                given[node.name].target = results[i].name
                given[node.name].meta = results[i].meta
            continue

        # Save the base, once, and take the view of it in the backward.
        old = given.pop(node.name)
        if base.name not in given:
            with backward.inserting_before(old):
                given[base.name] = backward.placeholder(base.name)
            given[base.name].meta = dict(base.meta)
            results[i] = base
            kept.append(i)
        copies = {base: given[base.name]}
        with backward.inserting_before(first):
            for view in views:
                copies[view] = backward.node_copy(view, lambda n, copies=copies: copies.get(n) or given[n.name])
        old.replace_all_uses_with(copies[node])
        backward.erase_node(old)
    end.args = (tuple(results[i] for i in kept),)
    if "desc" in end.meta:
        end.meta["desc"] = [end.meta["desc"][i] for i in kept]


def _find_base(
    node: fx.Node, outputs: Collection[fx.Node], given: Container[str]
) -> tuple[fx.Node | None, list[fx.Node]]:
    """Return the input or output that contains `node`, and the operations, in order, that take the view of it.

    Return (None, []) if there is none, or if the operations read nodes that the backward is not `given`.
    """
    path = [node]
    found: tuple[fx.Node | None, list[fx.Node]] = None, []
    while sources := _aliased_operands(path[-1]):
        if any(n.name not in given for n in path[-1].all_input_nodes if n is not sources[0]):
            break
        if sources[0].op == "placeholder" or sources[0] in outputs:
            found = sources[0], path[::-1]
        path.append(sources[0])
    return found


def _needs_copy(node: fx.Node, outputs: Collection[fx.Node], given: Mapping[str, fx.Node]) -> bool:
    """Return whether to save a copy of a node in the memory of an input or output."""
    if node not in outputs:
        return _is_dense(node)  # an output may be a part of it
    # If an output is a view, it is another tensor than the saved one.
    return bool(_aliased_operands(node)) and _is_copyable(given[node.name])


def _aliased_operands(node: fx.Node) -> list[fx.Node]:
    """Return the operands that share memory with the result of a node."""
    memory = _memory(node)
    return [n for n in node.all_input_nodes if not memory.isdisjoint(_memory(n))]


def _memory(node: fx.Node) -> set[int]:
    """Return the keys of the allocations of a node's tensors."""
    return {_torch.storage_key(t) for t in tensors_of(node.meta.get("val")) if t.layout == torch.strided}


def _is_copyable(placeholder: fx.Node) -> bool:
    """Return whether nothing in the backward depends on the strides of its inputs."""
    return all(u.target is not torch.ops.aten.as_strided.default for u in placeholder.users)


def _is_dense(node: fx.Node) -> bool:
    """Return whether a copy of a node's tensor has its strides."""
    t = node.meta["val"]
    return isinstance(t, torch.Tensor) and t.clone().stride() == t.stride()

"""What a forward saves, and lies in the memory of an input or output, is saved as that input or output, or as a copy.

Autograd raises if a saved tensor was written to before the backward. It counts writes by tensor, for all views
of it; but a view that a compiled forward returns is a tensor of its own, and its memory may be written to unseen: a
wrong gradient and no error (pytorch/pytorch#197887). So the backward gets the tensor itself, and takes the view of it.
"""

from __future__ import annotations

from collections.abc import Collection, Container

import torch
from torch import fx

from revfx.passes import _torch
from revfx.passes.joint.forward import output_args
from revfx.passes.sizes import tensors_of


def save_bases(forward: fx.Graph, backward: fx.Graph, num_outputs: int) -> None:
    """Rewrite the halves of a joint graph; after `num_outputs` results of the forward come those that it saves."""
    results = list(output_args(forward))
    outputs = {n for n in results[:num_outputs] if isinstance(n, fx.Node)}
    inputs = set(forward.find_nodes(op="placeholder"))
    memory = {key for n in inputs | outputs for key in _memory(n)}
    given = {str(n.target): n for n in backward.find_nodes(op="placeholder")}
    first = next(n for n in backward.nodes if n.op != "placeholder")
    end = forward.find_nodes(op="output")[0]
    kept = list(range(num_outputs))
    for i, node in enumerate(results[num_outputs:], num_outputs):
        inside = isinstance(node, fx.Node) and node not in inputs and _memory(node) & memory
        # a function of the user's may keep a tensor where autograd looks for no writes (`ctx.x = x`)
        inside = inside and not node.meta.get("saved_tensor_with_no_vc_check")
        both = inside and node in outputs  # if it is a view, the output and what is saved are two tensors
        base, views = _views(node, outputs, given) if inside and not both else (None, [])
        if base is None:
            kept.append(i)
            part = inside and not both and _is_dense(node)  # a part of it is an output
            is_view = any(_memory(n) & _memory(node) for n in node.all_input_nodes) if both else False
            if part or (is_view and _is_copyable(given[node.name])):
                with forward.inserting_before(end):
                    results[i] = forward.call_function(torch.ops.aten.clone.default, (node,))
                results[i].meta = {**node.meta, "val": node.meta["val"].clone()}
                given[node.name].target = results[i].name
                given[node.name].meta = results[i].meta
            continue
        old = given.pop(node.name)
        if base.name not in given:
            with backward.inserting_before(old):
                given[base.name] = backward.placeholder(base.name)
            given[base.name].meta = dict(base.meta)
            results[i] = base
            kept.append(i)
        again = {base: given[base.name]}
        with backward.inserting_before(first):
            for view in views:
                again[view] = backward.node_copy(view, lambda n, again=again: again.get(n) or given[n.name])
        old.replace_all_uses_with(again[node])
        backward.erase_node(old)
    end.args = (tuple(results[i] for i in kept),)
    if "desc" in end.meta:
        end.meta["desc"] = [end.meta["desc"][i] for i in kept]


def _views(node: fx.Node, outputs: Collection[fx.Node], given: Container[str]) -> tuple[fx.Node | None, list[fx.Node]]:
    """Return the input or output in whose memory `node` lies, and the operations, in order, that take it of that;
    (None, []) if there is none, or these need more than the backward is `given`.
    """
    path = [node]
    found: tuple[fx.Node | None, list[fx.Node]] = None, []
    while sources := [n for n in path[-1].all_input_nodes if _memory(n) & _memory(path[-1])]:
        if not all(n.name in given for n in path[-1].all_input_nodes if n is not sources[0]):
            return found
        if sources[0].op == "placeholder" or sources[0] in outputs:
            found = sources[0], path[::-1]
        path.append(sources[0])
    return found


def _memory(node: fx.Node) -> set[int]:
    """Return the storages that a node's tensors lie in."""
    return {_torch.storage_key(t) for t in tensors_of(node.meta.get("val")) if t.layout == torch.strided}


def _is_copyable(placeholder: fx.Node) -> bool:
    """Return whether nothing in the backward depends on the strides of its inputs."""
    return not any(u.target is torch.ops.aten.as_strided.default for u in placeholder.users)


def _is_dense(node: fx.Node) -> bool:
    """Return whether a copy of a node's tensor has its strides."""
    t = node.meta["val"]
    return isinstance(t, torch.Tensor) and t.clone().stride() == t.stride()

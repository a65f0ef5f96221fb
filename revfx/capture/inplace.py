"""In-place operations of a recorded graph: made functional where nothing else can see the write, else a barrier."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from revfx.capture.constants import is_pure
from revfx.errors import Cause, Reason
from revfx.passes._torch import may_draw
from revfx.rules import aten, op_name
from revfx.rules.layout import put


FUNCTIONAL = frozenset(
    """add sub mul div neg addcmul addcdiv lerp relu tanh sigmoid exp clamp clamp_min clamp_max abs square sqrt
    floor ceil round trunc""".split()
)
MOST_WRITES, SMALL = 4, 4096  # writes of parts to a tensor, unless it has few elements
# What fills a new tensor, with one number or with such as are drawn, and the form that draws the same ones. By name
# there is none, or another: `h.bernoulli()` takes the values of h for probabilities, `h.bernoulli_()` reads none.
# Not all of these have a derivative, so what they fill must never need one.
FILLING: Mapping[str, Any] = {
    "fill_": aten.fill.Scalar,
    "zero_": aten.zero.default,
    "bernoulli_": aten.bernoulli.p,
    "uniform_": aten.uniform.default,
    "normal_": aten.normal_functional.default,
    "exponential_": aten.exponential.default,
}


def functionalise(graph: fx.Graph) -> None:
    """Make in-place nodes whose operand has no other reader work out of place; give the others `meta["barrier"]`.

    A write can be seen by an input, a parameter or attribute that shares the memory, and by any other value in that
    memory that is read afterwards.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    memory: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), Tensor):
            memory.setdefault(node.meta["storage"][0], []).append(node)
    for node in [n for n in graph.nodes if "mutates" in n.meta]:
        reason = _why_not(node, node.meta["mutates"], memory, position)
        if reason is None:
            _make_functional(node)
        else:
            node.meta["barrier"] = Cause(Reason.WRITES_IN_PLACE, reason)
    writes = [n for n in graph.nodes if "barrier" in n.meta and "mutates" in n.meta]
    for nodes in memory.values():
        first = min((position[n] for n in nodes if "barrier" in n.meta and "mutates" in n.meta), default=None)
        if first is not None and any(n.op in ("get_attr", "placeholder") for n in nodes):
            _put_last(graph, nodes, writes, position, first)


def _put_last(
    graph: fx.Graph, nodes: list[fx.Node], writes: list[fx.Node], position: dict[fx.Node, int], first: int
) -> None:
    """Move writes to the memory of a buffer, as to running statistics, or of an input, as to a sum of log-determinants,
    and what serves them alone, behind all else: where they stand no region could go on. They stay where something reads
    there what was written, or writes to what they read, or where they draw.
    """
    moved = {n for n in nodes if position[n] >= first}
    last = graph.output_node()
    owners = [f"{n.target}." for n in graph.find_nodes(op="call_module") if position[n] > first]
    later = [n for n in writes if n not in moved and position[n] > first]
    written = {w.meta["storage"][0] for n in later for w in n.meta["mutates"]}
    if (
        any(n.op == "get_attr" and str(n.target).startswith((*owners,)) for n in nodes)
        or any(position[u] > first and u not in moved and u is not last for n in nodes for u in n.users)
        or any(i.meta["storage"][0] in written for n in moved for i in n.all_input_nodes)
        or any(may_draw(op_name(n.target), n.args, n.kwargs) for n in moved)
    ):
        return
    above = [i for n in moved for i in n.all_input_nodes]
    while above:
        node = above.pop()
        small = sum(_numel(n) for n in node.all_input_nodes) <= _numel(node)  # what they read is there until the end
        if node not in moved and small and moved.issuperset(node.users) and is_pure(node):
            moved.add(node)
            above += node.all_input_nodes
    for node in sorted(moved, key=position.__getitem__):
        last.prepend(node)


def _numel(node: fx.Node) -> int:
    return node.meta["val"].numel() if isinstance(node.meta.get("val"), Tensor) else 0


def _why_not(
    node: fx.Node, written: list[fx.Node], memory: dict[int, list[fx.Node]], position: dict[fx.Node, int]
) -> str | None:
    if node.op == "call_module":
        return "it writes to its input in place"
    name = op_name(node.target)
    if len(written) != 1 or not node.args or node.args[0] is not written[0]:
        return "it writes in place to something other than its first operand"
    named = name.rstrip("_") in FUNCTIONAL and name.endswith("_") and not name.endswith("__")
    # no tensor says with what, and it was made of none
    fills = name in FILLING and node.all_input_nodes == written and not written[0].all_input_nodes
    if not (named or fills or node.target is set_item) and node.kwargs.get("inplace") is not True:
        return "it writes in place, and has no functional form"
    if node.meta.get("unseen"):
        return "it writes in place, without gradients, to a value that has one"
    whole = memory[written[0].meta["storage"][0]]
    if sum(n.target is set_item for n in whole) > MOST_WRITES and written[0].meta["val"].numel() > SMALL:
        return "it is written to part by part, each of which would copy the whole"
    if _dtype_differs(node, written[0]):
        return "it writes in place a result of another dtype"
    here = position[node]
    for other in (n for n in whole if position[n] < here):
        if other.op in ("placeholder", "get_attr"):
            return f"it writes in place to memory of `{other.name}`, which is an input or an attribute of the model"
        apart = _apart(other.meta["val"], written[0].meta["val"])
        if not apart and any(position[user] > here for user in other.users):
            return f"it writes in place to a value whose alias or view `{other.name}` is read later"
    return None


def _apart(a: Tensor, b: Tensor) -> bool:
    """Return whether two views of one memory, such as the halves of a value, are seen to have no element in common."""
    if a.stride() != b.stride() or 0 in a.stride():
        return False
    order = sorted(range(a.dim()), key=lambda d: -a.stride(d))
    at: list[Any] = [a.storage_offset(), b.storage_offset()]
    apart = False
    room = [math.inf, *(a.stride(d) for d in order)]
    for d, outer in zip(order, room, strict=False):
        step = a.stride(d)
        firsts: list[int] = [start // step for start in at]
        at = [start % step for start in at]
        ends = [first + t.shape[d] for first, t in zip(firsts, (a, b), strict=True)]
        if max(ends) * step > outer:
            return False  # one goes on in the next row of the dimension outside
        apart |= ends[0] <= firsts[1] or ends[1] <= firsts[0]
    return apart


def set_item(x: Tensor, index: Any, value: Any) -> Tensor:
    """Set `x[index] = value`, and return x."""
    x[index] = value
    return x


def _dtype_differs(node: fx.Node, operand: fx.Node) -> bool:
    mine = operand.meta["val"].dtype
    others = [v for n in node.all_input_nodes if n is not operand and isinstance(v := n.meta.get("val"), Tensor)]
    return any(torch.promote_types(mine, o.dtype) != mine for o in others if o.is_floating_point() or o.dim() > 0)


def _make_functional(node: fx.Node) -> None:
    if node.target is set_item:
        node.target = put
        whole: Any = node.args[0]
        if op_name(whole.target) == "empty_like":  # running it again must give the same
            whole.target = torch.zeros_like
    elif op_name(node.target) in FILLING:
        node.op, node.target = "call_function", FILLING[op_name(node.target)]
    elif node.op == "call_method":
        node.target = str(node.target).rstrip("_")
    elif node.kwargs.get("inplace") is True:
        node.kwargs = {**node.kwargs, "inplace": False}
    else:
        node.target = getattr(torch, op_name(node.target).rstrip("_"))
    node.meta["made_functional"] = True

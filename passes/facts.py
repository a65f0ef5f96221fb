"""Facts about the values of constants: an index is a permutation or holds certain numbers, a factor is a mask.

A compiler sees no values, so facts are found with the real tensors. Each user of a fact checks it in every run
(`make_fact_check`): a changed buffer raises an error and never causes a wrong gradient.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from revfx.passes import _torch
from revfx.passes.sizes import is_fixed
from revfx.rules import op_name


PERMUTATION, ZEROS_AND_ONES = "permutation", "binary"
LIMIT = 1 << 16  # elements of the largest tensor whose values are read
INDEX_DTYPES = (torch.int32, torch.int64)
COPY_OPS = frozenset("alias clone detach lift_fresh_copy contiguous".split())
CAST_OPS = frozenset("to_copy convert_element_type to float double half bfloat16 bool int long type type_as".split())
REORDER_OPS = frozenset("flip roll".split())
LAYOUT_OPS = frozenset(
    "view reshape expand unsqueeze squeeze permute transpose unsafe_view broadcast_to"
    " getitem select slice narrow".split()
)
# The result is zero where the first operand is.
ZERO_KEEPING_OPS = COPY_OPS | CAST_OPS | {"div", "divide", "true_divide", "neg", "negative"}

Fact = str | tuple[int, ...]  # PERMUTATION, ZEROS_AND_ONES, or the integers that a tensor holds
Facts = tuple[tuple[int, Fact], ...]


def facts_of(inputs: Iterable[Any]) -> Facts:
    """Return the facts about inputs: pairs of an input's number and a fact."""
    found: list[tuple[int, Fact]] = []
    for i, t in enumerate(inputs):
        if isinstance(t, Tensor):
            for fact in facts_about(t):
                # A graph is compiled and cached for the numbers in a fact. Only a model's own tensors keep theirs.
                if isinstance(fact, str) or _torch.is_module_attribute(t):
                    found.append((i, fact))
    return tuple(found)


def facts_about(t: Any) -> tuple[Fact, ...]:
    """Return the facts about the elements of a tensor; synchronizes with the device."""
    if type(t) not in (Tensor, nn.Parameter) or t.layout != torch.strided or t.is_meta or t.requires_grad:
        return ()
    if not 0 < t.numel() <= LIMIT or t.dtype == torch.bool or t.is_complex():
        return ()
    with torch.no_grad(), _torch.no_dispatch():
        found: list[Fact] = []
        if t.dim() == 1 and t.dtype in INDEX_DTYPES:
            found.append(PERMUTATION if bool(_is_permutation(t)) else tuple(t.tolist()))
        # A mask of one value masks nothing. Running statistics start as all zeros or all ones.
        if bool(_is_binary(t)) and not bool((t == t.reshape(-1)[0]).all()):
            found.append(ZEROS_AND_ONES)
        return tuple(found)


def fact_holds(fact: Fact, t: Tensor) -> bool:
    """Return whether a fact is true of a tensor; synchronizes with the device."""
    if isinstance(fact, tuple):
        return t.numel() == len(fact) and tuple(t.flatten().tolist()) == fact
    return fact in facts_about(t)


def binary_facts(t: Tensor) -> tuple[Fact, ...]:
    """Return the elements of a small boolean tensor as a fact; synchronizes with the device."""
    if t.dtype != torch.bool or t.is_meta or not 0 < t.numel() <= LIMIT:
        return ()
    return (tuple(t.flatten().tolist()),)


def is_mask(t: Tensor) -> bool:
    """Return whether a tensor holds both zeros and ones, and nothing else."""
    return ZEROS_AND_ONES in facts_about(t)


# --- checks, recorded into the forward of a graph that uses a fact
def _is_permutation(p: Tensor) -> Tensor:
    return (p.sort().values == torch.arange(p.shape[0], device=p.device)).all()


def _is_binary(b: Tensor) -> Tensor:
    return ((b == 0) | (b == 1)).all()


def _equality_test(numbers: tuple[int, ...]) -> Callable[..., Tensor]:
    return lambda t: (t.flatten() == torch.tensor(numbers, device=t.device)).all()


CHECKS: Mapping[str, tuple[Callable[..., Tensor], str]] = {
    PERMUTATION: (_is_permutation, "an index is no permutation"),
    ZEROS_AND_ONES: (_is_binary, "a mask does not hold zeros and ones only"),
}


def make_fact_check(fact: Fact, name: str, where: str) -> tuple[Callable[..., Tensor], str]:
    """Return the test of a fact, and the error message for a run in which the test fails.

    Args:
        fact: the fact.
        name: of the tensor.
        where: the line of code that uses the fact.
    """
    if isinstance(fact, str):
        test, broken = CHECKS[fact]
    else:
        test, broken = _equality_test(fact), "an index holds other numbers"
    return test, (
        f"revfx: {broken} (`{name}`, at {where}), unlike when this model was compiled, so what was computed with "
        "it can't be computed back; call `torch.compiler.reset()` after changing such a tensor"
    )


# --- facts of the nodes of a graph
def annotate(graph: fx.Graph, known: Mapping[fx.Node, Sequence[Fact]], owner: Any) -> dict[fx.Node, tuple[Fact, ...]]:
    """Derive the facts of nodes.

    They are hints: each user of a fact checks the node itself.

    Args:
        graph: the graph.
        known: the facts of its inputs.
        owner: the module that holds the graph's attributes.
    """
    found: dict[fx.Node, tuple[Fact, ...]] = {n: tuple(f) for n, f in known.items()}
    for node in graph.nodes:
        if node.op == "get_attr":
            found[node] = facts_about(getattr(owner, str(node.target), None))
        elif _keeps_elements(node):
            found[node] = tuple(f for f in found.get(node.args[0], ()) if f == PERMUTATION)
    return {n: f for n, f in found.items() if f}


def _keeps_elements(node: fx.Node) -> bool:
    """Return whether a node is an index of the same elements as its operand, perhaps in another order."""
    val = node.meta.get("val")
    if node.op != "call_function" or not isinstance(val, Tensor) or val.dtype not in INDEX_DTYPES:
        return False
    moves = plain_name(node) in COPY_OPS | CAST_OPS | REORDER_OPS
    return moves and bool(node.args) and isinstance(node.args[0], fx.Node)


def fold_constants(graph: fx.Graph, facts: MutableMapping[fx.Node, tuple[Fact, ...]]) -> dict[fx.Node, Tensor]:
    """Fold nodes that depend on numbers alone, such as the index of a `roll`, or on numbers in `facts`.

    Only integers and booleans are folded, and at most `LIMIT` elements. The numbers of nodes that depend on `facts`
    are added to them.
    """
    found: dict[fx.Node, Tensor] = {}
    from_facts = set[fx.Node]()
    for node in graph.nodes:
        with torch.no_grad(), _torch.no_dispatch():
            known = _known_value(node, facts.get(node, ()))
            if known is not None:
                found[node] = known
                from_facts.add(node)
            elif _is_foldable(node) and all(n in found for n in node.all_input_nodes):
                args, kwargs = fx.map_arg((node.args, node.kwargs), found.__getitem__)
                found[node] = folded = node.target(*args, **kwargs)
                if not from_facts.isdisjoint(node.all_input_nodes):
                    facts[node] = (*facts.get(node, ()), tuple(folded.flatten().tolist()))
                    from_facts.add(node)
    return found


def _known_value(node: fx.Node, facts: Iterable[Fact]) -> Tensor | None:
    """Return the value of a node if a fact holds its numbers and its shape is fixed."""
    for fact in facts:
        if isinstance(fact, tuple):
            val = node.meta["val"]
            if not is_fixed(val.shape):
                return None
            device = "cpu" if val.is_meta else val.device  # a graph without data stands for one on a real device
            return torch.tensor(fact, dtype=val.dtype, device=device).reshape(val.shape)
    return None


def ancestors(
    nodes: Iterable[fx.Node], inputs: Callable[[fx.Node], Iterable[fx.Node]] = operator.attrgetter("all_input_nodes")
) -> set[fx.Node]:
    """Return `nodes` and all their ancestors; `inputs` returns the operands of a node."""
    found: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(inputs(node))
    return found


def index_facts(nodes: Iterable[fx.Node], index: Mapping[fx.Node, int]) -> tuple[tuple[int, Fact], ...]:
    """Return the facts for inverses that read `nodes` as indices; `index` numbers the nodes."""
    found: list[tuple[int, Fact]] = []
    for node in nodes:
        if node in index:
            found += [(index[node], fact) for fact in node.meta.get("facts", ()) if fact != ZEROS_AND_ONES]
    return tuple(found)


def _is_foldable(node: fx.Node) -> bool:
    val = node.meta.get("val")
    if node.op != "call_function" or not isinstance(val, Tensor) or not _torch.is_overload(node.target):
        return False
    is_integer = not val.is_floating_point() and not val.is_complex() and val.layout == torch.strided
    return is_integer and is_fixed(val.shape) and val.numel() <= LIMIT and _torch.is_pure(node.target)


# --- masks: nodes that hold zeros and ones, and the places where other nodes are zero
@dataclass(frozen=True, slots=True)
class Mask:
    """A value that is 1 where the boolean `root` equals `value`, and 0 elsewhere."""

    root: fx.Node
    value: bool


# Positions in a tensor, as pairs (root, value): those where the mask `root` equals `value`.
Places = frozenset[tuple[fx.Node, bool]]
NOWHERE: Places = frozenset()


@dataclass(frozen=True, slots=True)
class Masks:
    """The masks of a graph, and the places where other nodes are exactly zero, or one.

    All of it holds up to broadcasting: a root says the same about every row that it is repeated for.
    """

    of: Mapping[fx.Node, Mask]
    zero: Mapping[fx.Node, Places]
    one: Mapping[fx.Node, Places]


def find_masks(graph: fx.Graph) -> Masks:
    """Return the masks of a graph: booleans, values that are known to be binary, and their negations."""
    of: dict[fx.Node, Mask] = {}
    zero: dict[fx.Node, Places] = {}
    one: dict[fx.Node, Places] = {}
    parts: dict[tuple[object, ...], fx.Node] = {}
    for node in graph.nodes:
        if not isinstance(node.meta.get("val"), Tensor):
            continue
        mask = _derived_mask(node, of, parts)
        if mask is None and _is_binary_node(node):
            mask = Mask(node, True)
        if mask is not None:
            of[node] = mask
        zero_places = _zero_places(node, of, zero)
        if zero_places:
            zero[node] = zero_places
        if plain_name(node) == "exp" and node.args and node.args[0] in zero:
            one[node] = zero[node.args[0]]
    return Masks(of, zero, one)


def plain_name(node: fx.Node) -> str:
    """Return an operation's name without underscores and prefixes: `mul` of `__imul__`."""
    name = op_name(node.target).strip("_")
    if name in ("iadd", "radd", "isub", "imul", "rmul"):
        return name[1:]
    return name


def _is_binary_node(node: fx.Node) -> bool:
    if node.meta["val"].dtype == torch.bool or ZEROS_AND_ONES in node.meta.get("facts", ()):
        return True
    constant = node.meta.get("constant")
    return constant is not None and is_mask(constant)


def _derived_mask(
    node: fx.Node, of: Mapping[fx.Node, Mask], parts: MutableMapping[tuple[object, ...], fx.Node]
) -> Mask | None:
    """Return the mask that a node is as a copy, a part or the negation of another one.

    Args:
        node: the node.
        of: the masks of the nodes before it.
        parts: a part of a mask, such as `masks[0]`, and the first node that takes it. Equal parts are one root.
    """
    if node.op != "call_function":
        return None
    val, name = node.meta["val"], plain_name(node)
    a, b = (*node.args, None, None)[:2]
    if name == "sub" and a == 1 and isinstance(b, fx.Node) and b in of and not node.kwargs:
        return Mask(of[b].root, not of[b].value)
    if not isinstance(a, fx.Node) or a not in of or a.meta["val"].device != val.device:
        return None
    if name in COPY_OPS or name in CAST_OPS:
        return of[a]
    if name in LAYOUT_OPS:
        part = (of[a], name, str(node.args[1:]), str(node.kwargs))
        return Mask(parts.setdefault(part, node), True)
    is_negation = name == "logical_not" or (name in ("bitwise_not", "invert") and val.dtype == torch.bool)
    is_one_minus = name == "rsub" and b == 1 and len(node.args) == 2 and not node.kwargs
    if is_negation or is_one_minus:
        return Mask(of[a].root, not of[a].value)
    return None


def _zero_places(node: fx.Node, of: Mapping[fx.Node, Mask], zero: Mapping[fx.Node, Places]) -> Places:
    """Return the places where a node is zero: a product where a factor is, a sum where both addends are."""
    if node.op != "call_function" or not of:
        return NOWHERE
    name = plain_name(node)
    operands: list[Places] = []
    for x in node.args[:2]:
        if isinstance(x, fx.Node):
            places = zero.get(x, NOWHERE)
            if x in of:
                places |= {(of[x].root, not of[x].value)}
            operands.append(places)
    if name in ("mul", "multiply"):
        return NOWHERE.union(*operands)
    if name in ("add", "sub", "subtract") and len(operands) == 2:
        return operands[0] & operands[1]
    if name in ZERO_KEEPING_OPS and isinstance(node.args[0], fx.Node):
        return operands[0]
    return NOWHERE

"""Facts about the values of constants: which index is a permutation, or holds which numbers; which factor is a mask.

A compiler sees no values, so facts are looked up with the real tensors, and each user of a fact checks
it again in every run (`check`): a buffer that has changed raises, it never gives a wrong gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from revfx.passes import _torch
from revfx.passes.sizes import fixed
from revfx.rules import op_name


PERMUTATION, ZEROS_AND_ONES = "permutation", "binary"
LIMIT = 1 << 16  # elements of a tensor with values that are looked at
INDICES = (torch.int32, torch.int64)
SAME = frozenset("alias clone detach lift_fresh_copy contiguous".split())
CASTS = frozenset("to_copy convert_element_type to float double half bfloat16 bool int long type type_as".split())
REORDERED = frozenset("flip roll".split())
LAID_OUT = frozenset(
    "view reshape expand unsqueeze squeeze permute transpose unsafe_view broadcast_to"
    " getitem select slice narrow".split()
)

Fact = str | tuple[int, ...]  # PERMUTATION, ZEROS_AND_ONES, or the whole numbers that it holds
Facts = tuple[tuple[int, Fact], ...]


def facts_of(inputs: Iterable[Any]) -> Facts:
    """Return the facts about inputs: pairs of a number and a fact."""
    tensors = ((i, t) for i, t in enumerate(inputs) if isinstance(t, Tensor))
    # which numbers they hold only of a model's own tensors: a graph is compiled, and cached, for these
    return tuple((i, fact) for i, t in tensors for fact in facts_about(t) if isinstance(fact, str) or _torch.is_held(t))


def facts_about(t: Tensor) -> tuple[Fact, ...]:
    """Return the facts about the elements of a tensor; the host waits for them."""
    if type(t) not in (Tensor, nn.Parameter) or t.layout != torch.strided or t.is_meta or t.requires_grad:
        return ()
    if not 0 < t.numel() <= LIMIT or t.dtype == torch.bool or t.is_complex():
        return ()
    with torch.no_grad(), _torch.no_dispatch():
        found: list[Fact] = []
        if t.dim() == 1 and t.dtype in INDICES:
            found.append(PERMUTATION if bool(_is_permutation(t)) else tuple(t.tolist()))
        # a mask of one value only masks nothing; and running statistics start as all zeros or ones
        if bool(_is_binary(t)) and not bool((t == t.reshape(-1)[0]).all()):
            found.append(ZEROS_AND_ONES)
        return tuple(found)


def holds(fact: Fact, t: Tensor) -> bool:
    """Return whether a fact holds of a tensor; the host waits for it."""
    if isinstance(fact, tuple):
        return t.numel() == len(fact) and tuple(t.flatten().tolist()) == fact
    return fact in facts_about(t)


def truths_of(t: Tensor) -> tuple[Fact, ...]:
    """Return the elements of a small tensor of booleans, as a fact; the host waits for them."""
    if t.dtype != torch.bool or t.is_meta or not 0 < t.numel() <= LIMIT:
        return ()
    return (tuple(t.flatten().tolist()),)


def is_mask(t: Tensor) -> bool:
    """Return whether a tensor holds zeros and ones, some of each, and nothing else."""
    return ZEROS_AND_ONES in facts_about(t)


# --- checks, recorded into the forward of a graph that relies on a fact
def _is_permutation(p: Tensor) -> Tensor:
    return (p.sort().values == torch.arange(p.shape[0], device=p.device)).all()


def _is_binary(b: Tensor) -> Tensor:
    return ((b == 0) | (b == 1)).all()


def _holding(numbers: tuple[int, ...]) -> Callable[..., Tensor]:
    return lambda t: (t.flatten() == torch.tensor(numbers, device=t.device)).all()


CHECKS: Mapping[str, tuple[Callable[..., Tensor], str]] = {
    PERMUTATION: (_is_permutation, "an index is no permutation"),
    ZEROS_AND_ONES: (_is_binary, "a mask does not hold zeros and ones only"),
}


def check(fact: Fact, name: str, where: str) -> tuple[Callable[..., Tensor], str]:
    """Return the test of a fact, and the message of a run in which it fails."""
    test, broken = CHECKS[fact] if isinstance(fact, str) else (_holding(fact), "an index holds other numbers")
    return test, (
        f"revfx: {broken} (`{name}`, at {where}), unlike when this model was compiled, so what was computed with "
        "it can't be computed back; call `torch.compiler.reset()` after changing such a tensor"
    )


# --- facts of the nodes of a graph
def annotate(graph: fx.Graph, known: Mapping[fx.Node, Sequence[Fact]], owner: Any) -> dict[fx.Node, tuple[Fact, ...]]:
    """Return the facts of nodes that follow from those `known` of inputs and from the tensors that `owner` holds.

    They are hints: each user of one checks the very node.
    """
    found: dict[fx.Node, tuple[Fact, ...]] = {n: tuple(f) for n, f in known.items()}
    for node in graph.nodes:
        if node.op == "get_attr":
            held = getattr(owner, str(node.target), None)
            found[node] = facts_about(held) if isinstance(held, Tensor) else ()
        elif node.op == "call_function" and isinstance(val := node.meta.get("val"), Tensor) and val.dtype in INDICES:
            if bare(node) in SAME | CASTS | REORDERED and node.args and isinstance(node.args[0], fx.Node):
                found[node] = tuple(f for f in found.get(node.args[0], ()) if f == PERMUTATION)
    return {n: f for n, f in found.items() if f}


def constants(graph: fx.Graph, facts: MutableMapping[fx.Node, tuple[Fact, ...]]) -> dict[fx.Node, Tensor]:
    """Return the values of nodes that follow from numbers alone, such as the index that a `roll` is spelled with, or
    from what `facts` say that others hold; to which it adds what those values are that do.

    Of whole numbers and booleans only, and of no more than `LIMIT` of them.
    """
    found: dict[fx.Node, Tensor] = {}
    seen = set[fx.Node]()
    for node in graph.nodes:
        numbers = next((f for f in facts.get(node, ()) if isinstance(f, tuple)), None)
        with torch.no_grad(), _torch.no_dispatch():
            if numbers is not None and fixed((val := node.meta["val"]).shape):
                device = "cpu" if val.is_meta else val.device  # a graph without data is about a real device
                found[node] = torch.tensor(numbers, dtype=val.dtype, device=device).reshape(val.shape)
                seen.add(node)
            elif _foldable(node) and all(n in found for n in node.all_input_nodes):
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: found[n])
                found[node] = held = node.target(*args, **kwargs)
                if not seen.isdisjoint(node.all_input_nodes):
                    facts[node] = (*facts.get(node, ()), tuple(held.flatten().tolist()))
                    seen.add(node)
    return found


def ancestors(nodes: Iterable[fx.Node], inputs: Callable[[fx.Node], Iterable[fx.Node]] | None = None) -> set[fx.Node]:
    """Return `nodes` with all their ancestors; `inputs` returns the operands of a node."""
    found: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(inputs(node) if inputs else node.all_input_nodes)
    return found


def assumed(nodes: Iterable[fx.Node], index: Mapping[fx.Node, int]) -> tuple[tuple[int, Fact], ...]:
    """Return the facts for inverses that read `nodes`, numbered by `index`, as indices."""
    return tuple((index[n], f) for n in nodes if n in index for f in n.meta.get("facts", ()) if f != ZEROS_AND_ONES)


def _foldable(node: fx.Node) -> bool:
    val = node.meta.get("val")
    if node.op != "call_function" or not isinstance(val, Tensor) or not _torch.is_overload(node.target):
        return False
    whole = not val.is_floating_point() and not val.is_complex() and val.layout == torch.strided
    return whole and fixed(val.shape) and val.numel() <= LIMIT and _torch.is_pure(node.target)


# --- masks: which nodes hold zeros and ones, and where others are zero
@dataclass(frozen=True, slots=True)
class Mask:
    """A value that is 1 where `root` is set and 0 elsewhere; the other way round where not `value`."""

    root: fx.Node
    value: bool


Places = frozenset[tuple[fx.Node, bool]]
NOWHERE: Places = frozenset()


@dataclass(frozen=True, slots=True)
class Masks:
    """Which nodes of a graph are masks, and where others are exactly zero, or one: (root, value) for each place.

    Both hold up to broadcasting: a root says the same about every row that it is repeated for.
    """

    of: Mapping[fx.Node, Mask]
    zero: Mapping[fx.Node, Places]
    one: Mapping[fx.Node, Places]


def masks(graph: fx.Graph) -> Masks:
    """Return the masks of a graph: booleans, values that are known to be binary, and their negations."""
    of: dict[fx.Node, Mask] = {}
    zero: dict[fx.Node, Places] = {}
    one: dict[fx.Node, Places] = {}
    parts: dict[tuple[object, ...], fx.Node] = {}
    for node in graph.nodes:
        if not isinstance(node.meta.get("val"), Tensor):
            continue
        if (mask := _mask(node, of, parts)) is not None:
            of[node] = mask
        if of and (where := _zero_places(node, of, zero)):
            zero[node] = where
        if bare(node) == "exp" and node.args[0] in zero:
            one[node] = zero[node.args[0]]
    return Masks(of, zero, one)


def bare(node: fx.Node) -> str:
    """Return an operation's name in the plain spelling: `mul` of `__imul__`."""
    name = op_name(node.target).strip("_")
    return name[1:] if name in ("iadd", "radd", "isub", "imul", "rmul") else name


def _mask(node: fx.Node, of: Mapping[fx.Node, Mask], parts: MutableMapping[tuple[object, ...], fx.Node]) -> Mask | None:
    val, name = node.meta["val"], bare(node)
    a, b = (*node.args, None, None)[:2]
    if node.op == "call_function":
        if isinstance(a, fx.Node) and a in of and a.meta["val"].device == val.device:
            if name in SAME | CASTS:
                return of[a]
            if name in LAID_OUT:  # the same part of one mask, such as `masks[0]`, is one root
                return Mask(parts.setdefault((of[a], name, str(node.args[1:]), str(node.kwargs)), node), True)
            taken_off_one = name == "rsub" and b == 1 and len(node.args) == 2 and not node.kwargs
            inverted = name in ("bitwise_not", "invert") and val.dtype == torch.bool
            if name == "logical_not" or inverted or taken_off_one:
                return Mask(of[a].root, not of[a].value)
        if name == "sub" and a == 1 and isinstance(b, fx.Node) and b in of and not node.kwargs:
            return Mask(of[b].root, not of[b].value)
    held = node.meta.get("constant")
    if val.dtype == torch.bool or ZEROS_AND_ONES in node.meta.get("facts", ()) or (held is not None and is_mask(held)):
        return Mask(node, True)
    return None


def _zero_places(node: fx.Node, of: Mapping[fx.Node, Mask], zero: Mapping[fx.Node, Places]) -> Places:
    """Return where a node is zero: a product where a factor is, a sum where both are."""
    if node.op != "call_function":
        return NOWHERE
    name = bare(node)
    operands = [x for x in node.args[:2] if isinstance(x, fx.Node)]
    theirs = [zero.get(x, NOWHERE) | ({(of[x].root, not of[x].value)} if x in of else NOWHERE) for x in operands]
    if name in ("mul", "multiply"):
        return NOWHERE.union(*theirs)
    if name in ("add", "sub", "subtract") and len(theirs) == 2:
        return theirs[0] & theirs[1]
    same = name in ("div", "divide", "true_divide", "neg", "negative", *SAME, *CASTS)
    if same and isinstance(node.args[0], fx.Node):
        return theirs[0]
    return NOWHERE

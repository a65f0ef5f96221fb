"""The table of inverse rules: from an operation to every direction in which it can be solved.

A rule is a generator over an fx node. For each operand that the result determines it yields an `Inverse` (the operand
is a function of the result and other operands) or a `Tile` (the result is a part of the operand, which is known once
its parts tile it), and for an operand that it can't solve a `NoInverse` with the reason:

    @register_inverse(aten.add.Tensor)
    def _(node):
        a, b, alpha = arguments(node, "input", "other", alpha=1)
        yield Inverse(a, lambda y, b: y - alpha * b, (b,))

A rule states the algebra. What makes it sound (the solved operand has the result's shape and keeps its dtype, `a is
not b`, a factor is bounded away from zero) is checked once, for all rules, by `revfx.passes.arcs`.

Rules are for overloads of aten operators, which a forward and a compiled graph are made of; those of the user may be
for classes of modules, too. The rules themselves live beside this file, in `revfx.rules.arithmetic` and others.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from revfx import _torch
from revfx.errors import Cause, Reason, RevfxError


Scalar = (int, float)
TENSOR = ("input", "self", "tensor")  # names of the first operand in functions and overloads
aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Inverse:
    """`solves = by(result, *given)`.

    `exact` inverses move or relabel elements and give the very bits; the others round. `factor` (a number or an
    operand) is the factor of the solved operand, or its divisor if `reciprocal`: it must not reach zero, and
    rounding errors grow by its reciprocal. `rest`: the term that the operation adds to the product, as a function of
    `given` (`nothing` where there is none); sums with it can be solved together. `coded` ones saturate, bend or lose
    bits, and so are taken only where a code corrects them. `matrix`: the operand that is inverted as a whole; it must
    follow from parameters and constants. `result`: the part of the results that the inverse starts from, where there
    are several. `declared`: the user's or a library's declaration that gives this inverse, which may be wrong. `runs`:
    solving runs the operation's own module again, which then finds its state, and random numbers, as the call did.
    """

    solves: Any
    by: Callable[..., Tensor]
    given: tuple[Any, ...] = ()
    exact: bool = False
    factor: Any = None
    reciprocal: bool = False
    rest: Callable[..., Any] | None = None
    coded: bool = False
    matrix: Any = None
    result: Any = None
    declared: str = ""
    runs: bool = False


@dataclass(frozen=True, slots=True)
class Tile:
    """Output `part` of the operation is `whole` restricted to `index` along `dim`; `squeezed`: that dim is gone."""

    whole: Any
    dim: int
    index: Sequence[int]
    part: int = 0
    squeezed: bool = False


@dataclass(frozen=True, slots=True)
class Patch:
    """The result is `whole` with `part` written at `index` along `dim`; a `Tile` of that index completes it."""

    whole: Any
    dim: int
    index: Sequence[int]
    squeezed: bool = False
    part: Any = None


@dataclass(frozen=True, slots=True)
class Masked:
    """The result is `whole` where `mask` is `value` (True or False), and `other` elsewhere.

    Two results that hold the two halves of `whole` give it back; and of two that hold the same half, each gives the
    other, given the rest of the other.
    """

    whole: Any
    mask: Any
    value: bool
    other: Any


@dataclass(frozen=True, slots=True)
class NoInverse:
    """The result does not determine `solves`; `reason` is shown to the user, with the remedy of its `kind`."""

    solves: Any
    reason: str
    kind: Reason = Reason.NON_INVERTIBLE


Direction = Inverse | Tile | Patch | Masked | NoInverse
Rule = Callable[[fx.Node], Iterator[Direction]]

_rules: dict[object, Rule] = {}


def register_inverse(*ops: object, by: str | Callable[..., Any] | None = None) -> Callable[[Rule], Rule]:
    """Register a rule, by a decorator, for `ops`: aten overloads, functions of torch that are one, or module classes.

    With `by` there is nothing to decorate: `ops` are classes of modules that are called whole from then on, and
    inverted by a method of that name, `y, ... = m(x, ...)`; `x, ... = m.inverse(y, ...)`, or by `by(m, y, ...)`. Each
    forward and each backward then runs it once more, with all that is inside.

    Raises:
        RevfxError: one of `ops` has a rule already, is none of these, or is no class of modules with such a method.
    """

    def decorate(rule: Rule) -> Rule:
        keys = [key for op in ops for key in _keys(op)]
        for op in keys:
            if op in _rules:
                raise RevfxError(f"`register_inverse`: `{op_name(op)}` has a rule already ({_rules[op].__module__}).")
        _rules.update(dict.fromkeys(keys, rule))
        return rule

    if by is not None:
        for op in ops:
            if not (isinstance(op, type) and issubclass(op, torch.nn.Module) and (callable(by) or hasattr(op, by))):
                raise RevfxError(f"`register_inverse`: `{op_name(op)}` is no class of modules that have a `{by}`.")
        decorate(_by_method(by))
    return decorate


def _keys(op: object) -> list[object]:
    """Return the keys of the table for an operation."""
    if isinstance(op, type) or _torch.packet_name(op):
        return [op]
    packet = getattr(aten, getattr(op, "__name__", ""), None)
    if callable(op) and packet is not None and (getattr(op, "__module__", None) or "torch").startswith("torch"):
        return [getattr(packet, overload) for overload in packet.overloads()]
    raise RevfxError(
        f"`register_inverse`: `{op_name(op)}` is no operator of torch and no class of modules. Register the module that"
        " calls it, or the operators that it is made of."
    )


# --- inverses that are calls of the user's, or of a library's, with the arguments of the call
def by_call(back: Callable[..., Any], node: fx.Node, x: fx.Node, y: fx.Node, name: str, runs: bool = False) -> Inverse:
    """Return the inverse of `y, ... = node(x, ...)`; `x, ... = back(y, ...)`, the first tensors of both."""
    others = tuple(n for n in node.all_input_nodes if n is not x)

    def by(result: Tensor, *tensors: Tensor) -> Tensor:
        values: dict[fx.Node, Any] = {**dict(zip(others, tensors, strict=True)), x: result}
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        return pytree.tree_leaves(back(*args, **kwargs))[0]

    return Inverse(x, by, others, result=y, declared=name, runs=runs)


def _by_method(by: str | Callable[..., Any]) -> Rule:
    """Return the rule of modules called whole: a method inverts them, or a function that is given them too."""

    def rule(node: fx.Node) -> Iterator[Direction]:
        ref, first = node.meta["module"], next(iter(pytree.tree_leaves(node.meta["val"])), None)
        y = next((n for n in _result_nodes(node) if n.meta.get("val") is first), None)

        def back(*args: Any, **kwargs: Any) -> Any:
            return getattr(ref(), by)(*args, **kwargs) if isinstance(by, str) else by(ref(), *args, **kwargs)

        if y is not None and node.all_input_nodes:
            yield by_call(back, node, node.all_input_nodes[0], y, type(ref()).__name__, runs=True)

    return rule


def _result_nodes(node: fx.Node) -> Iterator[fx.Node]:
    """Yield a node and the nodes that take its result apart."""
    yield node
    for part in (n for n in node.users if n.target is operator.getitem):
        yield from _result_nodes(part)


def registered() -> dict[object, Rule]:
    """Return a copy of the whole table."""
    return dict(_rules)


def unregister_inverse(*ops: object) -> None:
    """Take the rules of `ops` out of the table, as a test or a notebook cell that registers again needs."""
    for op in ops:
        for key in _keys(op):
            _rules.pop(key, None)


def has_foreign() -> bool:
    """Return whether the table is not the one that comes with revfx: rules were added, taken away or replaced."""
    return _rules != _ours


def rule_for_class(cls: type[torch.nn.Module]) -> Rule | None:
    """Return the rule of a class of modules for which one was registered; None for those of torch."""
    rule = _rules.get(cls)
    return None if rule is None or rule is _ours.get(cls) else rule


def has_rule(op: object) -> bool:
    """Return whether an operation has a rule."""
    return any(key in _rules for key in _keys(op))


def rule_for(node: fx.Node) -> Rule | None:
    """Return the rule for a node, or None."""
    return _rules.get(node.target)


def declared_by_user(node: fx.Node) -> str:
    """Return the name of a node's operation where its rule is one that the user registered, else nothing."""
    return op_name(node.target) if _rules.get(node.target) is not _ours.get(node.target) else ""


def op_name(op: object) -> str:
    """Return the bare name of an operation, the same for function, method, operator and overload: `add`, `relu`."""
    if isinstance(op, str):
        return op
    return _torch.packet_name(op) or getattr(op, "__name__", type(op).__name__)


def arguments(node: fx.Node, *names: str, **defaults: Any) -> list[Any]:
    """Return a node's arguments in the order `names` then `defaults`, whether given by position or by name."""
    values: list[Any] = []
    for i, name in enumerate((*names, *defaults)):
        if i < len(node.args):
            values.append(node.args[i])
        else:
            spelled = TENSOR if name == "input" else (name,)
            values.append(next((node.kwargs[n] for n in spelled if n in node.kwargs), defaults.get(name)))
    return values


def operands(node: fx.Node) -> list[Any]:
    """Return the tensor that an operation is applied to, and the other arguments, by position or by name."""
    return [*arguments(node, "input"), *node.args[1:], *(v for k, v in node.kwargs.items() if k not in TENSOR)]


def nothing(*given: Any) -> float:
    """Return the `rest` of an operation that only multiplies."""
    return 0.0


def fake_result(node: Any) -> Tensor:
    """Return the fake tensor that stands for a node's result: shape, dtype, strides, device, no data."""
    return node.meta["val"]


# --- operations that have no inverse, with the words a refusal uses
_WHY = {
    "maps all negative numbers to 0": "relu",
    "is not monotone": "gelu silu mish",
    "has a kink that rounding can cross": "leaky_relu",
    "loses the sign": "square abs",
    "is not injective (an even power loses the sign)": "pow",
    "is periodic": "sin cos",
    "saturates: it is not invertible in floating point": "tanh sigmoid",
    "keeps only the maxima": "max_pool2d max_pool2d_with_indices",
    "drops elements": "dropout native_dropout",
    "removes mean and scale, which the output does not hold": (
        "batch_norm layer_norm native_layer_norm _native_batch_norm_legit_functional"
    ),
    "maps everything beyond its limits to them": "clamp",
    "multiplies by a matrix that need not be invertible": "linear matmul mm addmm bmm",
    "is a linear map that need not be invertible": (
        "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution"
    ),
}
NOT_INJECTIVE = {name: reason for reason, names in _WHY.items() for name in names.split()}


def why_none(name: str) -> Cause:
    """Return the reason why an operation without a rule can't be inverted."""
    words = NOT_INJECTIVE.get(name.rstrip("_"))
    if words is None:
        return Cause(Reason.NO_RULE, f"`{name}` has no inverse rule")
    return Cause(Reason.NON_INVERTIBLE, f"`{name}` {words}")


for _file in ("arithmetic", "activations", "layout", "linear"):  # they fill the table
    importlib.import_module(f"revfx.rules.{_file}")
_ours = dict(_rules)

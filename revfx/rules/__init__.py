"""The table of inverse rules: for each operation, the operands for which it can be solved.

A rule is a generator over an fx node. It yields an `Inverse` for an operand that is a function of the result and other
operands. It yields a `Tile` if the result is a part of the operand, which is known when parts tile it. It yields a
`NoInverse`, with the reason, for an operand that it can't solve:

    @register_inverse(aten.add.Tensor)
    def _(node):
        a, b, alpha = arguments(node, "input", "other", alpha=1)
        yield Inverse(a, lambda y, b: y - alpha * b, (b,))

A rule states the algebra alone. `revfx.passes.arcs` checks the conditions of all rules: the solved operand has the
result's shape and keeps its dtype, `a is not b`, and a factor is bounded away from zero.

Rules are for overloads of aten operators, as in forwards and compiled graphs; rules of the user may be for classes of
modules, too. The rules themselves are in `revfx.rules.arithmetic` and the other files of this folder.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from revfx import _torch
from revfx.errors import Cause, Reason, RevfxError


Scalar: tuple[type[int], type[float]] = (int, float)
_FIRST_OPERAND = ("input", "self", "tensor")  # its names in functions and overloads
aten: Any = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Inverse:
    """`solves = by(result, *given)`.

    Attributes:
        solves: the operand that is solved for.
        by: the function that solves for it.
        given: the operands that it needs.
        exact: it only moves or relabels elements, and so returns the same bits; other inverses round.
        factor: a number or an operand, the factor of the solved operand. It must not reach zero, and rounding errors
            grow by its reciprocal.
        reciprocal: `factor` is the divisor of the solved operand.
        rest: the term that the operation adds to the product, as a function of `given` (`zero` if there is none). Sums
            with it can be solved together.
        coded: the operation saturates, bends or loses bits, so the inverse is used only with a code.
        matrix: the operand that is inverted as a whole; it must follow from parameters and constants.
        result: the part of several results that the inverse starts from.
        declared: the name of a user's or library's declaration that gives this inverse, and may be wrong.
        runs: solving runs the operation's own module again, with the state and random numbers of the call.
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
    """Output `part` of the operation is `whole` restricted to `index` along `dim`, which is removed if `squeezed`."""

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

    Two results that hold the two halves of `whole` determine it. Two results that hold the same half determine each
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

    With `by` there is nothing to decorate. `ops` are then classes of modules. Their calls are inverted as a whole, by
    their method of this name (`y, ... = m(x, ...)`; `x, ... = m.inverse(y, ...)`) or by `by(m, y, ...)`. Each forward
    and each backward runs the inverse once more.

    Raises:
        RevfxError: one of `ops` has a rule already, is none of these, or is no class of modules with the method.
    """

    def decorate(rule: Rule) -> Rule:
        keys = [*chain.from_iterable(map(_keys, ops))]
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


# --- inverses that are methods of modules, or functions, of the user
def _by_method(by: str | Callable[..., Any]) -> Rule:
    """Return the rule of modules that are inverted as a whole: `y, ... = m(x, ...)`; `x, ... = by(m, y, ...)`.

    x and y are the first tensors of the arguments and of the results. The inverse takes the other arguments as well.
    """

    def rule(node: fx.Node) -> Iterator[Direction]:
        ref, first = node.meta["module"], next(iter(pytree.tree_leaves(node.meta["val"])), None)
        y = next((n for n in _result_nodes(node) if n.meta.get("val") is first), None)
        if y is None or not node.all_input_nodes:
            return
        x, *others = node.all_input_nodes

        def solve(result: Tensor, *tensors: Tensor) -> Tensor:
            values: dict[fx.Node, Any] = {**dict(zip(others, tensors, strict=True)), x: result}
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            module = ref()
            if isinstance(by, str):
                inputs = getattr(module, by)(*args, **kwargs)
            else:
                inputs = by(module, *args, **kwargs)
            return pytree.tree_leaves(inputs)[0]

        yield Inverse(x, solve, tuple(others), result=y, declared=type(ref()).__name__, runs=True)

    return rule


def _result_nodes(node: fx.Node) -> Iterator[fx.Node]:
    """Yield a node and the nodes that select parts of its result."""
    yield node
    for user in node.users:
        if user.target is operator.getitem:
            yield from _result_nodes(user)


def registered() -> dict[object, Rule]:
    """Return a copy of the whole table."""
    return dict(_rules)


def unregister_inverse(*ops: object) -> None:
    """Remove the rules of `ops`, so that a test or a notebook cell can register others."""
    for op in ops:
        for key in _keys(op):
            _rules.pop(key, None)


def has_foreign() -> bool:
    """Return whether rules were added to the table of revfx, removed or replaced."""
    return _rules != _ours


def rule_for_class(cls: type[torch.nn.Module]) -> Rule | None:
    """Return the rule that a user registered for a class of modules, or None."""
    rule = _rules.get(cls)
    return None if rule is _ours.get(cls) else rule


def has_rule(op: object) -> bool:
    """Return whether an operation has a rule."""
    return any(key in _rules for key in _keys(op))


def rule_for(node: fx.Node) -> Rule | None:
    """Return the rule for a node, or None."""
    return _rules.get(node.target)


def declared_by_user(node: fx.Node) -> str:
    """Return the name of a node's operation if the user registered its rule, else the empty string."""
    if _rules.get(node.target) is _ours.get(node.target):
        return ""
    return op_name(node.target)


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
            spellings = _FIRST_OPERAND if name == "input" else (name,)
            values.append(next((node.kwargs[n] for n in spellings if n in node.kwargs), defaults.get(name)))
    return values


def operands(node: fx.Node) -> list[Any]:
    """Return the first operand of an operation, and all other arguments, by position or by name."""
    named = [value for name, value in node.kwargs.items() if name not in _FIRST_OPERAND]
    return [*arguments(node, "input"), *node.args[1:], *named]


def zero(*given: Any) -> float:
    """Return 0, the `rest` of an operation that only multiplies."""
    return 0.0


def fake_result(node: Any) -> Tensor:
    """Return the fake tensor of a node's result: shape, dtype, strides, device, no data."""
    return node.meta["val"]


# --- operations that have no inverse, by the reason in a refusal
_REASONS = {
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
NOT_INJECTIVE: dict[str, str] = {}
for _reason, _names in _REASONS.items():
    NOT_INJECTIVE.update(dict.fromkeys(_names.split(), _reason))


def why_none(name: str) -> Cause:
    """Return the reason that an operation without a rule can't be inverted."""
    words = NOT_INJECTIVE.get(name.rstrip("_"))
    if words is None:
        return Cause(Reason.NO_RULE, f"`{name}` has no inverse rule")
    return Cause(Reason.NON_INVERTIBLE, f"`{name}` {words}")


for _file in ("arithmetic", "activations", "layout", "linear"):  # they fill the table
    importlib.import_module(f"revfx.rules.{_file}")
_ours = dict(_rules)

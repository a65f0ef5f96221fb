"""The table of inverse rules: from an operation to every direction in which it can be solved.

A rule is a generator over an fx node. For each operand that the result determines it yields an `Inverse` (the operand
is a function of the result and other operands) or a `Tile` (the result is a part of the operand, which is known once
its parts tile it), and for an operand that it can't solve a `NoInverse` with the reason:

    @register_inverse(torch.add, "add", operator.add)
    def _(node):
        a, b, alpha = arguments(node, "input", "other", alpha=1)
        yield Inverse(a, lambda y, b: y - alpha * b, (b,))

A rule states the algebra. What makes it sound (the solved operand has the result's shape and keeps its dtype, `a is
not b`, a factor is bounded away from zero) is checked once, for all rules, by `revfx.passes.arcs`.

Spellings: functions are registered as themselves, tensor methods by name, modules by class; overloads of aten beside
them, for compiled graphs. Layout rules live in `revfx.rules_layout` and `revfx.rules_aten`.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from revfx import _torch
from revfx.errors import RevfxError


Scalar = (int, float)
aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Inverse:
    """`solves = by(result, *given)`.

    `exact` inverses move or relabel elements and give the very bits; the others round. `factor` (a number or an
    operand) is what the solved operand was multiplied by, or divided by where `reciprocal`: it must not reach zero, and
    rounding errors grow by its reciprocal. `rest` says what the operation adds to the product, as a function of `given`
    (`nothing` where it adds nothing): with it the operation has an exact form, see `revfx.passes.grid`. `grid` marks
    the inverse of such a form.
    """

    solves: Any
    by: Callable[..., Tensor]
    given: tuple[Any, ...] = ()
    exact: bool = False
    factor: Any = None
    reciprocal: bool = False
    rest: Callable[..., Any] | None = None
    grid: bool = False


@dataclass(frozen=True, slots=True)
class Tile:
    """Output `part` of the operation is `whole` restricted to `index` along `dim`; `squeezed`: that dim is gone."""

    whole: Any
    dim: int
    index: range
    part: int = 0
    squeezed: bool = False


@dataclass(frozen=True, slots=True)
class Patch:
    """The result is `whole` but for `index` along `dim`, where something else was written.

    Another operation's `Tile` of `whole` with the same index completes it.
    """

    whole: Any
    dim: int
    index: range
    squeezed: bool = False


@dataclass(frozen=True, slots=True)
class Masked:
    """The result is `whole` where `mask` is `value` (True or False), and `other` elsewhere.

    Two results that hold the two halves of `whole` give it back; and of two that hold the same half, each gives the
    other, given what fills the other's rest.
    """

    whole: Any
    mask: Any
    value: bool
    other: Any


@dataclass(frozen=True, slots=True)
class NoInverse:
    """The result does not determine `solves`; `reason` is shown to the user."""

    solves: Any
    reason: str


Direction = Inverse | Tile | Patch | Masked | NoInverse
Rule = Callable[[fx.Node], Iterator[Direction]]

_table: dict[object, Rule] = {}


def register_inverse(*ops: object) -> Callable[[Rule], Rule]:
    """Register a rule, by a decorator, for `ops`: functions, tensor method names, module classes or aten overloads.

    Raises:
        RevfxError: one of `ops` has a rule already.
    """

    def decorate(rule: Rule) -> Rule:
        for op in ops:
            if op in _table:
                raise RevfxError(f"`register_inverse`: `{op_name(op)}` has a rule already ({_table[op].__module__}).")
        _table.update(dict.fromkeys(ops, rule))
        return rule

    return decorate


def registered() -> dict[object, Rule]:
    """Return a copy of the whole table."""
    return dict(_table)


def unregister_inverse(*ops: object) -> None:
    """Take the rules of `ops` out of the table, as a test or a notebook cell that registers again needs."""
    for op in ops:
        _table.pop(op, None)


def has_foreign() -> bool:
    """Return whether the table is not the one that comes with revfx: rules were added, taken away or replaced."""
    return _table != _ours


def has_rule(op: object) -> bool:
    """Return whether `op` (in one of the spellings that `register_inverse` takes) has a rule."""
    return op in _table


def rule_for(node: fx.Node, module: torch.nn.Module | None = None) -> Rule | None:
    """Return the rule for a node, or None; `module` is what a call_module node calls."""
    key = type(module) if node.op == "call_module" else node.target
    return _table.get(key)


def op_name(op: object) -> str:
    """Return the bare name of an operation, the same for function, method, operator and overload: `add`, `relu`."""
    if isinstance(op, str):
        return op
    if _torch.is_overload(op):
        return _torch.packet_name(op)
    return getattr(op, "__name__", type(op).__name__)


def arguments(node: fx.Node, *names: str, **defaults: Any) -> list[Any]:
    """Return a node's arguments in the order `names` then `defaults`, whether given by position or by name."""
    values: list[Any] = []
    for i, name in enumerate((*names, *defaults)):
        if i < len(node.args):
            values.append(node.args[i])
        else:
            fallback = node.kwargs.get("self", defaults.get(name)) if name == "input" else defaults.get(name)
            values.append(node.kwargs.get(name, fallback))
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, Scalar) and not isinstance(value, bool)


def scaled(value: Any, alpha: float, dtype: torch.dtype | None = None) -> Any:
    """Return `alpha * value` as something to subtract (no truth values), without a copy where alpha is 1.

    It is multiplied in `dtype`, that of the result: in a narrower one the product would be rounded.
    """
    if dtype is not None and alpha != 1 and isinstance(value, Tensor):
        value = value.to(dtype)
    truth = value.dtype == torch.bool if isinstance(value, Tensor) else isinstance(value, bool)
    return value if alpha == 1 and not truth else alpha * value


def nothing(*given: Any) -> float:
    """Return the `rest` of an operation that only multiplies."""
    return 0.0


# --- arithmetic: y = a + alpha*b and its relatives
def _scaled_by_a_tensor(*operands: Any) -> Iterator[Direction]:
    """Yield refusals where a tensor holds the number that scales an operand.

    `alpha=` and `value=` take one of no dimensions, and so does the old order `torch.add(a, alpha, b)`.
    """
    for operand in operands:
        yield NoInverse(operand, "a tensor stands where a number scales an operand")


@register_inverse(
    torch.add, "add", "add_", "__add__", "__radd__", "__iadd__", operator.add, operator.iadd,
    aten.add.Tensor, aten.add.Scalar,
)  # fmt: skip
def add(node: fx.Node) -> Iterator[Direction]:
    """`y = a + alpha*b`; `a = y - alpha*b`, `b = (y - a)/alpha`."""
    a, b, alpha = arguments(node, "input", "other", alpha=1)
    if isinstance(alpha, fx.Node):
        yield from _scaled_by_a_tensor(a, b)
        return
    yield Inverse(a, lambda y, b: y - scaled(b, alpha, y.dtype), (b,), rest=lambda b: scaled(b, alpha))
    yield Inverse(b, lambda y, a: y - a if alpha == 1 else (y - a) / alpha, (a,), factor=alpha, rest=lambda a: a)


@register_inverse(
    torch.sub, torch.subtract, "sub", "sub_", "subtract", "__sub__", "__isub__", operator.sub, operator.isub,
    aten.sub.Tensor, aten.sub.Scalar,
)  # fmt: skip
def sub(node: fx.Node) -> Iterator[Direction]:
    """`y = a - alpha*b`; `a = y + alpha*b`, `b = (a - y)/alpha`."""
    a, b, alpha = arguments(node, "input", "other", alpha=1)
    if isinstance(alpha, fx.Node):
        yield from _scaled_by_a_tensor(a, b)
        return
    yield Inverse(a, lambda y, b: y + scaled(b, alpha, y.dtype), (b,), rest=lambda b: scaled(b, -alpha))
    yield Inverse(b, lambda y, a: a - y if alpha == 1 else (a - y) / alpha, (a,), factor=-alpha, rest=lambda a: a)


@register_inverse(torch.rsub, "__rsub__", aten.rsub.Tensor, aten.rsub.Scalar)
def rsub(node: fx.Node) -> Iterator[Direction]:
    """`y = b - alpha*a`; `a = (b - y)/alpha`, `b = y + alpha*a`."""
    a, b, alpha = arguments(node, "input", "other", alpha=1)
    if isinstance(alpha, fx.Node):
        yield from _scaled_by_a_tensor(a, b)
        return
    yield Inverse(a, lambda y, b: b - y if alpha == 1 else (b - y) / alpha, (b,), factor=-alpha, rest=lambda b: b)
    yield Inverse(b, lambda y, a: y + scaled(a, alpha, y.dtype), (a,), rest=lambda a: scaled(a, -alpha))


@register_inverse(torch.neg, torch.negative, "neg", "neg_", "negative", "__neg__", operator.neg, aten.neg.default)
def neg(node: fx.Node) -> Iterator[Direction]:
    """`y = -a`; `a = -y`."""
    (a,) = arguments(node, "input")
    yield Inverse(a, lambda y: -y, exact=True, factor=-1, rest=nothing)


@register_inverse(
    torch.mul, torch.multiply, "mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__", operator.mul,
    operator.imul, aten.mul.Tensor, aten.mul.Scalar,
)  # fmt: skip
def mul(node: fx.Node) -> Iterator[Direction]:
    """`y = a*b`; `a = y/b`, `b = y/a`, each where the other factor is bounded away from zero."""
    a, b = arguments(node, "input", "other")
    yield Inverse(a, lambda y, b: y / b, (b,), factor=b, rest=nothing)
    yield Inverse(b, lambda y, a: y / a, (a,), factor=a, rest=nothing)


@register_inverse(
    torch.div, torch.divide, torch.true_divide, "div", "div_", "divide", "true_divide", "__truediv__",
    operator.truediv, aten.div.Tensor, aten.div.Scalar, aten.div.Tensor_mode, aten.div.Scalar_mode,
)  # fmt: skip
def div(node: fx.Node) -> Iterator[Direction]:
    """`y = a/b`; `a = y*b`."""
    a, b, rounding = arguments(node, "input", "other", rounding_mode=None)
    if rounding is not None:
        yield NoInverse(a, f"division with rounding_mode={rounding!r} loses the remainder")
        return
    yield Inverse(a, lambda y, b: y * b, (b,), factor=b, reciprocal=True, rest=nothing)


@register_inverse(torch.addcmul, "addcmul", "addcmul_", aten.addcmul.default)
def addcmul(node: fx.Node) -> Iterator[Direction]:
    """`y = a + value*b*c`; `a = y - value*b*c`."""
    a, b, c, value = arguments(node, "input", "tensor1", "tensor2", value=1)
    if isinstance(value, fx.Node):
        yield from _scaled_by_a_tensor(a)
        return
    yield Inverse(
        a, lambda y, b, c: torch.addcmul(y, b, c, value=-value), (b, c), rest=lambda b, c: scaled(b * c, value)
    )


@register_inverse(torch.addcdiv, "addcdiv", "addcdiv_", aten.addcdiv.default)
def addcdiv(node: fx.Node) -> Iterator[Direction]:
    """`y = a + value*b/c`; `a = y - value*b/c`."""
    a, b, c, value = arguments(node, "input", "tensor1", "tensor2", value=1)
    if isinstance(value, fx.Node):
        yield from _scaled_by_a_tensor(a)
        return
    yield Inverse(
        a, lambda y, b, c: torch.addcdiv(y, b, c, value=-value), (b, c), rest=lambda b, c: scaled(b / c, value)
    )


@register_inverse(torch.lerp, "lerp", "lerp_", aten.lerp.Scalar, aten.lerp.Tensor)
def lerp(node: fx.Node) -> Iterator[Direction]:
    """`y = (1-w)*a + w*b` for a number w; `a = (y - w*b)/(1-w)`, `b = (y - (1-w)*a)/w`."""
    a, b, w = arguments(node, "input", "end", "weight")
    if not _is_number(w):
        yield NoInverse(a, "lerp with a tensor weight is not bounded away from zero")
        yield NoInverse(b, "lerp with a tensor weight is not bounded away from zero")
        return
    yield Inverse(a, lambda y, b: (y - w * b) / (1 - w), (b,), factor=1 - w, rest=lambda b: w * b)
    yield Inverse(b, lambda y, a: (y - (1 - w) * a) / w, (a,), factor=w, rest=lambda a: (1 - w) * a)


@register_inverse(torch.where, "where", aten.where.self)
def where(node: fx.Node) -> Iterator[Direction]:
    """`y = where(m, a, b)`: a where m holds, b elsewhere; what m does not select of either is not in y."""
    if len(node.args) != 3:
        return
    mask, a, b = node.args if node.op == "call_function" else (node.args[1], node.args[0], node.args[2])
    yield NoInverse(a, "`where` drops the elements that its mask does not select")
    yield NoInverse(b, "`where` drops the elements that its mask selects")
    yield Masked(a, mask, True, b)
    yield Masked(b, mask, False, a)


# --- casts
WIDER = {
    torch.bfloat16: (torch.bfloat16, torch.float32, torch.float64),
    torch.float16: (torch.float16, torch.float32, torch.float64),
    torch.float32: (torch.float32, torch.float64),
    torch.float64: (torch.float64,),
}


@register_inverse(
    "to", "float", "double", "half", "bfloat16", "type", "type_as", "cuda", "cpu",
    aten._to_copy.default, torch.ops.prims.convert_element_type.default,
)  # fmt: skip
def cast(node: fx.Node) -> Iterator[Direction]:
    """`y = a.to(wider)`; `a = y.to(a.dtype)`, exactly; a narrowing cast loses bits."""
    (a,) = arguments(node, "input")
    before, after = meta(a), meta(node)
    if after.dtype in WIDER.get(before.dtype, ()):
        yield Inverse(a, lambda y: y.to(before.dtype).to(before.device), exact=True)
    else:
        yield NoInverse(a, f"the cast from {before.dtype} to {after.dtype} loses bits")


def meta(node: Any) -> Tensor:
    """Return the fake tensor that stands for a node's result: shape, dtype, strides, device, no data."""
    return node.meta["val"]


# --- operations that have no inverse, with the words a refusal uses
NOT_INJECTIVE = {
    "relu": "maps all negative numbers to 0",
    "gelu": "is not monotone",
    "silu": "is not monotone",
    "mish": "is not monotone",
    "leaky_relu": "has a kink that rounding can cross",
    "square": "loses the sign",
    "abs": "loses the sign",
    "sin": "is periodic",
    "cos": "is periodic",
    "tanh": "saturates: it is not invertible in floating point",
    "sigmoid": "saturates: it is not invertible in floating point",
    "max_pool2d": "keeps only the maxima",
    "max_pool2d_with_indices": "keeps only the maxima",
    "dropout": "drops elements",
    "batch_norm": "removes mean and scale, which the output does not hold",
    "layer_norm": "removes mean and scale, which the output does not hold",
    "clamp": "maps everything beyond its limits to them",
    "linear": "multiplies by a matrix that need not be invertible",
    "matmul": "multiplies by a matrix that need not be invertible",
    "conv2d": "is a linear map that need not be invertible",
    "conv1d": "is a linear map that need not be invertible",
    "convolution": "is a linear map that need not be invertible",
    "mm": "multiplies by a matrix that need not be invertible",
    "addmm": "multiplies by a matrix that need not be invertible",
    "bmm": "multiplies by a matrix that need not be invertible",
    "native_dropout": "drops elements",
    "native_layer_norm": "removes mean and scale, which the output does not hold",
    "_native_batch_norm_legit_functional": "removes mean and scale, which the output does not hold",
}


def why_none(name: str) -> str:
    """Return why an operation without a rule can't be inverted, as the end of a sentence that starts with its name."""
    if name == "pow":
        return "is not injective (an even power loses the sign)"
    return NOT_INJECTIVE.get(name.rstrip("_"), "has no inverse rule")


importlib.import_module("revfx.rules_layout")  # fills the rest of the table
importlib.import_module("revfx.rules_aten")
_ours = dict(_table)

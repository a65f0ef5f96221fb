"""`rev_block` and `RevBlock`: additive couplings that the user writes out, after `tf.contrib.layers.rev_block`.

Gomez et al., "The Reversible Residual Network: Backpropagation Without Storing Activations", NeurIPS 2017,
https://arxiv.org/abs/1707.04585.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import weakref
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revfx.modes import check_exact, runs_plain, sees_the_engine
from revfx.plan.model import PlannedModel
from revfx.traced import free_couplings


Function = Callable[..., Tensor]
Functions = Function | Sequence[Function] | nn.ModuleList
Layers = list[tuple[Function, Function]]
Sides = tuple[Any, Any]


def rev_block(
    x1: Tensor,
    x2: Tensor,
    f: Functions,
    g: Functions,
    num_layers: int = 1,
    f_side_input: Any = None,
    g_side_input: Any = None,
    is_training: bool = True,
    *,
    exact: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute (y1, y2) by `num_layers` additive couplings without storing their activations.

    Forward, per layer: `y1 = x1 + f(x2)`, `y2 = x2 + g(y1)`. The backward keeps the last pair, and a code for the
    rounding error of each inverse. It computes `x2 = y2 - g(y1)`, `x1 = y1 - f(x2)`, and corrects both by their codes.
    Gradients are those of ordinary storage, bit for bit. x1 and x2 may have different shapes if f maps x2 to the shape
    of x1, and g maps y1 to that of x2.

    Args:
        x1, x2: floating-point tensors.
        f, g: a callable for all layers, or a sequence of `num_layers` callables. One module for all layers shares its
            weights; `RevBlock` gives each layer new ones. Tensors that they close over get gradients. The backward
            repeats their random numbers.
        num_layers: the number of couplings; 0 returns (x1, x2).
        f_side_input, g_side_input: None, or anything (usually a list) that f (g) gets as its second argument in every
            layer; tensors in it may need gradients. Empty containers count as None.
        is_training: False computes the same with ordinary autograd storage.
        exact: False: store no codes. Memory then does not grow with `num_layers`, and gradients are accurate to
            rounding.

    Raises:
        ValueError: a sequence has the wrong length; f or g changes the shape, dtype or device of its stream.
        TypeError: x1 or x2 is not floating point while a gradient is needed, or nested, or sparse.
        NotReversibleError: f or g writes to its input in place.
    """
    check_exact(exact)
    layers = _pair_functions(f, g, num_layers)
    sides = (_drop_if_empty(f_side_input), _drop_if_empty(g_side_input))
    _check_streams(x1, x2)
    if not (x1.is_floating_point() and x2.is_floating_point()):
        return _run_integers(x1, x2, layers, sides)
    if num_layers == 0:
        return _run_layers(x1, x2, layers, sides)
    if torch.compiler.is_compiling():
        if is_training:
            free_couplings()
        return _run_layers(x1, x2, layers, sides)
    tensors = [t for t in pytree.tree_leaves((x1, x2, sides)) if isinstance(t, Tensor)]
    if not is_training or runs_plain(tensors) or sees_the_engine():
        return _run_layers(x1, x2, layers, sides)
    plans = _find_plans(layers[0][0], len(layers), exact)
    return plans.call(_Functions(layers), _run_layers, (x1, x2, layers, sides), {})


class _Functions(nn.Module):
    """The modules among the functions of a chain."""

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.layers = nn.ModuleList(f for f in chain.from_iterable(layers) if isinstance(f, nn.Module))
        self.training = any(f.training for f in self.layers)


_plans: weakref.WeakKeyDictionary[Any, dict[Any, PlannedModel]] = weakref.WeakKeyDictionary()


def _find_plans(first: Any, layers: int, exact: bool) -> PlannedModel:
    """Find the plans of chains, or begin new ones.

    Args:
        first: the first function of a chain.
        layers: the number of couplings.
        exact: see `rev_block`.
    """
    key = getattr(getattr(first, "func", first), "__code__", first)  # lambdas and partials are often new objects
    try:
        known = _plans.setdefault(key, {})
    except TypeError:  # no hash, or no weak references
        known = {}
    return known.setdefault((layers, exact), PlannedModel(exact))


class RevBlock(nn.Module):
    """A chain of additive couplings as a module; a call returns (y1, y2), `inverse` returns (x1, x2).

    Args:
        f, g: the functions of the layers, in one of four forms. A factory without arguments (a class, or a function
            that returns a module) is called once per layer. A module serves the first layer; the others get deep
            copies, with new weights if their parts have `reset_parameters`. A sequence has `num_layers` modules or
            functions. A function of x without weights serves all layers.
        num_layers: the number of couplings.
        exact: see `rev_block`.
    """

    def __init__(
        self,
        f: Any,
        g: Any,
        num_layers: int = 1,
        *,
        exact: bool = True,
    ) -> None:
        super().__init__()
        check_exact(exact)
        self.num_layers: int = num_layers
        self.exact: bool = exact
        self.f: Any = _build_functions("f", f, num_layers)
        self.g: Any = _build_functions("g", g, num_layers)

    def forward(
        self, x1: Tensor, x2: Tensor, f_side_input: Any = None, g_side_input: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Return (y1, y2); see `rev_block`."""
        return rev_block(x1, x2, self.f, self.g, self.num_layers, f_side_input, g_side_input, exact=self.exact)

    def inverse(
        self, y1: Tensor, y2: Tensor, f_side_input: Any = None, g_side_input: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Return (x1, x2) such that `self(x1, x2)` is (y1, y2) up to rounding; differentiable, stored plainly."""
        f_side, g_side = _drop_if_empty(f_side_input), _drop_if_empty(g_side_input)
        layers = _pair_functions(self.f, self.g, self.num_layers)
        for layer, (f, g) in reversed(list(enumerate(layers))):
            y2 = _couple(y2, _apply(g, y1, g_side), "g", layer, sign=-1)
            y1 = _couple(y1, _apply(f, y2, f_side), "f", layer, sign=-1)
        return y1, y2

    def extra_repr(self) -> str:
        """Return the number of couplings, for `print`."""
        text = f"num_layers={self.num_layers}"
        return text if self.exact else f"{text}, exact=False"


# --- couplings
def _apply(function: Function, x: Tensor, side: Any) -> Tensor:
    """Call a function of a coupling, with its side input if there is one."""
    return function(x) if side is None else function(x, side)


def _couple(x: Tensor, h: Any, name: str, layer: int, sign: int = 1) -> Tensor:
    """Return `x + h`, or `x - h` if the sign is -1.

    Args:
        x: the stream.
        h: the result of the function `name` of a layer.
        name, layer: for error messages.
        sign: 1 or -1.

    Raises:
        TypeError: h is not a tensor.
        ValueError: h has another shape or device than x, or the sum another dtype.
    """
    if not isinstance(h, Tensor):
        raise TypeError(f"`{name}` of layer {layer} returned a {type(h).__name__}; it must return one tensor.")
    if h.shape != x.shape:
        raise ValueError(
            f"`{name}` of layer {layer} returned shape {tuple(h.shape)}, but the stream that it is added to has shape"
            f" {tuple(x.shape)}: a coupling must keep the shape."
        )
    if h.device != x.device:
        raise ValueError(f"`{name}` of layer {layer} returned a tensor on {h.device}, but its stream is on {x.device}.")
    if h.dtype != x.dtype and torch.promote_types(h.dtype, x.dtype) != x.dtype:
        raise ValueError(
            f"`{name}` of layer {layer} returned {h.dtype}, which would turn its stream from {x.dtype} into"
            f" {torch.promote_types(h.dtype, x.dtype)}: a coupling must keep the dtype."
        )
    return x + h if sign > 0 else x - h


def _run_layers(x1: Tensor, x2: Tensor, layers: Layers, sides: Sides) -> tuple[Tensor, Tensor]:
    """Return (y1, y2) of the chain, by ordinary operators."""
    for layer, (f, g) in enumerate(layers):
        x1 = _couple(x1, _apply(f, x2, sides[0]), "f", layer)
        x2 = _couple(x2, _apply(g, x1, sides[1]), "g", layer)
    return x1, x2


# --- arguments
def _pair_functions(f: Functions, g: Functions, num_layers: int) -> Layers:
    """Return the pair of functions of each layer."""
    if num_layers < 0:
        raise ValueError(f"`num_layers` must be at least 0, not {num_layers}.")
    return list(zip(_list_functions("f", f, num_layers), _list_functions("g", g, num_layers), strict=True))


def _list_functions(name: str, f: Functions, num_layers: int) -> list[Function]:
    """Return one function per layer; repeat `f` unless it is a sequence."""
    functions: list[Any] = [f] * num_layers
    if isinstance(f, (list, tuple, nn.ModuleList)):
        functions = list(f)
        if len(functions) != num_layers:
            raise ValueError(
                f"`{name}` is a sequence of {len(functions)} functions, but `num_layers` is {num_layers}: give one"
                " function for all layers, or one per layer."
            )
    for layer, function in enumerate(functions):
        if not callable(function):
            raise TypeError(f"`{name}` of layer {layer} is a {type(function).__name__}, which can't be called.")
    return functions


def _build_functions(name: str, f: Any, num_layers: int) -> Any:
    """Return one function per layer, with weights of its own; a ModuleList if all are modules."""
    functions: list[Any]
    if isinstance(f, nn.Module) and not isinstance(f, nn.ModuleList):
        functions = [f, *(_copy_with_new_weights(f) for _ in range(num_layers - 1))][:num_layers]
    elif not isinstance(f, nn.ModuleList) and (isinstance(f, type) or _has_no_arguments(f)):
        functions = [f() for _ in range(num_layers)]
        for m in functions:
            if not isinstance(m, nn.Module):
                raise TypeError(
                    f"`{name}` is called without arguments to make each layer's module; it returned a"
                    f" {type(m).__name__}."
                )
    else:
        functions = _list_functions(name, f, num_layers)
    if all(isinstance(m, nn.Module) for m in functions):
        return nn.ModuleList(functions)
    return functions


def _has_no_arguments(f: Callable[..., Any]) -> bool:
    with contextlib.suppress(TypeError, ValueError):
        inspect.signature(f).bind()
        return True
    return False


def _copy_with_new_weights(module: nn.Module) -> nn.Module:
    twin = copy.deepcopy(module)
    for part in twin.modules():
        reset = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()
    return twin


def _drop_if_empty(side: Any) -> Any:
    """Return a side input; None if it is an empty container."""
    if isinstance(side, (list, tuple, dict)) and not side:
        return None
    return side


def _check_streams(x1: Tensor, x2: Tensor) -> None:
    """Raise a TypeError unless the streams are dense."""
    for name, x in (("x1", x1), ("x2", x2)):
        if x.is_nested:
            kind, remedy = "a nested tensor", "padded ones, or the values of a jagged tensor"
        elif x.layout != torch.strided:
            kind, remedy = x.layout, f"`{name}.to_dense()`"
        else:
            continue
        raise TypeError(f"`{name}` is {kind}; a reversible block needs dense streams: {remedy}.")


def _run_integers(x1: Tensor, x2: Tensor, layers: Layers, sides: Sides) -> tuple[Tensor, Tensor]:
    """Run the layers on streams of which one is not floating point.

    Raises:
        TypeError: a gradient is needed.
    """
    given = [t for t in pytree.tree_leaves((x1, x2, sides)) if isinstance(t, Tensor)]
    has_grad = torch.is_grad_enabled()
    if not (has_grad and any(t.requires_grad for t in chain(given, _Functions(layers).parameters()))):
        y1, y2 = _run_layers(x1, x2, layers, sides)
        if not (has_grad and (y1.requires_grad or y2.requires_grad)):  # by tensors that the functions close over
            return y1, y2
    name, x = ("x2", x2) if x1.is_floating_point() else ("x1", x1)
    raise TypeError(
        f"`{name}` is {x.dtype}; a reversible block needs floating-point streams when a gradient is needed."
        f" Convert it (`{name}.float()`), or call it under `torch.no_grad()`."
    )

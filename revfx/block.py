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
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revfx.modes import check_exact, runs_plain, sees_the_engine
from revfx.plan.model import PlannedModel
from revfx.traced import free_couplings
from revfx.world.reach import Reach


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
    """Return (y1, y2) after `num_layers` additive couplings, keeping for the backward the last pair and, of the others,
    the rounding errors of their inverses.

    Forward, per layer: `y1 = x1 + f(x2)`, `y2 = x2 + g(y1)`; the backward computes `x2 = y2 - g(y1)`,
    `x1 = y1 - f(x2)`, and corrects both by their codes: gradients are those of ordinary storage, bit for bit. x1 and x2
    may have different shapes as long as f maps x2 to x1's and g maps y1 to x2's.

    Args:
        x1, x2: floating-point tensors.
        f, g: a callable used in every layer (one module shares its weights over all layers; see `RevBlock` for new
            weights per layer), or a sequence of `num_layers` callables. They may close over tensors, which get their
            gradients, and draw random numbers, which are drawn again alike.
        num_layers: the number of couplings; 0 returns (x1, x2).
        f_side_input, g_side_input: None, or anything (usually a list) that f (g) gets as its second argument in every
            layer; tensors in it may need gradients. Empty containers count as None.
        is_training: False computes the same with ordinary autograd storage.
        exact: False: without codes, so that memory does not grow with num_layers and gradients are right up to
            rounding.

    Raises:
        ValueError: a sequence of the wrong length; f or g changes the shape, dtype or device of its stream.
        TypeError: x1 or x2 is not floating point while a gradient is needed, or nested, or sparse.
        NotReversibleError: f or g writes to its input in place.
    """
    check_exact(exact)
    layers = _layers(f, g, num_layers)
    sides = (_side(f_side_input), _side(g_side_input))
    _check_streams(x1, x2, layers, sides)
    floating = x1.is_floating_point() and x2.is_floating_point()  # else nothing needs a gradient
    if num_layers == 0 or not floating:
        return _plain(x1, x2, layers, sides)
    if torch.compiler.is_compiling():
        if is_training:
            free_couplings()
        return _plain(x1, x2, layers, sides)
    tensors = [t for t in pytree.tree_leaves((x1, x2, sides)) if isinstance(t, Tensor)]
    if not is_training or runs_plain(tensors) or sees_the_engine():
        return _plain(x1, x2, layers, sides)
    planned = _planned(layers[0][0], len(layers), exact)
    return planned.call(_Functions(layers), _plain, (x1, x2, layers, sides), {})


class _Functions(nn.Module):
    """The modules among the functions of a chain."""

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.layers = nn.ModuleList(f for pair in layers for f in pair if isinstance(f, nn.Module))
        self.training = any(f.training for f in self.layers)


_plans: weakref.WeakKeyDictionary[Any, dict[Any, PlannedModel]] = weakref.WeakKeyDictionary()


def _planned(first: Any, layers: int, exact: bool) -> PlannedModel:
    """Return the plans of chains of so many layers that begin with a function; new ones if it is unknown."""
    key = getattr(getattr(first, "func", first), "__code__", first)  # lambdas and partials are often new objects
    try:
        mine = _plans.setdefault(key, {})
    except TypeError:  # not hashable, or not to be referred to weakly
        mine = {}
    return mine.setdefault((layers, exact), PlannedModel(exact))


class RevBlock(nn.Module):
    """A chain of additive couplings as a module; calling it gives (y1, y2), `inverse` gives (x1, x2) back.

    Args:
        f, g: the functions of each layer, with weights of its own per layer: a zero-argument factory (a class or
            function that returns a module), called once per layer; or a module, used in the first layer, deep-copied
            and re-initialised (by `reset_parameters` where its parts have it) for the others; or a sequence of
            `num_layers` modules or functions, used as it is; or a function of x without weights, used in every layer.
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
        self.num_layers, self.exact = num_layers, exact
        self.f = _per_layer("f", f, num_layers)
        self.g = _per_layer("g", g, num_layers)

    def forward(
        self, x1: Tensor, x2: Tensor, f_side_input: Any = None, g_side_input: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Return (y1, y2); see `rev_block`."""
        return rev_block(x1, x2, self.f, self.g, self.num_layers, f_side_input, g_side_input, exact=self.exact)

    def inverse(
        self, y1: Tensor, y2: Tensor, f_side_input: Any = None, g_side_input: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Return (x1, x2) such that `self(x1, x2)` is (y1, y2) up to rounding; differentiable, stored plainly."""
        f_side, g_side = _side(f_side_input), _side(g_side_input)
        layers = _layers(self.f, self.g, self.num_layers)
        for layer, (f, g) in reversed(list(enumerate(layers))):
            y2 = _couple(y2, _apply(g, y1, g_side), "g", layer, sign=-1)
            y1 = _couple(y1, _apply(f, y2, f_side), "f", layer, sign=-1)
        return y1, y2

    def extra_repr(self) -> str:
        """Return the number of couplings, for `print`."""
        return f"num_layers={self.num_layers}" + ("" if self.exact else ", exact=False")


# --- couplings
def _apply(function: Function, x: Tensor, side: Any) -> Tensor:
    """Return the result of a function of a coupling, which takes its side input only if there is one."""
    return function(x) if side is None else function(x, side)


def _couple(x: Tensor, h: Any, name: str, layer: int, sign: int = 1) -> Tensor:
    """Return `x + h` (`x - h` where sign is -1), for h of the same shape and device if the sum keeps x's dtype, else
    raise.
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


def _plain(x1: Tensor, x2: Tensor, layers: Layers, sides: Sides) -> tuple[Tensor, Tensor]:
    """Return (y1, y2) of the chain."""
    for layer, (f, g) in enumerate(layers):
        x1 = _couple(x1, _apply(f, x2, sides[0]), "f", layer)
        x2 = _couple(x2, _apply(g, x1, sides[1]), "g", layer)
    return x1, x2


# --- arguments
def _layers(f: Functions, g: Functions, num_layers: int) -> Layers:
    if num_layers < 0:
        raise ValueError(f"`num_layers` must be at least 0, not {num_layers}.")
    return list(zip(_sequence("f", f, num_layers), _sequence("g", g, num_layers), strict=True))


def _sequence(name: str, f: Functions, num_layers: int) -> Sequence[Function]:
    several = isinstance(f, (list, tuple, nn.ModuleList))
    functions: list[Any] = list(f) if several else [f] * num_layers
    if several and len(functions) != num_layers:
        raise ValueError(
            f"`{name}` is a sequence of {len(functions)} functions, but `num_layers` is {num_layers}: give one function"
            " for all layers, or one per layer."
        )
    for layer, function in enumerate(functions):
        if not callable(function):
            raise TypeError(f"`{name}` of layer {layer} is a {type(function).__name__}, which can't be called.")
    return functions


def _per_layer(name: str, f: Any, num_layers: int) -> Any:
    """Return the functions of all layers, in a ModuleList where they are modules."""
    functions: list[Any]
    if isinstance(f, nn.Module) and not isinstance(f, nn.ModuleList):
        functions = [f, *(_fresh(f) for _ in range(num_layers - 1))][:num_layers]
    elif not isinstance(f, nn.ModuleList) and (isinstance(f, type) or _takes_nothing(f)):
        functions = [f() for _ in range(num_layers)]
        wrong = next((m for m in functions if not isinstance(m, nn.Module)), None)
        if wrong is not None:
            raise TypeError(
                f"`{name}` is called without arguments to make each layer's module; it returned a"
                f" {type(wrong).__name__}."
            )
    else:
        functions = list(_sequence(name, f, num_layers))
    return nn.ModuleList(functions) if all(isinstance(m, nn.Module) for m in functions) else functions


def _takes_nothing(f: Callable[..., Any]) -> bool:
    with contextlib.suppress(TypeError, ValueError):
        inspect.signature(f).bind()
        return True
    return False


def _fresh(module: nn.Module) -> nn.Module:
    fresh = copy.deepcopy(module)
    for part in fresh.modules():
        reset = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()
    return fresh


def _side(side: Any) -> Any:
    return None if isinstance(side, (list, tuple, dict)) and not side else side


def _check_streams(x1: Tensor, x2: Tensor, layers: Layers, sides: Sides) -> None:
    streams = ("x1", x1), ("x2", x2)
    for name, x in streams:
        if x.is_nested or x.layout != torch.strided:
            raise TypeError(
                f"`{name}` is {'a nested tensor' if x.is_nested else x.layout}; a reversible block needs dense streams:"
                f" {'padded ones, or the values of a jagged tensor' if x.is_nested else f'`{name}.to_dense()`'}."
            )
    wrong = [(n, x) for n, x in streams if not x.is_floating_point()]
    if wrong and torch.is_grad_enabled() and Reach((x1, x2, *sides, *layers)).needs_grad():
        name, x = wrong[0]
        raise TypeError(
            f"`{name}` is {x.dtype}; a reversible block needs floating-point streams when a gradient is needed."
            f" Convert it (`{name}.float()`), or call it under `torch.no_grad()`."
        )

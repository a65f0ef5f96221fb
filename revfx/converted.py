"""The classes of converted models, which run calls under plans and share the attributes of the model."""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
from abc import ABCMeta
from collections.abc import Callable
from types import FunctionType
from typing import Any, cast

import torch
from torch import nn
from torch.fx import GraphModule

from revfx import _fsdp, _torch
from revfx.conversion import Conversion, Options
from revfx.errors import RevfxError
from revfx.info import ConversionInfo
from revfx.traced import free_couplings


class Reversible(nn.Module):
    """Base of the classes of converted models; `model.revfx` holds the findings (`ConversionInfo`).

    A converted model and its original have one table of attributes. So objects that hold the original, as bound
    methods, lambdas and hooks do, see changes of the converted one. `type(model)()` runs plainly.
    """

    _revfx_base: type[nn.Module]
    _revfx: tuple[Conversion, nn.Module]  # with the original; a slot

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Do nothing, as the model's own class may register derived classes, or refuse them."""

    @property
    def revfx(self) -> ConversionInfo:
        """The findings on this model up to its latest call: regions, refusals, plans, program."""
        return conversion_of(self).info

    def _replicate_for_data_parallel(self) -> Any:
        """Return one of the replicas that `nn.DataParallel` makes at every step."""
        replica = super()._replicate_for_data_parallel()
        state = _conversion_and_original(self)
        if state[0] is not None:
            object.__setattr__(replica, "_revfx", state)
        return replica

    def __copy__(self) -> Any:
        """Return a converted copy, by the rules of the model's own class."""
        return _adopt(object.__new__(type(self)), copy.copy(unconverted(self)), _options(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and deeply copy the model and the options, but no plans."""
        plain = unconverted(self)
        if isinstance(plain, GraphModule):  # its class can't be found by name
            return reversible, (plain, _options(self))
        return _unfilled, (self._revfx_base, "forward" in vars(plain)), (plain, _options(self))

    def __setstate__(self, state: Any) -> None:
        """Restore the state of `__reduce_ex__`."""
        _adopt(self, *state)


def conversion_of(module: nn.Module) -> Conversion:
    """Return the state of a converted model; raise a RevfxError if `convert` did not make it."""
    conversion, _ = _conversion_and_original(module)
    if conversion is None:
        raise RevfxError(f"this {type(module).__name__} was made by its class and not by `convert`; it runs plainly.")
    return conversion


def _deepcopy(self: Reversible, memo: dict[int, Any]) -> Any:
    twin = memo[id(self)] = object.__new__(type(self))  # sub-modules may refer to it
    return _adopt(twin, copy.deepcopy(unconverted(self), memo), _options(self))


def _conversion_and_original(module: nn.Module) -> tuple[Conversion, nn.Module] | tuple[None, None]:
    try:
        return object.__getattribute__(module, "_revfx")  # the model's own `__getattr__` may ask another model
    except AttributeError:
        return None, None


def _options(module: Reversible) -> Options | None:
    conversion, _ = _conversion_and_original(module)
    return None if conversion is None else conversion.options


def _active_conversion(module: nn.Module) -> Conversion | None:
    """Return the state of a converted model; None while `torch.compile` traces the model, or if it has no state."""
    if torch.compiler.is_compiling():
        return None
    return _conversion_and_original(module)[0]


@_torch.breaks_graph
def _call_uncompiled(module: Any, args: Any, kwargs: Any) -> Any:
    """Call a model with a budget outside of compiled code: a compiler would choose the saved tensors."""
    return conversion_of(module).call(module, args, kwargs)


@functools.cache
def _derive_class(base: type[nn.Module], has_own_forward: bool) -> type[Any]:
    """Derive the class of converted models of class `base`.

    It has the name of `base`, by which programs look classes up, and which they write into checkpoints.

    Args:
        base: the class of the model.
        has_own_forward: the model has a forward among its attributes, which replaces that of its class.
    """

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            state = getattr(self, "_revfx", None)
            if state is not None:
                if state[0].options.memory is not None:
                    return _call_uncompiled(self, args, kwargs)
                free_couplings()
            return base.forward(self, *args, **kwargs)
        conversion, _ = _conversion_and_original(self)
        if conversion is None:
            return base.forward(self, *args, **kwargs)
        return conversion.call(self, args, kwargs)

    def get_own_forward(self: Any) -> Any:
        own: Any = vars(self)["forward"]
        conversion = _active_conversion(self)
        if conversion is None or own is not conversion.own_forward:  # patched once more
            return own
        return functools.wraps(own)(lambda *args, **kwargs: conversion.call(self, args, kwargs))

    def set_own_forward(self: Any, forward: Any) -> None:
        vars(self)["forward"] = forward

    members: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__slots__": ("_revfx",),
        "_revfx_base": base,
        "forward": property(get_own_forward, set_own_forward) if has_own_forward else forward,
    }
    for name, function in _public_methods(base).items():
        members[name] = _wrap_method(function)
    if hasattr(base, "__deepcopy__"):  # else there is none: a wrapper with a `__getattr__` would take it for its own
        members["__deepcopy__"] = _deepcopy
    kind: Any = type(base)  # neither it nor the base shall register the class
    make = ABCMeta.__new__ if issubclass(kind, ABCMeta) else type.__new__
    return make(kind, base.__name__, (Reversible, base), members)


def _public_methods(base: type[nn.Module]) -> dict[str, FunctionType]:
    """Return the methods that users call beside forward, such as `encode` and `log_prob`."""
    found: dict[str, FunctionType] = {}
    for owner in base.__mro__[: base.__mro__.index(nn.Module)]:
        for name, function in vars(owner).items():
            if not isinstance(function, FunctionType) or name.startswith("_") or hasattr(nn.Module, name):
                continue
            if not inspect.isgeneratorfunction(function) and not inspect.iscoroutinefunction(function):
                found.setdefault(name, function)
    return found


def _wrap_method(function: FunctionType) -> Callable[..., Any]:
    """Return a method that runs `function` under a plan, as the forward runs."""

    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        conversion = _active_conversion(self)
        if conversion is None:
            return function(self, *args, **kwargs)
        return conversion.call_method(self, function, args, kwargs)

    return method


# Pickles name this function and the next one.
def reversible(model: nn.Module, options: Options | None) -> Any:
    """Return the converted model of `model`."""
    return _adopt(_unfilled(type(model), "forward" in vars(model)), model, options)


def _unfilled(base: type[nn.Module], has_own_forward: bool) -> Any:
    return object.__new__(_derive_class(base, has_own_forward))


def _adopt(twin: Any, plain: nn.Module, options: Options | None) -> Any:
    """Give `twin` the attributes of `plain`, and a state if there are `options`; return it."""
    object.__setattr__(twin, "__dict__", vars(plain))
    for name in cast(Any, copyreg)._slotnames(type(plain)):  # as pickle finds them
        if hasattr(plain, name):
            object.__setattr__(twin, name, getattr(plain, name))
    if options is not None:
        conversion = Conversion(vars(plain).get("forward"), options)
        object.__setattr__(twin, "_revfx", (conversion, plain))
    _fsdp.share_state(plain, twin)
    return twin


def unconverted(model: nn.Module) -> nn.Module:
    """Return the original of a converted model, with which it shares everything; other modules as they are."""
    if not isinstance(model, Reversible):
        return model
    _, plain = _conversion_and_original(model)
    if plain is not None and vars(plain) is vars(model):
        return plain
    plain = object.__new__(model._revfx_base)  # pyright: ignore[reportPrivateUsage]
    object.__setattr__(plain, "__dict__", vars(model))
    _fsdp.share_state(model, plain)
    return plain

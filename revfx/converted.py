"""The classes of converted models: the same model, with its attributes and name; its calls go through plans."""

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

    An object of such a class and the model that it was made of have one table of attributes: objects that hold
    that model, such as bound methods, lambdas and hooks, see the changes of this one. `type(model)()` runs plainly.
    """

    _revfx_base: type[nn.Module]
    _revfx: tuple[Conversion, nn.Module]  # with the model that it was made of; a slot

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Do nothing: the model's own class may register derived classes, or refuse them."""

    @property
    def revfx(self) -> ConversionInfo:
        """The findings on this model up to its latest call: regions, refusals, plans, program."""
        return conversion_of(self).info

    def _replicate_for_data_parallel(self) -> Any:
        """Return one of the replicas that `nn.DataParallel` makes at every step."""
        replica = super()._replicate_for_data_parallel()
        if (known := _known(self))[0] is not None:
            object.__setattr__(replica, "_revfx", known)
        return replica

    def __copy__(self) -> Any:
        """Return the converted copy of the model, which is made by its own rules."""
        return _adopt(object.__new__(type(self)), copy.copy(unconverted(self)), _options(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return how it is pickled and deeply copied: as the model and the options; plans are made again."""
        plain = unconverted(self)
        if isinstance(plain, GraphModule):  # its class can't be found by name
            return reversible, (plain, _options(self))
        return _unfilled, (self._revfx_base, "forward" in vars(plain)), (plain, _options(self))

    def __setstate__(self, state: Any) -> None:
        """Take the state of `__reduce_ex__`."""
        _adopt(self, *state)


def conversion_of(module: nn.Module) -> Conversion:
    """The working object of a converted model.

    Raises:
        RevfxError: `convert` did not make this model.
    """
    conversion, _ = _known(module)
    if conversion is None:
        raise RevfxError(f"this {type(module).__name__} was made by its class and not by `convert`; it runs plainly.")
    return conversion


def _deepcopy(self: Reversible, memo: dict[int, Any]) -> Any:
    made = memo[id(self)] = object.__new__(type(self))  # sub-modules may know it
    return _adopt(made, copy.deepcopy(unconverted(self), memo), _options(self))


def _known(module: nn.Module) -> tuple[Conversion, nn.Module] | tuple[None, None]:
    try:
        return object.__getattribute__(module, "_revfx")  # the model's own `__getattr__` may ask another model
    except AttributeError:
        return None, None


def _options(module: Reversible) -> Options | None:
    conversion, _ = _known(module)
    return None if conversion is None else conversion.options


@_torch.breaks_graph
def _left_alone(module: Any, args: Any, kwargs: Any) -> Any:
    """Return the result of a model with a budget, which nobody compiles: a compiler would choose the saved tensors."""
    return conversion_of(module).call(module, args, kwargs)


@functools.cache
def _class_for(base: type[nn.Module], patched: bool) -> type[Any]:
    """Return the class of converted models of class `base`; `patched` ones have a forward among their attributes.

    It goes by the name of the model's own class, which others look things up by, and write into checkpoints.
    """

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            known = getattr(self, "_revfx", None)
            options = None if known is None else known[0].options
            if options is not None and options.memory is not None:
                return _left_alone(self, args, kwargs)
            if options is not None:
                free_couplings()
            return base.forward(self, *args, **kwargs)
        conversion, _ = _known(self)
        return base.forward(self, *args, **kwargs) if conversion is None else conversion.call(self, args, kwargs)

    def found(self: Any) -> Any:
        own: Any = vars(self)["forward"]
        conversion = None if torch.compiler.is_compiling() else _known(self)[0]
        if conversion is None or own is not conversion.own_forward:  # patched once more
            return own
        return functools.wraps(own)(lambda *args, **kwargs: conversion.call(self, args, kwargs))

    def replaced(self: Any, forward: Any) -> None:
        vars(self)["forward"] = forward

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    members: dict[str, Any] = {"forward": property(found, replaced) if patched else forward, "_revfx_base": base}
    for name, function in _public_methods(base).items():
        members[name] = _watched(function)
    if hasattr(base, "__deepcopy__"):  # else there is none: a wrapper with a `__getattr__` would take it for its own
        members["__deepcopy__"] = _deepcopy
    kind: Any = type(base)  # neither it nor the base shall register the class
    make = ABCMeta.__new__ if issubclass(kind, ABCMeta) else type.__new__
    return make(kind, base.__name__, (Reversible, base), {**members, **names, "__slots__": ("_revfx",)})


def _public_methods(base: type[nn.Module]) -> dict[str, FunctionType]:
    """Return the methods that users call beside forward, such as `encode` and `log_prob`."""
    found: dict[str, FunctionType] = {}
    for owner in base.__mro__[: base.__mro__.index(nn.Module)]:
        for name, function in vars(owner).items():
            suspends = inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function)
            if isinstance(function, FunctionType) and not suspends and not name.startswith("_"):
                found.setdefault(name, function)
    return {name: function for name, function in found.items() if not hasattr(nn.Module, name)}


def _watched(function: FunctionType) -> Callable[..., Any]:
    """Return a method that runs as it is, and under a plan as the forward does."""

    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        conversion = None if torch.compiler.is_compiling() else _known(self)[0]
        if conversion is None:
            return function(self, *args, **kwargs)
        return conversion.call_method(self, function, args, kwargs)

    return method


def reversible(model: nn.Module, options: Options | None) -> Any:
    return _adopt(_unfilled(type(model), "forward" in vars(model)), model, options)


def _unfilled(base: type[nn.Module], patched: bool) -> Any:
    return object.__new__(_class_for(base, patched))


def _adopt(made: Any, plain: nn.Module, options: Options | None) -> Any:
    """Return `made`, which is `plain` from now on; converted, if there are `options`."""
    object.__setattr__(made, "__dict__", vars(plain))
    for name in cast(Any, copyreg)._slotnames(type(plain)):  # as pickle finds them
        if hasattr(plain, name):
            object.__setattr__(made, name, getattr(plain, name))
    if options is not None:
        conversion = Conversion(vars(plain).get("forward"), options)
        object.__setattr__(made, "_revfx", (conversion, plain))
    _fsdp.share_state(plain, made)
    return made


def unconverted(model: nn.Module) -> nn.Module:
    """Return the model that a converted one was made of, which shares everything with it; other modules as they are."""
    if not isinstance(model, Reversible):
        return model
    _, plain = _known(model)
    if plain is not None and vars(plain) is vars(model):
        return plain
    plain = object.__new__(model._revfx_base)  # pyright: ignore[reportPrivateUsage]
    object.__setattr__(plain, "__dict__", vars(model))
    _fsdp.share_state(model, plain)
    return plain

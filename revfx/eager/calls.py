"""How an operation of a program is run: a callable, with the program's values in the places of its arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
from torch import Tensor, nn

from revfx.eager.reach import Reach


_ITSELF = ((),)


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of value `index` among a call's arguments."""

    index: int


@dataclass(frozen=True)
class Call:
    """`fn(*args, **kwargs)`; `outs` are the paths to its tensors in what it returns (empty: the result itself)."""

    name: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    outs: tuple[tuple[Any, ...], ...] = _ITSELF

    @functools.cached_property
    def reach(self) -> Reach:
        """Return what the function, and the arguments that are no values of the program, can see."""
        further = [a for a in (*self.args, *self.kwargs.values()) if type(a) is not Slot]
        return Reach((self.fn, *further))

    @property
    def module(self) -> nn.Module | None:
        """Return the module that it calls whole; None if it is no such call."""
        fn: Any = self.fn
        whole = isinstance(fn, functools.partial) and fn.func is nn.Module.__call__ and len(fn.args) == 1
        return fn.args[0] if whole else None

    def invoke(self, env: Mapping[int, Tensor]) -> tuple[Tensor, ...]:
        """Return the output tensors, with the values taken from `env`."""
        kwargs = {k: fill(v, env) for k, v in self.kwargs.items()} if self.kwargs else {}
        result = self.fn(*[env[a.index] if type(a) is Slot else fill(a, env) for a in self.args], **kwargs)
        if self.outs == _ITSELF:
            return (result,)
        return tuple([functools.reduce(getitem, path, result) for path in self.outs])


def fill(tree: Any, env: Mapping[int, Tensor]) -> Any:
    """Return a nested structure with every `Slot` replaced by its value."""
    if isinstance(tree, Slot):
        return env[tree.index]
    if isinstance(tree, tuple):
        items = [fill(x, env) for x in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    if isinstance(tree, list):
        return [fill(x, env) for x in tree]
    if isinstance(tree, dict):
        return {k: fill(v, env) for k, v in tree.items()}
    if isinstance(tree, slice):
        return slice(fill(tree.start, env), fill(tree.stop, env), fill(tree.step, env))
    return tree


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in tuples, lists, dicts and slices."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, slice):
        tree = tree.start, tree.stop, tree.step
    elif isinstance(tree, dict):
        tree = [*tree.values()]
    return [t for x in tree for t in tensors(x)] if isinstance(tree, (list, tuple)) else []


def meta(x: Any) -> Any:
    """Return a key that two arguments share for which a module gives the like: of a tensor all but its numbers."""
    if isinstance(x, Tensor):
        return tuple(x.shape), x.stride() if x.layout == torch.strided else None, x.dtype, x.device, x.requires_grad
    return x if isinstance(x, (int, float, str, bool, type(None))) else id(x)

"""Wrapper subclasses of tensors, such as DTensors: an operator on them runs others, on the tensors inside.

The tape has these. So a wrapper that autograd saves is taken apart, and put together when the backward asks for it. Not
so a nested tensor: its sizes belong to the very tensor of its offsets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from revfx import _torch
from revfx.engine.dispatch import is_wrapper


def unwrapped(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return tensors, with those inside in the place of wrappers."""
    found: list[Tensor] = []
    for t in tensors:
        if is_wrapper(type(t)):
            _, inside, _ = _taken_apart(t)
            found += unwrapped(part for part in inside.values() if isinstance(part, Tensor))
        else:
            found.append(t)
    return found


def _taken_apart(wrapper: Any) -> tuple[type, dict[str, Any], Any]:
    """Return the class of a wrapper, its parts by name, and the other arguments to make it."""
    names, context = wrapper.__tensor_flatten__()
    return type(wrapper), {name: getattr(wrapper, name) for name in names}, context


class SavedWrapper:
    """A saved tensor of a wrapper class, as the saved tensors inside.

    Args:
        tensor: the wrapper.
        pack: returns the object that autograd holds in the place of a tensor.
    """

    def __init__(self, tensor: Tensor, pack: Callable[[Tensor], Any]) -> None:
        self._kind, inside, self._context = _taken_apart(tensor)
        self._shape, self._stride = tensor.shape, tensor.stride()
        self._saved: dict[str, Any] = {}
        self._others: dict[str, Any] = {}
        for name, part in inside.items():
            if isinstance(part, Tensor):
                self._saved[name] = pack(part)
            else:
                self._others[name] = part

    @_torch.never_compiled
    def get(self) -> Tensor:
        """Return the wrapper, without its history.

        Raises:
            RuntimeError: a tensor inside was written to since it was saved.
        """
        parts = {**self._others, **{name: saved.get() for name, saved in self._saved.items()}}
        kind: Any = self._kind
        with torch.no_grad(), _torch.no_dispatch():
            return kind.__tensor_unflatten__(parts, self._context, self._shape, self._stride).detach()

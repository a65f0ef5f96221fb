"""What operations give on fake tensors, remembered by the shapes that they are given.

torch remembers it as well, but looking it up there takes most of a simulated step: it is made for symbolic shapes and
for subclasses, which a simulation does not have.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from revfx import _torch
from revfx.passes._torch import writes


class Result(NamedTuple):
    """A tensor's place in memory, which is its own or, where `shared`, that of the operation's only operand."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    shared: bool


class Shapes:
    """Runs operations on fake tensors; of two that are alike the second one is not looked into."""

    def __init__(self, mode: Any) -> None:
        self.mode = mode
        self.seen: dict[Any, Result | tuple[Result, ...] | None] = {}

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of `func(*args, **kwargs)`."""
        tensors = list[Tensor]()
        known, key = _only_makes(func), None
        if known:
            key = func, *(_key(a, tensors) for a in args), *((k, _key(a, tensors)) for k, a in kwargs.items())
            known = all(_torch.is_plain_fake(t) and t.layout == torch.strided for t in tensors)
        found = self.seen.get(key) if known else None
        if found is None:
            out = func(*args, **kwargs)
            if known and key not in self.seen:
                self.seen[key] = _result(out, tensors)
            return out
        return self._made(found, tensors) if isinstance(found, Result) else tuple(self._made(r, tensors) for r in found)

    def _made(self, result: Result, tensors: list[Tensor]) -> Tensor:
        return _torch.fake(self.mode, *result[:5], tensors[0] if result.shared else None)


@functools.cache
def _only_makes(func: Any) -> bool:
    """Whether an operation is one of torch's own that writes to none of its arguments."""
    return _torch.is_overload(func) and func.namespace == "aten" and not writes(func)


def _key(a: Any, tensors: list[Tensor]) -> Any:
    """What of an argument the shapes of a result depend on; its tensors are added to `tensors`."""
    if isinstance(a, Tensor):
        tensors.append(a)
        if a.layout != torch.strided:
            return None
        return a.shape, a.stride(), a.storage_offset(), a.dtype, a.device, a.is_conj(), a.is_neg()
    if isinstance(a, (tuple, list)):
        return tuple(_key(x, tensors) for x in a)
    return type(a), a


def _result(out: Any, tensors: list[Tensor]) -> Any:
    if isinstance(out, (tuple, list)):
        found = [_result(t, tensors) for t in out]
        return tuple(found) if all(isinstance(r, Result) for r in found) else None
    if not _torch.is_plain_fake(out) or out.layout != torch.strided or out.is_conj() or out.is_neg():
        return None
    shared = any(_torch.storage_key(t) == _torch.storage_key(out) for t in tensors)
    if shared and (len(tensors) > 1 or out is tensors[0]):
        return None
    return Result(out.shape, out.stride(), out.storage_offset(), out.dtype, out.device, shared)

"""What a module gave on fake arguments, so that another one of the same structure need not run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revfx import _torch
from revfx.capture.guards import key
from revfx.eager import dtensor
from revfx.eager.calls import meta
from revfx.eager.reach import is_users


def structure(module: nn.Module) -> tuple[Any, ...]:
    """Return a key for which two modules give the same on fake tensors: class, attributes, shapes, children."""
    plain = tuple((k, key(v)) for k, v in vars(module).items() if is_users(k))
    tensors = key((_torch.parameters(module), _torch.buffers(module)))
    children = tuple((k, None if m is None else structure(m)) for k, m in _torch.children(module).items())
    return type(module), dtensor.casts(module), plain, tensors, children


@dataclass(frozen=True)
class Seen:
    """What a module gave on fake arguments, to make the like for another of its structure, and what it `drew` from."""

    metas: tuple[Any, ...]
    spec: pytree.TreeSpec
    drew: str | None

    @staticmethod
    def of(out: Any, inputs: list[Tensor], drew: str | None) -> Seen | None:
        """Return what a module gave; None where results share memory with arguments or each other."""
        leaves, spec = pytree.tree_flatten(out)
        made = [t for t in leaves if isinstance(t, Tensor)]
        strided = all(t.layout == torch.strided for t in (*made, *inputs))
        if not strided or any(t.requires_grad and t.clone().stride() != t.stride() for t in made):
            return None
        keys = [_torch.storage_key(t) for t in made]
        shared = len(set(keys)) < len(keys) or {_torch.storage_key(t) for t in inputs} & set(keys)
        return None if shared else Seen(tuple(map(meta, leaves)), spec, drew)

    def fresh(self) -> Any:
        """Return new fake results."""
        return pytree.tree_unflatten([None if m is None else _like(*m) for m in self.metas], self.spec)


def _like(shape: Any, stride: Any, dtype: torch.dtype, device: torch.device, needs_grad: bool) -> Tensor:
    t = torch.empty_strided(shape, stride, dtype=dtype, device=device, requires_grad=needs_grad)
    return t.clone() if needs_grad else t  # a leaf could not be written to

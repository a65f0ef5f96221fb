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
from revfx.eager.reach import is_users
from revfx.eager.trees import meta


def structure(module: nn.Module) -> tuple[Any, ...]:
    """Return a key for which two modules give the same on fake tensors: class, attributes, shapes, children."""
    d = vars(module)
    plain = tuple((k, key(v)) for k, v in d.items() if is_users(k))
    tensors = tuple(
        (k, None if t is None else (tuple(t.shape), t.dtype, t.device, t.requires_grad))
        for table in (_torch.parameters(module), _torch.buffers(module))
        for k, t in table.items()
    )
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
        if any(t.layout != torch.strided for t in (*made, *inputs)):
            return None
        if any(t.requires_grad and t.clone().stride() != t.stride() for t in made):
            return None
        keys = [_torch.storage_key(t) for t in made]
        if len(set(keys)) < len(keys) or {_torch.storage_key(t) for t in inputs} & set(keys):
            return None
        return Seen(tuple(map(meta, leaves)), spec, drew)

    def fresh(self) -> Any:
        """Return new fake results."""
        made = [
            None if m is None else torch.empty_strided(m[0], m[1], dtype=m[2], device=m[3], requires_grad=m[4])
            for m in self.metas
        ]
        made = [t.clone() if t is not None and t.requires_grad else t for t in made]  # a leaf could not be written to
        return pytree.tree_unflatten(made, self.spec)

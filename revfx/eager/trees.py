"""The tensors in nested arguments, and what is compared of an argument."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in tuples, lists, dicts and slices."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, (list, tuple)):
        return [t for x in tree for t in tensors(x)]
    if isinstance(tree, dict):
        return [t for x in tree.values() for t in tensors(x)]
    if isinstance(tree, slice):
        return tensors((tree.start, tree.stop, tree.step))
    return []


def meta(x: Any) -> Any:
    """Return a key that two arguments share for which a module gives the like: of a tensor all but its numbers."""
    if isinstance(x, Tensor):
        return tuple(x.shape), x.stride() if x.layout == torch.strided else None, x.dtype, x.device, x.requires_grad
    return x if isinstance(x, (int, float, str, bool, type(None))) else id(x)

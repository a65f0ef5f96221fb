"""What a forward asks for of its tensors: values of numbers, and how many elements are not zero.

No fake tensor tells that. So a forward that asks runs once for real, without gradients, and its answers are noted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from revfx import _torch
from revfx.ambient import all_generators, restore
from revfx.capture.effects import Snapshot


@dataclass(frozen=True)
class Shape:
    """A tensor that an operator made, but for its numbers."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def asks(func: Any) -> bool:
    """Return whether what an operator returns depends on numbers in tensors: a value, or a shape."""
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


class _Answers(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if asks(func):
            shape = lambda t: Shape(tuple(t.shape), t.stride(), t.dtype, t.device)  # noqa: E731
            self.found.append(pytree.tree_map_only(Tensor, shape, out))
        return out


def answers(model: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> list[Any]:
    """Return what the operators of `run(*args, **kwargs)` that ask give, in order; `model` is left as it was."""
    modules = [*model.modules()]
    before, drawn, mode = Snapshot(modules), all_generators(), _Answers()
    try:
        for m in modules:
            table = _torch.buffers(m)
            table.update({name: None if b is None else b.clone() for name, b in table.items()})
        with torch.random.fork_rng(), torch.no_grad(), mode:
            run(*args, **kwargs)
    finally:
        before.restore()
        restore(drawn)
    return mode.found

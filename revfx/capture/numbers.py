"""Numbers of a model that change from call to call, such as an annealed temperature: inputs of its plans."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from revfx.capture.untraceable import Untraceable


# What takes a number of the model's as it takes a tensor of one element.
LINEAR = frozenset(
    """add sub subtract rsub lerp mul multiply div divide true_divide truediv iadd isub imul itruediv radd rmul
    rdiv""".split()
)


class Numbers:
    """The numbers that a recording carries as tensors: `of` which module and attribute; and what is computed of them
    alone.
    """

    def __init__(self) -> None:
        self.of: dict[tuple[int, str], Tensor] = {}
        self._known: set[int] = set()

    def __contains__(self, t: Tensor) -> bool:
        return id(t) in self._known

    def add(self, t: Tensor) -> None:
        """Count a tensor among them."""
        self._known.add(id(t))

    def carry(self, module: nn.Module, name: str) -> Tensor:
        """Return what stands for the number of that name."""
        t = self.of[id(module), name] = torch.tensor(getattr(module, name), dtype=torch.float64)
        self.add(t)
        return t

    def follow(self, name: str, operands: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        """Note what the operation of that name computes of numbers alone.

        Raises:
            Untraceable: it takes a number otherwise than a tensor of one element.
        """
        others = [t for t in operands if t not in self]
        if len(others) == len(operands):
            return
        if name.strip("_") not in LINEAR or not all(t.is_floating_point() and t.dim() for t in others):
            raise Untraceable(f"`{name}` reads a number of the model that changes from call to call")
        self._known.update(id(t) for t in made if not others)

"""Numbers of a model that change from call to call, such as an annealed temperature: inputs of its plans."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from revfx.capture.untraceable import Untraceable


# What takes a number of the model's as it takes a tensor of one element.
LINEAR = frozenset(
    """add sub subtract rsub lerp mul multiply div divide true_divide truediv iadd isub imul itruediv radd rmul
    rdiv""".split()
)


class Numbers:
    """Numbers recorded as tensors, `of` which module and attribute; `known`: ids, also of what they alone make."""

    def __init__(self) -> None:
        self.of: dict[tuple[int, str], Tensor] = {}
        self.known: set[int] = set()

    def follow(self, name: str, operands: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        """Note what an operation computes of numbers alone; refuse one that takes them otherwise than such a tensor."""
        others = [t for t in operands if id(t) not in self.known]
        if len(others) == len(operands):
            return
        if name.strip("_") not in LINEAR or not all(t.is_floating_point() and t.dim() for t in others):
            raise Untraceable(f"`{name}` reads a number of the model that changes from call to call")
        self.known.update(id(t) for t in made if not others)

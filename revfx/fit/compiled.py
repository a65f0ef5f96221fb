"""Backwards of compiled parts as operators of a step, with costs that are measured outside of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from revfx.engine.whole import Whole
from revfx.parts import CompiledPart


@dataclass(frozen=True)
class PartCall:
    """A call of a compiled part in a step.

    Attributes:
        whole: it, as an operator.
        operands: with views in the place of tensors.
        start, stop: the numbers of autograd's nodes that it made.
    """

    whole: Whole
    operands: Sequence[Any]
    start: int
    stop: int


@dataclass(frozen=True)
class Back:
    """The backward of a call of a compiled part as an operator, of the operands of the call.

    Of a part with several graphs the first backward that runs has the cost of all; the others are a `rest`.
    """

    whole: Whole
    is_rest: bool = False

    def __str__(self) -> str:
        return f"backward of {self.whole}"

    def ready(self, part: CompiledPart, *operands: Any) -> Callable[[], Any]:
        """Return a function that runs it once, and frees the saved tensors on the way."""
        _, leaves, results = self.whole.again(part, operands)
        with torch.no_grad():
            given = [(get_gradient_edge(t), torch.ones_like(t)) for t in results if t.requires_grad]
        del results
        inputs: list[Any] = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
        inputs += [p for p in part.module.parameters() if p.requires_grad]
        edges, gradients = [edge for edge, _ in given], [gradient for _, gradient in given]
        return lambda: torch.autograd.grad(edges, inputs, gradients, allow_unused=True)

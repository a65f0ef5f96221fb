"""A planned model on fake tensors: its forwards drop tensors without elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from revfx import _torch
from revfx.engine.learn import Learning
from revfx.engine.plan import Plan
from revfx.engine.tape import Tape
from revfx.engine.watch import Watching
from revfx.plan.model import PlannedModel


def nothing_real(fake: Tensor) -> Tensor | None:
    """Return no tensor for a fake one."""
    return None


class SimulatedModel(PlannedModel):
    """A planned model that runs on fake tensors.

    Args:
        lossless: see `PlannedModel`.
        real_of: returns the tensor that a fake one stands for, or None.
    """

    def __init__(self, lossless: bool, real_of: Callable[[Tensor], Tensor | None] = nothing_real) -> None:
        super().__init__(lossless)
        self.real_of = real_of

    def new_watcher(self, plan: Plan) -> Watching:
        """Return the watcher of a forward: operators on fake tensors are seen in Python."""
        return Watching(plan)

    def new_recorder(self, model: nn.Module, inputs: Sequence[Tensor]) -> Learning:
        """Return the recorder of a forward; it drops nothing, as nothing can be compared."""
        return Learning(model, inputs)

    def prepare_tape(self, tape: Tape) -> None:
        """Put the real tensors of the model on the tape, in the place of fake ones."""
        found: dict[int, Tensor] = {}
        for value, t in sorted(tape.constants.items()):
            real = self.real_of(t) if _torch.is_fake(t) else t
            if real is not None:
                found[value] = real
        tape.constants = found

"""A planned model on fake tensors: what its forwards would drop, without any numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from revfx import _torch
from revfx.engine import dispatch
from revfx.engine.learn import Learning
from revfx.engine.plan import Plan
from revfx.engine.tape import Tape
from revfx.engine.watch import Watching
from revfx.plan.model import Kind, PlannedModel


def nothing_real(fake: Tensor) -> Tensor | None:
    """Return no tensor, whichever the fake one is."""
    return None


class SimulatedModel(PlannedModel):
    """A planned model that runs on fake tensors.

    Args:
        lossless: see `PlannedModel`.
        real_of: returns the tensor that a fake one stands for, if there is one.
    """

    def __init__(self, lossless: bool, real_of: Callable[[Tensor], Tensor | None] = nothing_real) -> None:
        super().__init__(lossless)
        self.real_of = real_of

    def watching(self, plan: Plan) -> Watching:
        """Return what watches a forward: operators on fake tensors are seen in Python."""
        return Watching(plan)

    def learning(self, model: nn.Module, inputs: Sequence[Tensor]) -> Learning:
        """Return what learns a forward; nothing can be dropped on the way, as nothing can be compared."""
        return Learning(model, inputs)

    def learnt(self, tape: Tape) -> None:
        """Put the numbers of the model's tensors on the tape."""
        found: dict[int, Tensor] = {}
        for value, t in sorted(tape.constants.items()):
            real = self.real_of(t) if _torch.is_fake(t) else t
            if real is not None:
                found[value] = real
        tape.constants = found


class HookedModel(SimulatedModel):
    """A planned model that learns from fake tensors alone, and then runs on real ones under somebody else's hooks.

    What its plan does not drop is left to these hooks, in an order that is the same in each forward.
    """

    def learns(self, kind: Kind | None) -> bool:
        """Return whether the next call of a kind is learnt."""
        return dispatch.on_fakes.get() and super().learns(kind)

    def watching(self, plan: Plan) -> Watching:
        """Return what watches a forward."""
        return Watching(plan, dispatch.hooks_around())

    def forget(self) -> None:
        """Have all kinds of calls learnt again."""
        for kind in self.kinds.values():
            kind.is_due = True

    def _judge(self, kind: Kind, matched: int) -> None:
        """Leave it to those who set the hooks."""

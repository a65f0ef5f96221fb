"""What tells whether tensors that are computed again are those that were there: elements of each, and now and then all.

What the tape does not know are numbers in Python that change from call to call, and code that goes another way. They
show in all elements, or in the first calls; so all bits are summed in these, and in ever fewer later.
"""

from __future__ import annotations

import torch
from torch import Tensor

from revfx import codes
from revfx.errors import NondeterminismWarning, warn
from revfx.fit.needs import Needs
from revfx.fit.tape import Spot
from revfx.layout import is_dense


SOME = 64  # elements of each tensor
JITTER = 1e-3  # relative: what a kernel that is not deterministic may be off by
ALWAYS = 3  # calls, from the first on, in which all bits are summed; later if the number of the call is a power of two


class Witness:
    """What was noted of one step."""

    def __init__(self, call: int) -> None:
        self.whole = call < ALWAYS or call & (call - 1) == 0
        self.before: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.again: list[tuple[int, tuple[Tensor, Tensor | None]]] = []

    def then(self, spot: Spot, t: Tensor) -> None:
        """Note a tensor of the forward."""
        self.before[spot.value] = self._look(t)

    def now(self, spot: Spot, t: Tensor) -> None:
        """Note what is there in its place in the backward."""
        self.again.append((spot.value, self._look(t)))

    def _look(self, t: Tensor) -> tuple[Tensor, Tensor | None]:
        some = _elements(t).clone()
        return some, codes.fingerprint(t)[:1] if self.whole and t.numel() > SOME and is_dense(t) else None

    def compare(self, needs: Needs) -> tuple[dict[int, str], set[int]]:
        """Compare all that was noted, in one read of each device.

        Returns:
            The values that are wrong, each with the text of an error; and those that are right.

        Warns:
            NondeterminismWarning: a tensor is off by rounding.
        """
        noted = [(v, self.before[v], now) for v, now in self.again]
        self.again = []
        wrong: dict[int, str] = {}
        for device in dict.fromkeys(then[0].device for _, then, _ in noted):
            mine = [n for n in noted if n[1][0].device == device]
            differs = torch.stack([_differ(then, now) for _, then, now in mine])
            for (v, then, now), other in zip(mine, differs.tolist(), strict=True):
                text = _judge(needs, v, then[0], now[0]) if other else None
                if text is not None:
                    wrong[v] = text
        return wrong, {v for v, *_ in noted} - wrong.keys()


def _elements(t: Tensor) -> Tensor:
    """Return a view of some elements, complex ones as pairs: across memory, or its longest dimension if not dense."""
    if t.is_complex():
        t = torch.view_as_real(t.resolve_conj())
    if t.dtype.itemsize < 2 and t.dtype.is_floating_point:
        t = t.float()
    n, stride = t.numel(), 1
    if not is_dense(t):
        n, stride = max(zip(t.shape, t.stride(), strict=True))
    return t.as_strided((min(n, SOME),), (max(1, n // SOME) * stride,))


def _differ(then: tuple[Tensor, Tensor | None], now: tuple[Tensor, Tensor | None]) -> Tensor:
    found = (then[0].view(torch.uint8) != now[0].view(torch.uint8)).any()
    return found if then[1] is None or now[1] is None else found | (then[1] != now[1]).any()


def _judge(needs: Needs, value: int, then: Tensor, now: Tensor) -> str | None:
    """Warn of a value that is off by rounding; return the text of an error for any other one."""
    a, b = then.double(), now.double()
    error = ((a - b).norm() / a.norm().clamp_min(1e-300)).item()
    name = f"what {needs.tape.ops[needs.tape.made_by[value] or 0]} computes for the backward"
    if then.dtype.is_floating_point and 0 < error <= JITTER:
        warn(
            f"{name} differs by {error:.1e} (relative) when it is recomputed: a kernel is not reproducible. Gradients"
            " are accurate to this rounding. Call `torch.use_deterministic_algorithms(True)` if every bit matters.",
            NondeterminismWarning,
        )
        return None
    return (
        f"{name} differs by {error:.1e} (relative) when it is recomputed: a number that the forward reads from Python"
        " has changed since it was recorded, or its code took another path. The gradients of this step are wrong; the"
        " next step has a new plan, which keeps this value. Make the number a tensor: an argument or a buffer."
    )

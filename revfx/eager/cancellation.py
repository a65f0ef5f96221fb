"""Where undoing a sum loses the digits of an operand, as what was added to it is so much larger.

Undoing `y = x + h` leaves an error of about eps*|y|, whatever x is. Of a step's sums the largest |y| is read while the
forward runs, and put beside the size that elements of x have; where that says that digits may be gone, the inverse is
tried on the spot, and the cut before the step is kept if an element comes back too wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from revfx import _torch
from revfx.passes.closure import Invert
from revfx.passes.cuts import Step
from revfx.passes.numbers import is_lost, size_of
from revfx.passes.plan import tolerance_of
from revfx.passes.program import Arc, Program


@dataclass(frozen=True, slots=True)
class Sums:
    """The sums that a step's inverses undo, by the operation after which all that these read has been made.

    `held` are the values that have to stay until then though no operation reads them.
    """

    after: Mapping[int, tuple[Arc, ...]]
    held: frozenset[int]

    def lose(self, index: int, env: Mapping[int, Tensor], kept: Mapping[int, Tensor], tolerance: float | None) -> bool:
        """Return whether an inverse that can be tried after operation `index` loses digits that its head had."""
        for arc in self.after.get(index, ()):
            head, *tail = (env[v] if v in env else kept[v] for v in (arc.head, *arc.tail))
            if loses(arc, head, tail, tolerance):
                return True
        return False


NOTHING = Sums({}, frozenset())


def sums_of(program: Program, step: Step) -> Sums:
    """Return the sums that are undone when a step is inverted."""
    after: dict[int, tuple[Arc, ...]] = {}
    held: set[int] = set()
    for arc in (d.arc for d in step.derive if isinstance(d, Invert)):
        if arc.sums and not (arc.exact or arc.grid or arc.barred):
            at = max(step.start, *(program.made_at[v] for v in (arc.head, *arc.tail)))
            after[at] = (*after.get(at, ()), arc)
            held.update(v for v in (arc.head, *arc.tail) if program.last_use[v] < at)
    return Sums(after, frozenset(held))


def loses(arc: Arc, head: Tensor, tail: list[Tensor], tolerance: float | None) -> bool:
    """Return whether `arc` gives an element of its head back with an error that is too large, next to the element and
    to what elements of the head usually are; not looked for in DTensors.
    """
    if head.numel() == 0 or _torch.is_fake(head) or not all(_torch.is_plain(t) for t in (head, *tail)):
        return False
    head, tail = head.detach(), [t.detach() for t in tail]
    with torch.no_grad():
        # through a mask several results may be read, and what was added to them on the way
        added = [t for t in tail if t.dtype == head.dtype] if arc.partial else tail[:1]
        ends = [end for t in added if t.numel() for end in torch.aminmax(_real(t))]
        size, *sizes = torch.stack((size_of(head), *ends)).abs().tolist()
        limit = tolerance_of(head.dtype, tolerance)
        if all(torch.finfo(head.dtype).eps * most <= limit * size for most in sizes):  # not where any is not a number
            return False
        return bool(is_lost(arc.solve(*tail), head, limit))


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t

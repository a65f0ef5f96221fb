"""A region of a program as one owner runs it: what the forward does around each operation, found once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from revfx import _torch
from revfx.codes import Codec
from revfx.errors import RangeError, RevfxWarning
from revfx.passes._torch import NO_ROOM
from revfx.passes.closure import Derivation, Invert
from revfx.passes.composed import composed_all, rounds
from revfx.passes.cuts import Step
from revfx.passes.grid import limit
from revfx.passes.plan import Instruction, asked_for, deep_in_half_precision, inverted_from, is_checked
from revfx.passes.program import Arc, Program
from revfx.passes.regions import Region


if TYPE_CHECKING:
    from revfx.eager.regeneration import Regeneration


Env = dict[int, Tensor]


class Watch:
    """What looks on while one run of a region goes on; this one does nothing."""

    def made(self, run: Regeneration, value: int, tensor: Tensor) -> None:
        """Look at a value that the forward reads or makes."""

    def regenerated(self, run: Regeneration, derivation: Derivation, value: int, tensor: Tensor) -> None:
        """Look at a value that the backward derives, before anything reads it."""


watching: ContextVar[Callable[[Regeneration], Watch | None]] = ContextVar("revfx_watching", default=lambda run: None)


@dataclass(eq=False, slots=True)
class Handle:
    """Stands for the k-th tensor that autograd saved during operation `op`; `value` where that is a program value."""

    op: int
    k: int
    state: Regeneration
    version: int
    value: int | None = None
    spoilt: bool = False  # the operation wrote to it after it was saved, which only matters if it is asked for


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the forward does around the operations of one step, found once.

    `codes` are the inverses whose heads get a code, by the operation after which all that they read is there; what they
    read stays until the step ends, and is let go then (`late`); `dead` values behind each operation. `exits` are the
    values behind each operation whose shapes must be as planned. `images`: from which value of the exit one of the
    entry comes back, in steps whose entry is `sampled`.
    """

    step: Step
    anchored: bool
    sampled: bool
    images: Mapping[int, int]
    codes: Mapping[int, tuple[Arc, ...]]
    late: tuple[int, ...]
    dead: tuple[tuple[int, ...], ...]
    exits: tuple[tuple[int, ...], ...]


@dataclass(eq=False)
class RegionPlan:
    """A region of a program as one owner runs it, with the schedules made so far, one per step, direction and need.

    `lossless`: what inverses miss is coded, and results must be the same to the last bit. `anchors` are the cuts that
    are kept as the user wishes, one for every `anchor_every` couplings. `kept` is the number of cuts that the latest
    forward kept, `coded` the bytes of its codes; `declared` says of values whose inverse gives them, where that may be
    wrong; `warned` is set once rounding was warned of, and `warning` is what the first run has to say.
    """

    program: Program
    region: Region
    lossless: bool = True
    anchor_every: int | None = None
    schedules: dict[object, tuple[Instruction, ...]] = field(default_factory=dict[object, tuple[Instruction, ...]])
    step_of: dict[int, int] = field(default_factory=dict[int, int])
    codecs: dict[int, Codec] = field(default_factory=dict[int, Codec])
    kept: int = 0
    coded: int = 0
    warned: bool = False
    declared: dict[int, str] = field(default_factory=dict[int, str])

    def __post_init__(self) -> None:
        self.region = replace(self.region, steps=composed_all(self.program, self.region.steps))
        self.anchors = asked_for(self.region.steps, self.anchor_every)
        self.on_grid = any(v.grid is not None for v in self.program.values)
        self.warning = None if self.lossless else deep_in_half_precision(self.program, self.region.steps, self.anchors)
        for number, step in enumerate(self.region.steps):
            self.step_of.update(dict.fromkeys(range(step.start, step.stop), number))
        self.steps = [self._step(number, step) for number, step in enumerate(self.region.steps)]

    def make_room(self) -> None:
        """Have all codes measured again at the next call, as some escapes found no room, and say so once."""
        for codec in self.codecs.values():
            codec.due = True
        if not self.warned:
            self.warned = True
            warnings.warn(NO_ROOM, RevfxWarning, stacklevel=2)

    def distrust(self, value: int) -> None:
        """Say, once for each operation, that the inverse that is declared for it is no good, if `value` has such."""
        if (op := self.declared.get(value)) is not None:
            self.declared = {v: other for v, other in self.declared.items() if other != op}
            warnings.warn(
                f"the inverse of {op} does not give back what went in, or not nearly, or fails: that is kept, as"
                " without revfx, and gradients are right",
                RevfxWarning,
                stacklevel=2,
            )

    def _step(self, number: int, step: Step) -> StepPlan:
        program, last, values = self.program, self.program.last_use, self.program.values
        anchored = number in self.anchors
        codes: dict[int, tuple[Arc, ...]] = {}
        held: set[int] = set()
        inverts = [d for d in step.derive if isinstance(d, Invert) and rounds(d.arc)] if self.lossless else []
        for op, arc in ((program.ops[d.op], d.arc) for d in inverts):
            at = max(step.start, *(program.made_at[v] for v in (arc.head, *arc.tail)))
            codes[at] = (*codes.get(at, ()), arc)
            held.update(v for v in (arc.head, *arc.tail) if last[v] < at)
            self.codecs[arc.head] = Codec(wide=arc.coded)
            if arc.declared:
                self.declared[arc.head] = f"`{arc.declared}` ({op.where})"
        ops = [program.ops[i] for i in range(step.start, step.stop)]
        dead = [
            tuple(v for v in dict.fromkeys((*op.ins, *op.outs)) if last[v] <= i and not (v in held or values[v].source))
            for i, op in enumerate(ops, step.start)
        ]
        exits = tuple(tuple(v for v in op.outs if v in step.exit) for op in ops)
        sampled = not self.lossless and is_checked(number, len(self.region.steps))
        images = inverted_from(step) if sampled else {}
        return StepPlan(step, anchored, sampled, images, codes, tuple(held), tuple(dead), exits)


# --- the range of a grid: what lies on one must stay where its multiples are exact
class Ranges:
    """The largest magnitudes of the values of one run that lie on a grid, read all at once when it ends."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.extremes: dict[int, tuple[Tensor, Tensor]] = {}

    def note(self, v: int, t: Tensor) -> None:
        """Note that `t` is value `v`."""
        if self.program.values[v].grid is not None and t.numel() and not _torch.is_fake(t):
            self.extremes[v] = torch.aminmax(t.detach())  # NaN if any element is

    def close(self) -> None:
        """Raise a RangeError where a value has left its grid, or is not finite."""
        if not self.extremes or _torch.in_functorch_transform():  # there are no numbers to be read there
            return
        both = torch.stack([t.double() for pair in self.extremes.values() for t in pair])
        sizes = dict(zip(self.extremes, both.view(-1, 2).abs().amax(1).tolist(), strict=True))
        self.extremes = {}
        for v, size in sizes.items():
            value = self.program.values[v]
            k = value.grid or 0
            if not size < limit(value.dtype, k):
                raise RangeError(_beyond(self.program, v, size, k))


def _beyond(program: Program, v: int, size: float, k: int) -> str:
    value, made = program.values[v], program.made_at[v]
    where = (program.ops[made].where or "an unknown place") if made >= 0 else "an input"
    if not math.isfinite(size):
        return f"grid={k}: `{value.name}` ({where}) is not finite, so it can't be regenerated bit for bit."
    fits = next((coarser for coarser in range(k, 0, -1) if 2 * size < limit(value.dtype, coarser)), None)
    remedy = f"use grid={fits}" if fits else "scale the activations down, or do without `grid`"
    return (
        f"grid={k}: `{value.name}` ({where}) reaches {size:.4g}, and a grid of steps 2^-{k} has room below"
        f" {limit(value.dtype, k):.4g} in {value.dtype}: {remedy}."
    )

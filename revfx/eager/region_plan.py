"""A region of a program as one owner runs it: what the forward does around each operation, found once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from revfx.codes import Codec
from revfx.errors import NondeterminismWarning, NotConvertedWarning, warn
from revfx.passes._torch import OVERFLOWED
from revfx.passes.closure import Derivation, Invert
from revfx.passes.composed import composed_all, rounds
from revfx.passes.cuts import Step
from revfx.passes.program import Arc, Program
from revfx.passes.regions import Region
from revfx.passes.schedule import Instruction


if TYPE_CHECKING:
    from revfx.eager.regeneration import Regeneration


Env = dict[int, Tensor]
CHECKED_STEPS = 32  # of a region without codes, evenly spaced, so that checks are flat in depth, too


class Watch:
    """What looks on while one run of a region goes on; this one does nothing."""

    def made(self, run: Regeneration, value: int, tensor: Tensor) -> None:
        """Look at a value that the forward reads or makes."""

    def regenerated(self, run: Regeneration, derivation: Derivation, value: int, tensor: Tensor) -> None:
        """Look at a value that the backward derives, before anything reads it."""


region_observer: ContextVar[Callable[[Regeneration], Watch | None]] = ContextVar(
    "revfx_region_observer", default=lambda run: None
)


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
    values behind each operation whose shapes must be as planned. `checked`: results of its functions are compared
    with those of the re-run.
    """

    step: Step
    checked: bool
    codes: Mapping[int, tuple[Arc, ...]]
    late: tuple[int, ...]
    dead: tuple[tuple[int, ...], ...]
    exits: tuple[tuple[int, ...], ...]


@dataclass(eq=False)
class RegionPlan:
    """A region of a program as one owner runs it, with the schedules made so far, one per step, direction and need.

    `lossless`: all inverses that round are coded, and results must be the same to the last bit; else codes are for
    inverses that divide by data, saturate or are declared. `kept` is the number of cuts that the latest forward kept,
    `coded` the bytes of its codes; `declared`: for each value that a declared inverse gives, which may be wrong, the
    operation; `warned` is set once rounding was warned of.
    """

    program: Program
    region: Region
    lossless: bool = True
    schedules: dict[object, tuple[Instruction, ...]] = field(default_factory=dict[object, tuple[Instruction, ...]])
    step_of: dict[int, int] = field(default_factory=dict[int, int])
    codecs: dict[int, Codec] = field(default_factory=dict[int, Codec])
    kept: int = 0
    coded: int = 0
    warned: bool = False
    declared: dict[int, str] = field(default_factory=dict[int, str])

    def __post_init__(self) -> None:
        self.region = replace(self.region, steps=composed_all(self.program, self.region.steps))
        for number, step in enumerate(self.region.steps):
            self.step_of.update(dict.fromkeys(range(step.start, step.stop), number))
        self.steps = [self._step(number, step) for number, step in enumerate(self.region.steps)]

    def make_room(self) -> None:
        """Measure all codes again at the next call, as the buffer of one overflowed, and warn once."""
        for codec in self.codecs.values():
            codec.due = True
        if not self.warned:
            self.warned = True
            warn(OVERFLOWED, NondeterminismWarning)

    def distrust(self, value: int) -> None:
        """Warn, once for each operation, that the declared inverse of `value` is wrong, if there is one."""
        if (op := self.declared.get(value)) is not None:
            self.declared = {v: other for v, other in self.declared.items() if other != op}
            text = (
                f"The inverse of {op} does not give back its input, or it fails. The input is kept, as without revfx,"
                " and gradients are exact. Correct this inverse, or take back its declaration."
            )
            warn(text, NotConvertedWarning)

    def _step(self, number: int, step: Step) -> StepPlan:
        program, last, values = self.program, self.program.last_use, self.program.values
        codes: dict[int, tuple[Arc, ...]] = {}
        held: set[int] = set()
        inverts = [d for d in step.derive if isinstance(d, Invert) and self._needs_code(d.arc)]
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
        checked = self.lossless or number % max(1, len(self.region.steps) // CHECKED_STEPS) == 0
        return StepPlan(step, checked, codes, tuple(held), tuple(dead), exits)

    def _needs_code(self, arc: Arc) -> bool:
        return rounds(arc) and (self.lossless or arc.measured or arc.coded or bool(arc.declared))

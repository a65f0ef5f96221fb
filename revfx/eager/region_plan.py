"""A region of a program as one owner runs it: what the forward does around each operation, found once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from revfx.eager import numerics
from revfx.eager.cancellation import NOTHING, Sums, sums_of
from revfx.passes.closure import Derivation
from revfx.passes.cuts import Step
from revfx.passes.plan import Instruction, asked_for, deep_in_half_precision
from revfx.passes.program import Program
from revfx.passes.regions import Region


if TYPE_CHECKING:
    from revfx.eager.regeneration import Regeneration


Env = dict[int, Tensor]


class Watch(Protocol):
    """What looks on while one run of a region goes on."""

    def made(self, run: Regeneration, value: int, tensor: Tensor) -> None:
        """Look at a value that the forward reads or makes."""
        ...

    def regenerated(self, run: Regeneration, derivation: Derivation, value: int, tensor: Tensor) -> None:
        """Look at a value that the backward derives, before anything reads it."""
        ...


watching: ContextVar[Callable[[Regeneration], Watch] | None] = ContextVar("revfx_watching", default=None)


@dataclass(eq=False, slots=True)
class Handle:
    """Stands for the k-th tensor that autograd saved during operation `op`; `value` where that is a program value.

    `spoilt`: the operation wrote to the tensor after autograd had saved it, which only matters if it is asked for.
    """

    op: int
    k: int
    state: Regeneration
    version: int
    value: int | None = None
    spoilt: bool = False


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the forward does around the operations of one step, found once.

    `sums` are looked at, `asked` values stay until the step ends, `late` ones are let go then, `dead` ones behind each
    operation. `unseen`: nothing that comes back tells of the step. `exits` are the values behind each operation whose
    shapes must be as planned.
    """

    step: Step
    anchored: bool
    sampled: bool
    sums: Sums
    asked: frozenset[int]
    late: tuple[int, ...]
    dead: tuple[tuple[int, ...], ...]
    exits: tuple[tuple[int, ...], ...]


@dataclass(eq=False)
class RegionPlan:
    """A region of a program as one owner runs it, with the schedules made for it so far (one per step, direction and
    need).

    `anchors` are the cuts that are kept as the user wishes, one for every `anchor_every` couplings. `kept` is the
    number of cuts that the latest forward kept, `calls` counts forwards; `warned` is set once drift was warned of, and
    `warning` is what the first run has to say.
    """

    program: Program
    region: Region
    tolerance: float | None = None
    anchor_every: int | None = None
    schedules: dict[object, tuple[Instruction, ...]] = field(default_factory=dict[object, tuple[Instruction, ...]])
    step_of: dict[int, int] = field(default_factory=dict[int, int])
    kept: int = 0
    warned: bool = False
    calls: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        self.anchors = asked_for(self.region.steps, self.anchor_every)
        self.exact = any(v.grid is not None for v in self.program.values)
        self.warning = deep_in_half_precision(self.program, self.region.steps, self.anchors)
        for number, step in enumerate(self.region.steps):
            self.step_of.update(dict.fromkeys(range(step.start, step.stop), number))
        self.steps = [self._step(number, step) for number, step in enumerate(self.region.steps)]

    def _step(self, number: int, step: Step) -> StepPlan:
        program, last, alive = self.program, self.program.last_use, {*self.program.outputs}
        anchored = number in self.anchors
        sums = NOTHING if number == 0 or anchored else sums_of(program, step)
        asked = frozenset(numerics.asked_of(step) | sums.held)
        ops = [program.ops[i] for i in range(step.start, step.stop)]
        dead = [
            tuple(
                v
                for v in dict.fromkeys((*op.ins, *op.outs))
                if last[v] <= index and not (v in alive or v in asked or program.values[v].source)
            )
            for index, op in enumerate(ops, step.start)
        ]
        exits = [tuple(v for v in op.outs if v in step.exit) for op in ops]
        late = tuple(v for v in asked if last[v] < step.stop)
        sampled = numerics.is_checked(number, len(self.region.steps))
        return StepPlan(step, anchored, sampled, sums, asked, late, tuple(dead), tuple(exits))

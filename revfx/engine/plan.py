"""Plans: the units that the forward of a model is matched with, and the state that is kept about them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from revfx import _fsdp, _torch
from revfx.codes import Codec
from revfx.engine import dispatch
from revfx.engine.checkers import Checker, checkers_of
from revfx.engine.collectives import groups_of
from revfx.engine.unit import Unit
from revfx.passes.facts import fact_holds


MAX_UNITS = 64  # in a plan; the oldest make room for new ones


@dataclass(eq=False)
class UnitPlan:
    """A unit with its checkers.

    Attributes:
        kept: slots that are never dropped, as their replays gave other bits.
        is_broken: whether nothing is dropped, as the backward replay gave other bits.
        groups: the process groups that run its collectives; they prove the unit together.
        is_fallback: whether it may begin anywhere once a forward has left the recorded path.
        is_tried: whether a backward has compared all tensors that it gives.
        may_fail: whether it once began as expected, and then the forward took another path.
        verified: by slot, offset, strides and version, the storage of a tensor for which the unit's facts hold.
    """

    unit: Unit
    checkers: Sequence[Checker] = ()
    groups: Sequence[Any] = ()
    kept: set[int] = field(default_factory=set[int])
    is_broken: bool = False
    is_fallback: bool = False
    is_tried: bool = False
    may_fail: bool = False
    verified: dict[Any, weakref.ref[Any]] = field(default_factory=dict[Any, "weakref.ref[Any]"])

    def __post_init__(self) -> None:
        self.checkers = checkers_of(self.unit)
        self.groups = groups_of(self.unit)

    def facts_hold(self, tensor: Callable[[int], Tensor | None]) -> bool:
        """Return whether tensors of a call, by slot, have the elements that inverses rely on."""
        for slot, fact in self.unit.facts if not dispatch.on_fakes.get() else ():
            t = tensor(slot)
            if t is None or _fsdp.is_freed(t):
                return False
            storage, key = t.untyped_storage(), (slot, t.storage_offset(), t.stride(), _torch.version(t))
            known = self.verified.get(key)
            if known is None or known() is not storage:
                if not fact_holds(fact, t):
                    return False
                self.verified[key] = weakref.ref(storage)
        return True


NEVER = 2**62  # an operator number that no forward reaches


@dataclass(eq=False)
class Path:
    """A sequence of units that a forward runs through.

    Attributes:
        sequence: the units in order.
        chains: by position, the number of the unit's chain.
        firsts: by position, the number of the operator at which the unit begins; empty if it may begin anywhere.
        dropped_at: counts of operators after which autograd saves a tensor that the plan drops; hooks are installed for
            these alone. Empty if units may begin anywhere.
        most: the most units that matched in one forward.
    """

    sequence: list[UnitPlan] = field(default_factory=list[UnitPlan])
    chains: list[int] = field(default_factory=list[int])
    firsts: list[int] = field(default_factory=list[int])
    dropped_at: frozenset[int] = frozenset()
    most: int = 0

    def site(self, u: UnitPlan, position: int) -> int:
        """Return the position of a unit in the sequence: the first one from `position` on, or the first one."""
        for start in (position, 0):
            for at in range(start, len(self.sequence)):
                if self.sequence[at] is u:
                    return at
        return position

    def first(self, position: int) -> int:
        """Return the number of the operator at which a unit begins: -1 if it may anywhere, `NEVER` without one."""
        if not self.firsts:
            return -1
        return self.firsts[position] if position < len(self.firsts) else NEVER

    def chain(self, site: int) -> int:
        """Return the number of the chain of the unit at a position in the sequence."""
        return self.chains[site] if site < len(self.chains) else 0


@dataclass(eq=False)
class Plan:
    """The units of one kind of call of a model, and the state that their calls share.

    Attributes:
        lossless: whether replays give the same bits; otherwise inverses are accurate to rounding.
        has_varied: whether an expected unit began, and then another one ran.
        copies_ends: whether inputs or outputs of a forward were written to, so that calls hold copies of them.
        notes_settings: whether the settings of kernels change during a forward, so that each call notes them.
        path: the path of the forward that was recorded last.
        others: other paths, to which a forward may switch.
        units: all units, by their keys.
        starts: by an operator, the units that begin with it.
        codecs: by the position of a unit in the sequence, the unit, and the number of an inverse.
        proven: calls whose replays gave the same bits: the position (-1 for units without couplings, which prove each
            other), the unit, and by inverse whether its value is held in the place of a code.
        distrusted: declared inverses that are wrong, as text.
        reasons: sentences about tensors that are never dropped.
    """

    lossless: bool = True
    has_varied: bool = False
    copies_ends: bool = False
    notes_settings: bool = False
    path: Path = field(default_factory=Path)
    others: list[Path] = field(default_factory=list[Path])
    units: dict[Any, UnitPlan] = field(default_factory=dict[Any, UnitPlan])
    starts: dict[Any, list[UnitPlan]] = field(default_factory=dict[Any, "list[UnitPlan]"])
    codecs: dict[tuple[int, UnitPlan, int], Codec] = field(default_factory=dict[Any, Codec])
    proven: set[tuple[int, UnitPlan, tuple[bool, ...]]] = field(default_factory=set[Any])
    distrusted: set[str] = field(default_factory=set[str])
    reasons: dict[str, None] = field(default_factory=dict[str, None])

    @property
    def sequence(self) -> list[UnitPlan]:
        """The units in the order of the forward that was recorded last."""
        return self.path.sequence

    def learn(self, units: Sequence[Unit], chains: Sequence[int], fallback: Sequence[Unit] = ()) -> None:
        """Add the units of a forward, with the number of the chain of each; equal ones are one.

        Args:
            units: those of the sequence.
            chains: of each, the number of its chain.
            fallback: units for forwards that leave the path; see `UnitPlan.is_fallback`.
        """
        self.path = Path([self._add(unit) for unit in units], [*chains], most=len(units))
        for known in () if self.others else self.units.values():
            known.is_fallback = False
        for unit in fallback:
            self._add(unit).is_fallback = True
        self._index()

    def _add(self, unit: Unit) -> UnitPlan:
        key = unit.key
        known = self.units.pop(key, None) or UnitPlan(unit)
        self.units[key] = known  # the newest last
        return known

    def _index(self) -> None:
        used = {unit for path in (self.path, *self.others) for unit in path.sequence}
        while len(self.units) > MAX_UNITS and next(iter(self.units.values())) not in used:
            del self.units[next(iter(self.units))]
        self.starts = {}
        for known in self.units.values():
            self.starts.setdefault(known.unit.ops[0].func, []).append(known)

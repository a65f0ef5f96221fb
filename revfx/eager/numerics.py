"""Where rounding would grow too much, or a factor comes too near to zero, a cut is kept instead of regenerated.

Inverting `v = c*v + ...` multiplies rounding errors by 1/|c|. For factors that are data the root mean square of 1/|c|
over the elements is measured while the forward runs. What a rounding error has grown to along each stream since the
last kept cut, times the dtype's eps, may reach a tolerance (default sqrt(eps)), less a margin; a factor whose
smallest magnitude lies under the same tolerance, or that is not finite, is not divided by at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from revfx import _torch
from revfx.eager import dtensor
from revfx.passes.cuts import Step
from revfx.passes.numbers import (
    come_back,
    is_more,
    made_numbers,
    magnitudes,
    repeated_numbers,
    shared_numbers,
    sizes,
    unchanged,
    uniform,
)
from revfx.passes.plan import (
    GARBAGE as GARBAGE,
    MARGIN,
    SAMPLE as SAMPLE,
    amplification,
    is_checked as is_checked,
    precision,
    sample as sample_of,
    scales,
)
from revfx.passes.program import Arc, Program
from revfx.passes.regions import Region


ZEROS = 16  # times eps: the share of exact zeros that a value without atoms may show by chance

MOST = 1 << 14  # numbers of a region that are looked for later

DRIFT = 16.0  # times sqrt(eps): a regenerated cut that is off by more is warned of, whatever made the error grow


def sample(t: Tensor, most: int = SAMPLE) -> Tensor:
    """Return a copy of about `most` elements of what this process holds of `t`."""
    found = [sample_of(dtensor.piece(part), most) for part in _torch.parts(dtensor.arrived(t))]
    return found[0] if len(found) == 1 else torch.cat([torch.empty(0, device=t.device), *(s.flatten() for s in found)])


def drift(now: Tensor, before: Tensor, image: Tensor | None = None) -> float:
    """Return |now - before| / |before| of two samples, or over `image` where that is larger: the norm of a sample of
    what it was computed back from. 0 where `before` was not finite, or holds whole numbers.
    """
    if not precision(before.dtype) or before.numel() == 0 or _torch.is_fake(before):
        return 0.0
    scale = before.norm() if image is None else torch.maximum(before.norm(), image)
    if now.shape != before.shape:  # a DTensor that came back spread in another way
        return 0.0
    error, scale = torch.stack(((now - before).norm(), scale)).tolist()
    if not math.isfinite(scale):
        return 0.0
    return math.inf if math.isnan(error) else error / scale if scale else error


def asked_of(step: Step) -> set[int]:
    """Return the values that are looked at when a step ends: measured factors, and what may have atoms."""
    factors = {int(a.factor or 0) for a in step.arcs if a.measured}
    return factors.union(*((a.head, a.tail[0]) for a in step.arcs if a.suspect))


class Growth:
    """How much regenerating has amplified rounding errors since the last kept cut, per value of the current cut.

    Also of which values the step before `changed` all elements, and which of these were seen to have no atoms (`clean`,
    see `_holds_atoms`): what is added to such a value leaves it so. Of those that have some, `unchanged` has the ones
    that their step left as they were, which need no inverse (as where a function ends in a layer that starts as zeros).
    What was there before `returns` where what was added to it is taken off again.
    """

    def __init__(self, tolerance: float | None, returns: Returns) -> None:
        self.tolerance = tolerance
        self.returns = returns
        self.growth: dict[int, float] = {}
        self.clean: set[int] = set()
        self.changed: set[int] = set()
        self.unchanged: set[int] = set()

    def close(
        self, step: Step, env: Mapping[int, Tensor], lower: Mapping[int, Tensor], replayed: bool, lost: bool = False
    ) -> tuple[bool, bool]:
        """Return (the step must not be inverted, the cut after it must be kept); `replayed` steps are never inverted
        anyway.

        `env` holds the values after the step and those that are `asked_of` it, `lower` those of its entry. `lost`: the
        step holds a sum that can't be undone (see `revfx.eager.cancellation`).
        """
        clean = self._stays_clean(step, {**env, **lower}) and not lost
        if replayed or not step.arcs:
            self.growth = {} if replayed else {v: self.growth.get(v, 1.0) for v in step.exit}
            return False, False
        eps = max((precision(env[v].dtype) for v in step.exit), default=0.0)
        tolerance = self.tolerance if self.tolerance is not None else eps**0.5
        measured: dict[tuple[int, bool], float] = {}
        for arc in step.arcs:
            if arc.measured:
                index = int(arc.factor or 0)
                fake = _torch.is_fake(env[index])  # then as is usual for such a factor
                growth, least = (1 / arc.typical, 1.0) if fake else _measure(env[index], arc.reciprocal)
                if not least >= tolerance:  # also when it is NaN
                    clean = False
                    break
                measured[arc.scaled_by] = growth
        if not clean:
            self.growth = {}
            return True, False
        self.growth = amplification(step, self.growth, measured)
        if MARGIN * max(self.growth.values(), default=1.0) * eps > tolerance and max(self.growth.values()) > 1.0:
            self.growth = {}
            return False, True
        return False, False

    def _stays_clean(self, step: Step, held: Mapping[int, Tensor]) -> bool:
        """Return whether every suspect head of the step holds no atoms, or was left unchanged."""
        good = True
        parts: dict[int, list[int]] = {}
        for arc in step.arcs:
            for value in arc.tail if arc.exact else ():
                parts.setdefault(value, []).append(arc.head)
        for arc in reversed(step.arcs):
            for value in arc.tail if arc.exact else ():
                if all(h in self.changed or h in self.clean for h in parts[value]):
                    self.changed.add(value)
            result = arc.tail[0] if not arc.exact and not arc.partial else None
            if result is not None and _may_return(arc):
                arc = replace(arc, cancels=arc.cancels or self.returns.note(result, held[arc.head], held.get(result)))
            if arc.suspect and arc.head not in self.clean:
                head, after = held[arc.head], held.get(arc.tail[0])
                changed = arc.head in self.changed
                back = arc.head in self.returns.found
                alone = arc.apart and not changed
                holds = _holds_atoms(head) or alone or (arc.told is not None and (back or _repeats(head, changed)))
                if not holds and (changed or arc.told is None):
                    self.clean.add(arc.head)
                elif result is not None and self._adds_freshly(arc, held) and _changes_all(arc, head, after):
                    self.changed.add(result)
                if holds and _same(head, after):
                    self.unchanged.add(arc.head)
                elif holds:
                    good = False
                if arc.head not in self.clean:
                    continue
            if result is None and not arc.partial:
                self.clean.update(arc.tail if arc.head in self.clean else ())
            elif result is not None and not arc.cancels:
                self.clean.add(result)
        return good

    def _adds_freshly(self, arc: Arc, held: Mapping[int, Tensor]) -> bool:
        """Return whether what an arc adds holds no number of the data, and is no part of the head."""
        added = held.get(arc.tail[1]) if len(arc.tail) == 2 else None
        seen = added is not None and added.shape == held[arc.head].shape
        return (arc.fresh or (seen and (arc.tail[1] in self.changed or arc.tail[1] in self.clean))) and not arc.cancels


class Returns:
    """Which values were `found` to hold again, but for rounding, numbers that were there before.

    An inverse gives them with another rounding, and what cancels but for that is as likely above zero as below it.
    They `matter` in regions where something tells numbers of the data apart.
    """

    def __init__(self, program: Program, region: Region) -> None:
        self.matter = any(_may_return(arc) for step in region.steps for arc in step.arcs)
        self.scales = scales(program, region.start, region.stop) if self.matter else {}
        self.before = torch.empty(0, device="cpu")
        self.found: set[int] = set()

    def remember(self, value: int, t: Tensor) -> None:
        """Add the numbers of `value`, which is `t`, to those that were there before, until the forward ends."""
        if self.matter and _can_be_read(t, whole=True) and self.before.numel() < MOST:
            numbers = magnitudes(t.detach()).cpu() / self.scales.get(value, 1.0)
            self.before = torch.cat([self.before, numbers]).sort().values

    def forget(self) -> None:
        """Look for nothing any more."""
        self.matter, self.before = False, self.before[:0].clone()

    def note(self, value: int, head: Tensor, after: Tensor | None) -> bool:
        """Return whether `value`, which is `after` and was made of `head`, does."""
        if after is None or not self.before.numel() or not (_can_be_read(head) and _can_be_read(after)):
            return False
        if not after.numel():
            return False
        seen, eps = sizes(after.detach(), head.detach()).cpu(), torch.finfo(after.dtype).eps
        if any(come_back(self.before, seen, eps, scale) for scale in {1.0, self.scales.get(value, 1.0)}):
            self.found.add(value)
        return value in self.found


def _may_return(arc: Arc) -> bool:
    """Return whether an arc's result may hold again what its head once held, and that matters."""
    return arc.suspect and arc.told is not None and not arc.follows


def _can_be_read(t: Tensor, whole: bool = False) -> bool:
    """Return whether numbers are looked for in `t`, which may be `whole` ones; not in DTensors."""
    right = t.is_floating_point() or (whole and not t.is_complex())
    return right and _torch.is_plain(t) and not _torch.is_fake(t)


def _same(a: Tensor, b: Tensor | None) -> bool:
    if b is None or a.dtype != b.dtype or not all(_torch.is_plain(t) and not _torch.is_fake(t) for t in (a, b)):
        return False
    return torch.equal(a, b)


def _changes_all(arc: Arc, head: Tensor, after: Tensor | None) -> bool:
    """Return whether a step leaves as they were no more elements of a value than chance has it."""
    if after is None or not _can_be_read(head):
        return True
    if (head.shape, head.dtype) != (after.shape, after.dtype):
        return True
    after, factor = after.detach(), 1.0 if arc.measured else float(arc.factor or 1.0)
    return not is_more(unchanged(after, head.detach(), factor), after)


def _repeats(t: Tensor, changed: bool) -> bool:
    """Return whether more elements of `t` equal others than chance has it.

    Where it was `changed` some are equal as the same was computed for them, as at the borders of an image. Then only a
    row or channel that holds one number counts, of which a normalisation makes zeros.
    """
    if not _can_be_read(t):
        return False
    t = t.detach()
    if changed:
        return bool(uniform(t))
    return any(int(found) > chance for found, chance in (repeated_numbers(t), shared_numbers(t)))


def _holds_atoms(t: Tensor) -> bool:
    """Return whether more elements of `t` than chance has it are exactly zero, or other numbers that data are made of,
    which a function of which nothing is known may tell from their neighbours.
    """
    if _torch.is_fake(t):
        return False
    found = _torch.parts(dtensor.arrived(t.detach()))
    return not found or any(map(_atoms_of, found))


def _atoms_of(t: Tensor) -> bool:
    if not (t.is_floating_point() or t.is_complex()):  # what a class with its own ways makes of it can't be known
        return True
    made, chance = made_numbers(t) if t.is_floating_point() else (torch.zeros_like(torch.count_nonzero(t)), 0.0)
    others, found = dtensor.numbers(torch.count_nonzero(t), made)
    return t.numel() - others > ZEROS * torch.finfo(t.dtype).eps * t.numel() or found > chance


def _measure(factor: Tensor, reciprocal: bool) -> tuple[float, float]:
    """Return (root mean square of 1/|c|, smallest |c|) of c = factor, or of c = 1/factor."""
    if factor.numel() == 0:
        return 1.0, 1.0
    f = factor.detach().abs().to(torch.float64 if factor.dtype == torch.float64 else torch.float32)
    if reciprocal:
        growth, least = f.square().mean().sqrt(), f.amax().reciprocal()
    else:
        growth, least = f.reciprocal().square().mean().sqrt(), f.amin()
    growth, least = dtensor.numbers(growth, least)
    return growth, least if growth == growth and growth != float("inf") else float("nan")

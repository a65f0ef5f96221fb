"""What is compared while regions run: samples and checksums of regenerated cuts, and the range of a grid."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from revfx import _torch
from revfx.eager import numerics
from revfx.errors import RangeError, RegenerationError, RevfxWarning
from revfx.passes.grid import checksum, limit
from revfx.passes.plan import precision
from revfx.passes.program import Program


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
        """Raise where a value has left its grid.

        Raises:
            RangeError: a value has left the grid, or is not finite.
        """
        if not self.extremes or _torch.in_functorch_transform():  # there are no numbers to be read there
            return
        both = torch.stack([t.double() for pair in self.extremes.values() for t in pair])
        sizes = both.view(-1, 2).abs().amax(1).tolist()
        values = [*self.extremes]
        self.extremes = {}
        for v, size in zip(values, sizes, strict=True):
            value = self.program.values[v]
            k = value.grid or 0
            if not size < limit(value.dtype, k):
                raise RangeError(_beyond(self.program, v, size, k))


Metas = Sequence[tuple[Any, ...]]  # a shape and a dtype each


def changed(saved: Metas, again: Metas, returned: Metas, returned_again: Metas) -> str | None:
    """Return what a call did otherwise when it was run again: in the tensors that it saved, or in the shapes that it
    returned.

    None where it did the same.
    """
    if len(saved) != len(again):
        return f"{len(saved)} saved in the forward, {len(again)} now"
    for number, (then, now) in enumerate(zip(saved, again, strict=True), 1):
        if then != now:
            described = [f"{dtype}{list(shape)}" for shape, dtype in (then, now)]
            return f"of {len(saved)} saved, number {number} was {described[0]} in the forward and is {described[1]} now"
    for then, now in zip(returned, returned_again, strict=True):
        if then != now:
            return f"it returned the shape {list(then)} in the forward and {list(now)} now"
    return None


def _beyond(program: Program, v: int, size: float, k: int) -> str:
    value, made = program.values[v], program.made_at[v]
    where = (program.ops[made].where or "an unknown place") if made >= 0 else "an input"
    if not math.isfinite(size):
        return f"exact={k}: `{value.name}` ({where}) is not finite, so it can't be regenerated bit for bit."
    fits = k
    while fits > 0 and not 2 * size < limit(value.dtype, fits):
        fits -= 1
    remedy = f"use exact={fits}" if fits > 0 else "scale the activations down, or do without `exact`"
    return (
        f"exact={k}: `{value.name}` ({where}) reaches {size:.4g}, and a grid of steps 2^-{k} has room below"
        f" {limit(value.dtype, k):.4g} in {value.dtype}: {remedy}."
    )


FEW = 4  # elements of what autograd saved


class Checksums:
    """Of the lowest cut of each stretch that is regenerated, what its values add up to."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.sums: dict[int, dict[int, Tensor]] = {}

    def note(self, cut: int, values: Mapping[int, Tensor]) -> None:
        """Note the `values` of cut `cut` as the forward made them."""
        of = {v: t for v, t in values.items() if self.program.values[v].grid is not None and not _torch.is_fake(t)}
        found = {v: checksum(t) for v, t in of.items()}
        if found:
            self.sums[cut] = found

    def compare(self, cut: int, values: Mapping[int, Tensor], where: str) -> None:
        """Compare checksums of a cut with those of the forward.

        Raises:
            RegenerationError: a value came back with other bits.
        """
        for v, before in self.sums.get(cut, {}).items():
            if v in values and not torch.equal(checksum(values[v]), before):
                name = self.program.values[v].name
                raise RegenerationError(
                    f"exact: `{name}`, regenerated for {where}, is not bit for bit what it was: a function of this"
                    " region does not compute the same when it is run again (another number of threads, kernels that"
                    " are not deterministic, random numbers of its own). `revfx.debug.check_regeneration()` finds it."
                )


class Samples:
    """A few elements of some cuts, by which is seen how far rounding went until they came back, and of some results.

    `eps` is that of the narrowest dtype that autocast uses, or 0.
    """

    def __init__(self, program: Program, eps: float) -> None:
        self.program, self.eps = program, eps
        self.samples: dict[int, dict[int, Tensor]] = {}
        self.results: dict[int, tuple[bool, Sequence[Tensor], Sequence[Tensor | None]]] = {}
        self.scales: dict[int, dict[int, Tensor]] = {}

    def note(self, cut: int, values: Mapping[int, Tensor]) -> None:
        """Note the `values` of cut `cut`, as made; not what lies on a grid, nor whole numbers, which are only moved."""
        rounding = {v: t for v, t in values.items() if self.program.values[v].grid is None and precision(t.dtype)}
        self.samples[cut] = {v: numerics.sample(t) for v, t in rounding.items()}
        self.scales[cut] = {}

    def rescale(self, cut: int, images: Mapping[int, int], values: Mapping[int, Tensor]) -> None:
        """Note the `values` that those of the cut will be computed back from; `images` says which is whose."""
        theirs = {v: values[y] for v, y in images.items() if v in self.samples[cut] and y in values}
        self.scales[cut] = {v: numerics.sample(t).norm() for v, t in theirs.items()}

    def note_results(self, op: int, results: Sequence[Tensor], saved: Sequence[Tensor | None], kept: bool) -> None:
        """Note `results`, what operation `op` gave in the forward, where nothing that comes back depends on it, and
        `saved` what autograd saved of it, None for values: a change that a normalisation hides is seen in what this
        reads. `kept` says whether its inputs are, so that rounding is no reason for others.
        """
        self.results[op] = kept, [numerics.sample(t) for t in results], [_sample(t) for t in saved]

    def compare_results(self, op: int, results: Sequence[Tensor], saved: Sequence[Tensor], name: str) -> None:
        """Compare what an operation gave when it ran again.

        Raises:
            RegenerationError: `op` did something else when it was run again.
        """
        kept, given, read = self.results.get(op, (True, (), ()))
        for before, t, most in (*zip(given, results, repeat(numerics.SAMPLE)), *zip(read, saved, repeat(FEW))):
            if before is None:
                continue
            error = numerics.drift(numerics.sample(t, most), before)
            if error > max(0.0 if kept else self._limit(before), numerics.GARBAGE):
                raise RegenerationError(_otherwise(name, error, kept))

    def _limit(self, before: Tensor) -> float:
        return numerics.DRIFT * max(self.eps, precision(before.dtype)) ** 0.5

    def compare(self, cut: int, values: Mapping[int, Tensor], where: str, warn: bool) -> bool:
        """Return whether a value drifted so far that it was warned of.

        Raises:
            RegenerationError: a value is off by more than 1 %.
        """
        before = self.samples.get(cut, {})
        errors = {v: numerics.drift(numerics.sample(values[v]), t, self.scales[cut].get(v)) for v, t in before.items()}
        off = {v: error for v, error in errors.items() if error > self._limit(before[v])}
        if not off:
            return False
        worst = max(off, key=lambda v: off[v] / max(self._limit(before[v]), numerics.GARBAGE))
        text = (
            f"`{self.program.values[worst].name}`, regenerated for {where}, is off by {off[worst]:.1e} (relative): the"
            f" functions of this region amplify rounding errors too much to be inverted in {before[worst].dtype}, or"
            " give something else when they run again (`revfx.testing.check_inverse` tells). Use a wider dtype for the"
            " streams, `exact=True`, or anchors (`anchor_every`), or keep the activations with"
            " `revfx.testing.store_activations()`."
        )
        if off[worst] > max(self._limit(before[worst]), numerics.GARBAGE):
            raise RegenerationError(text)
        if warn:
            warnings.warn(text, RevfxWarning, stacklevel=2)
        return warn


def _sample(t: Tensor | None) -> Tensor | None:
    """Return a few elements of what the operation computed: no buffer, which threads share, no view of a weight."""
    if t is None or t.layout != torch.strided or t.grad_fn is None or isinstance(t._base, torch.nn.Parameter):
        return None
    return numerics.sample(t, FEW)


def _otherwise(name: str, error: float, kept: bool) -> str:
    """Return what is said of an operation that did something else when it was run again."""
    rounds = "" if kept else " the functions of this region amplify rounding errors too much to be inverted, or"
    wider = "" if kept else " use a wider dtype for the streams, `exact=True`, or anchors (`anchor_every`), or"
    return (
        f"{name} did something else when it was run again for the backward, which is off by {error:.1e} (relative):"
        f"{rounds} it depends on what has changed since and nothing puts back, such as an attribute of a function or of"
        " a class, a cache that was filled, a sub-module that was replaced, or a weight written to uncounted. Make it"
        f" depend on its inputs alone,{wider} keep its activations with `revfx.testing.store_activations()`."
    )

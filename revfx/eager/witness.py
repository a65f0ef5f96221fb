"""What tells whether the backward regenerates what was there: a few numbers of each result, then and again.

Of what a function returns all bits are summed, weighed by their places, and a few elements are kept, with some of what
autograd saves inside it (a gate that is zero hides the rest of a function from its result); so of the lowest cut of
each stretch. All is compared on the device at the end of a backward pass, which the host waits for once.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from revfx import _torch
from revfx.checksum import checksum, elements
from revfx.eager import dtensor
from revfx.errors import NondeterminismWarning, RegenerationError, warn as warn_user
from revfx.passes.rounding import MAX_ERROR


if TYPE_CHECKING:
    from revfx.eager.regeneration import Regeneration


SOME = 64  # elements of each result
LAST = 3  # of the tensors that a function saves: how many are looked at
FEW = 8  # elements of each of those
JITTER = 4.0  # times eps^(2/3): what a kernel that rounds otherwise when it runs again may be off by

Metas = Sequence[tuple[Any, ...]]  # a shape and a dtype each
AS_IT_IS = contextlib.nullcontext()


@dataclass(frozen=True, slots=True)
class Seen:
    """A checksum of some tensors, and a few of their elements."""

    total: Tensor
    some: Tensor


class Witness:
    """What was noted in the forward of one call, by the number of an operation, or of a cut (negative), and what the
    backward gave since it was last compared.

    `whole`: results must be the same to the last bit; else only elements are noted, which may be off by rounding.
    """

    def __init__(self, whole: bool) -> None:
        self.whole = whole
        self.then: dict[int, Seen] = {}
        self.saved: dict[int, tuple[int, ...]] = {}
        self.now: list[tuple[int, Seen]] = []
        self.lost: list[Tensor] = []

    def note(self, key: int, results: Iterable[Tensor], saved: Sequence[Tensor | None] = ()) -> None:
        """Note what the forward gave; of what was `saved`, None for what is no result of the operation's own."""
        last = {_memory(t): k for k, t in enumerate(saved) if t is not None}  # several operations save one tensor
        chosen = tuple([*last.values()][-LAST:])
        if (seen := self._look(results, [t for k in chosen if (t := saved[k]) is not None])) is not None:
            self.then[key], self.saved[key] = seen, chosen

    def again(self, key: int, results: Iterable[Tensor], saved: Sequence[Tensor] = ()) -> None:
        """Note what the backward gave in its place."""
        if key in self.then and (seen := self._look(results, [saved[k] for k in self.saved[key]])) is not None:
            self.now.append((key, seen))

    def _look(self, results: Iterable[Tensor], saved: Iterable[Tensor]) -> Seen | None:
        with torch.no_grad() if torch.is_grad_enabled() else AS_IT_IS:
            outs = [t for whole in results for t in _plain(whole)]
            parts = [elements(t, SOME) for t in outs]
            parts += [elements(t, FEW) for whole in saved for t in _plain(whole)]
            if not parts:
                return None
            sums = [checksum(t) for t in outs if t.numel() > SOME] if self.whole else ()
            total = sums[0] if len(sums) == 1 else torch.stack(sums).sum() if sums else _zero(parts[0].device)
            return Seen(total, torch.cat(parts) if len(parts) > 1 else parts[0].clone())


def _memory(t: Tensor) -> int:
    return _torch.storage_key(t) if type(t) is Tensor and t.layout == torch.strided else id(t)


def _plain(whole: Tensor) -> list[Tensor]:
    """Return the ordinary tensors that this process holds of one; none where their numbers can't be read."""
    if type(whole) is Tensor and whole.layout == torch.strided:
        return [whole] if whole.numel() and not whole.is_meta else []
    if whole.layout != torch.strided or whole.is_nested:
        return []
    found = [dtensor.piece(t) for t in _torch.parts(dtensor.arrived(whole))]
    return [t for t in found if t.numel() and _torch.is_plain(t) and t.layout == torch.strided]


@functools.cache
def _zero(device: torch.device) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=device)


# --- the end of a backward
class _Pass:
    """One backward pass: the regions that regenerate in it, compared when it ends."""

    def __init__(self) -> None:
        self.runs: list[Regeneration] = []

    def end(self) -> None:
        """Compare, and let go of what was regenerated."""
        try:
            compare(self.runs)
        finally:
            for run in self.runs:
                run.forget()


_passes: weakref.WeakValueDictionary[int, _Pass] = weakref.WeakValueDictionary()  # the engine holds them
_lock = threading.Lock()


def join(task: int, run: Regeneration) -> None:
    """Have a region compared at the end of the backward pass of that number, which runs on this thread."""
    with _lock:
        found = _passes.get(task)
        if found is None:
            found = _passes[task] = _Pass()
            _torch.at_end_of_backward(found.end)
        found.runs.append(run)


def compare(runs: Sequence[Regeneration]) -> None:
    """Compare what the backward of some regions gave with what was there: in one read of the device where all is right.
    Raise where a function, or a value, is not what it was; warn where it is but for rounding.
    """
    noted = [(run, key, run.witness.then[key], now) for run in runs for key, now in run.witness.now]
    noted = [n for n in noted if n[2].some.shape == n[3].some.shape and not _torch.is_fake(n[3].some)]
    lost = [t for run in runs for t in run.witness.lost]
    for run in runs:
        run.witness.now.clear()
        run.witness.lost.clear()
    for device in dict.fromkeys([n[3].some.device for n in noted]):
        mine = [n for n in noted if n[3].some.device == device]
        if not lost and all([run.lossless for run, *_ in mine]) and _same(mine):
            continue
        found, without_room = _differences(mine, [t for t in lost if t.device == device])
        if without_room:
            for run in runs:
                run.plan.make_room()
        for (run, key, *_), differs, error, size in zip(mine, *found, strict=True):
            if differs:
                run.judge(key, error / size if size else error)


def _same(noted: Sequence[tuple[Any, int, Seen, Seen]]) -> bool:
    """Return whether nothing differs, nor is NaN."""
    totals = torch.stack([n[2].total for n in noted]) != torch.stack([n[3].total for n in noted])
    some = torch.cat([n[2].some for n in noted]) != torch.cat([n[3].some for n in noted])
    return not torch.cat((totals, some)).any()


def _differences(
    noted: Sequence[tuple[Any, int, Seen, Seen]], lost: Sequence[Tensor]
) -> tuple[tuple[list[float], list[float], list[float]], float]:
    """Return of each pair whether a bit differs, how far apart it is, by which size; and how many escapes lack room."""
    then, now = [n[2] for n in noted], [n[3] for n in noted]
    with torch.no_grad():
        lengths = torch.tensor([t.some.numel() for t in then])
        which = torch.repeat_interleave(torch.arange(len(then)), lengths).to(then[0].some.device)
        a, b = torch.cat([t.some for t in then]), torch.cat([t.some for t in now])
        other = (a != b) & ((a == a) | (b == b))
        a, b = a.double(), b.double()
        zeros = torch.zeros(len(then), dtype=torch.float64, device=a.device)
        apart = zeros.index_add(0, which, torch.where(other, b - a, 0.0).square()).sqrt()
        size = zeros.index_add(0, which, a.square()).sqrt()
        differs = torch.stack([t.total for t in then]) != torch.stack([t.total for t in now])
        differs = differs | (zeros.index_add(0, which, other.double()) > 0)
        room = torch.stack([zeros.sum(), *(t.double() for t in lost)]).sum().expand(len(then))
        found: list[list[float]] = torch.stack((differs.double(), apart, size, room)).tolist()
    return (found[0], found[1], found[2]), found[3][0]


def changed(saved: Metas, again: Metas, returned: Metas, returned_again: Metas) -> str | None:
    """Return what a call saved or returned otherwise when it was run again; None where it did the same."""
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


def judge(name: str, error: float, eps: float, whole: bool, warn: bool) -> bool:
    """Judge a result that differs by a relative `error`; return whether a warning was given.

    Args:
        name: the operation or value, for messages.
        error: the relative error of the recomputed elements; 0 where only the checksums differ.
        eps: the precision of the narrowest dtype around.
        whole: results must be equal to the last bit; else errors of up to `MAX_ERROR` are expected.
        warn: whether a kernel that rounds otherwise is worth a warning.

    Raises:
        RegenerationError: the error is larger than rounding explains.
    """
    limit = JITTER * eps ** (2 / 3) if whole else MAX_ERROR
    if not error <= limit:
        raise RegenerationError(_otherwise(name, error, whole))
    if whole and warn:
        warn_user(_jitters(name, error), NondeterminismWarning)
    return whole and warn


_KEEP = "keep its activations with `revfx.testing.store_activations()`"


def _otherwise(name: str, error: float, whole: bool) -> str:
    by = f"off by {error:.1e} (relative)" if error and math.isfinite(error) else "another"
    rounding = "" if whole else " rounding grew too much on the way back (`exact=True` has none), or"
    return (
        f"{name} is {by} when it is computed again for the backward:{rounding} it depends on what has changed since and"
        " nothing puts back, such as a counter, a global, a generator of its own, a cache that was filled, a sub-module"
        f" that was replaced, or a weight written to uncounted. Make it depend on its inputs alone, or {_KEEP}."
        " `revfx.debug.check_regeneration()` finds the first value that differs."
    )


def _jitters(name: str, error: float) -> str:
    return (
        f"{name} differs by {error:.1e} (relative) when it is recomputed for the backward: a kernel in it is not"
        " reproducible, or runs on another number of threads. Gradients are accurate to this rounding. Call"
        f" `torch.use_deterministic_algorithms(True)`, or {_KEEP}."
    )

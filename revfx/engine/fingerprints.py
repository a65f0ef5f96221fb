"""Fingerprints of tensors, noted in the forward and compared in the backward.

The replays run the operators of the very forward, so a difference has one of two causes: a kernel that is not
reproducible, or a write that no operator of torch made. All fingerprints of a backward pass are compared at its end, by
one read of each device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from revfx import codes
from revfx.errors import NondeterminismWarning, RegenerationError, warn
from revfx.passes.rounding import MAX_ERROR, precision


MIN_JITTER = 1e-3  # relative error that a kernel that is not reproducible may make, in any dtype
JITTER = 4.0  # times eps^(2/3) of the dtype: the same


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """A sum over all bits of a tensor, and some of its elements.

    Attributes:
        words: as in `revfx.codes.format`.
        dtype: of the tensor.
        is_rounded: the tensor comes back accurate to rounding.
    """

    words: Tensor
    dtype: torch.dtype
    is_rounded: bool = False

    @property
    def sample(self) -> Tensor:
        """The elements, in fp64; complex ones as pairs."""
        real = self.dtype.to_real() if self.dtype.is_complex else self.dtype
        return self.words[1:].view(real).double()


@dataclass(frozen=True, slots=True)
class Comparison:
    """A fingerprint of the forward, that of the replayed tensor, and a name of the tensor for messages."""

    then: Fingerprint
    now: Fingerprint
    name: str


def is_fingerprinted(t: Tensor) -> bool:
    """Return whether a tensor has a fingerprint: a plain one with elements."""
    return type(t) is Tensor and t.layout == torch.strided and t.numel() > 0 and not t.is_meta


def fingerprint(t: Tensor, is_rounded: bool = False) -> Fingerprint:
    """Take the fingerprint of a tensor; the host does not wait for the device."""
    return Fingerprint(codes.fingerprint(t.detach() if t.requires_grad else t), t.dtype, is_rounded)


def read(noted: Sequence[Comparison], counts: Sequence[Tensor]) -> tuple[bool, list[int]]:
    """Return whether any fingerprint differs, and numbers that devices counted, by one read of each device."""
    differs, found = False, dict[int, int]()
    devices = dict.fromkeys([*(c.now.words.device for c in noted), *(t.device for t in counts)])
    for device in devices:
        mine = [c for c in noted if c.now.words.device == device]
        numbers = [i for i, t in enumerate(counts) if t.device == device]
        parts = [counts[i] for i in numbers]
        if mine:
            then, now = torch.cat([c.then.words for c in mine]), torch.cat([c.now.words for c in mine])
            parts.append((then != now).any().view(1))
        values = torch.cat(parts).tolist()
        found.update(zip(numbers, values, strict=False))
        differs = differs or bool(mine and values[-1])
    return differs, [found[i] for i in range(len(counts))]


def judge(noted: Sequence[Comparison]) -> None:
    """Judge fingerprints of which some differ, by one more read of each device.

    Raises:
        RegenerationError: a tensor differs by more than rounding.

    Warns:
        NondeterminismWarning: a tensor differs by rounding.
    """
    for device in dict.fromkeys(c.now.words.device for c in noted):
        mine = [c for c in noted if c.now.words.device == device]
        differ = torch.stack([(c.then.words != c.now.words).any() for c in mine]).double()
        values = torch.stack((differ, torch.stack([_error(c) for c in mine]))).tolist()
        for c, differs, error in zip(mine, *values, strict=True):
            if differs:
                _judge(c, error)


def _error(c: Comparison) -> Tensor:
    """Return the relative difference of the sampled elements."""
    a, b = c.then.sample, c.now.sample
    apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, a - b)
    return apart.norm() / a.norm().clamp_min(1e-300)


def _judge(c: Comparison, error: float) -> None:
    if c.then.is_rounded and error <= MAX_ERROR:
        return
    if error == 0:
        warn(
            f"{c.name} differs when it is recomputed, in elements that a sample of it does not show: a kernel is not"
            " reproducible, or something other than an operator of torch wrote to a tensor that it is computed from."
            " Gradients may be wrong there. `revfx.debug.check_regeneration()` finds the first tensor that differs.",
            NondeterminismWarning,
        )
        return
    if error <= max(MIN_JITTER, JITTER * precision(c.then.dtype) ** (2 / 3)):
        warn(
            f"{c.name} differs by {error:.1e} (relative) when it is recomputed: a kernel is not reproducible. Gradients"
            " are accurate to this rounding. Call `torch.use_deterministic_algorithms(True)` if every bit matters.",
            NondeterminismWarning,
        )
        return
    raise RegenerationError(
        f"{c.name} differs by {error:.1e} (relative) when it is recomputed: something other than an operator of torch"
        " wrote to a tensor that it is computed from, or a kernel is not reproducible. The gradients of this step are"
        " wrong. `revfx.debug.check_regeneration()` finds the first tensor that differs."
    )

"""Fingerprints: a checksum and some elements of a tensor, noted in the forward and compared in the backward.

The replays run the operators of the very forward, so a difference has one of two causes: a kernel that is not
reproducible, or a write that no operator of torch made. All fingerprints of a backward pass are compared at its end, by
one read of each device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from revfx.checksum import checksum, elements
from revfx.errors import NondeterminismWarning, RegenerationError, warn
from revfx.passes.rounding import MAX_ERROR, precision


SAMPLE = 64  # elements
MIN_JITTER = 1e-3  # relative error that a kernel that is not reproducible may make, in any dtype
JITTER = 4.0  # times eps^(2/3) of the dtype: the same


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """A checksum of all bits of a tensor, an int64 scalar, and some of its elements.

    `is_rounded`: the tensor comes back accurate to rounding.
    """

    total: Tensor
    sample: Tensor
    is_rounded: bool = False


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
    with torch.no_grad():
        return Fingerprint(checksum(t), elements(t, SAMPLE).clone(), is_rounded)


def compare(noted: Sequence[Comparison]) -> None:
    """Compare fingerprints, by one read of each device.

    Raises:
        RegenerationError: a tensor differs by more than rounding.

    Warns:
        NondeterminismWarning: a tensor differs by rounding.
    """
    for device in dict.fromkeys(c.now.total.device for c in noted):
        mine = [c for c in noted if c.now.total.device == device]
        totals = torch.stack([c.then.total for c in mine]) != torch.stack([c.now.total for c in mine])
        if not any(c.then.is_rounded for c in mine):
            if not totals.any():
                continue
        errors = torch.stack([_error(c) for c in mine])
        read = torch.stack((totals.double(), errors)).tolist()
        for c, differs, error in zip(mine, *read, strict=True):
            if differs:
                _judge(c, error)


def _error(c: Comparison) -> Tensor:
    """Return the relative difference of the sampled elements, without a wait for the device."""
    a, b = c.then.sample.double(), c.now.sample.double()
    apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, a - b)
    return apart.norm() / a.norm().clamp_min(1e-300)


def _judge(c: Comparison, error: float) -> None:
    if c.then.is_rounded and error <= MAX_ERROR:
        return
    if error <= max(MIN_JITTER, JITTER * precision(c.then.sample.dtype) ** (2 / 3)):
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

"""Rounding: the precision of dtypes, and the error beyond which a regenerated value is wrong rather than rounded."""

from __future__ import annotations

import torch


MAX_ERROR = 1e-2  # relative; a larger one is an error, where inverses may round


def precision(dtype: torch.dtype) -> float:
    """Relative distance of neighbouring numbers, real or complex; 0 for whole numbers and truth values."""
    return torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0.0

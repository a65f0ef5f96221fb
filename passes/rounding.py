"""The precision of dtypes, and the largest relative error that counts as rounding."""

from __future__ import annotations

import torch


MAX_ERROR = 1e-2  # relative; a larger difference from the forward is an error even if inverses round


def precision(dtype: torch.dtype) -> float:
    """Return the relative distance of neighbouring real or complex numbers; 0 for integers and booleans."""
    if dtype.is_floating_point or dtype.is_complex:
        return torch.finfo(dtype).eps
    return 0.0

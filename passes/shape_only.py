"""What reads no more of a tensor than its shape, and how to say it without the tensor: that would look like a use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from revfx.passes.sizes import fixed


FILLED: Mapping[str, int] = {"zeros_like": 0, "ones_like": 1, "new_zeros": 0, "new_ones": 1}
UNFILLED = ("empty", "empty_like", "new_empty")  # of any numbers: zeros are the same in every run
VALUE_AT: Mapping[str, int] = {"full_like": 1, "new_full": 2}  # which argument they are filled with
DRAWN: Mapping[str, str] = {"rand_like": "rand", "randn_like": "randn"}


def of_its_shape(name: str, args: Any, kwargs: Mapping[str, Any], made: Any) -> tuple[str, Any, dict[str, Any]] | None:
    """Return the name, arguments and options of what makes a tensor like `made` of its shape alone, if anything does.

    `y = randn_like(a)` is `y = randn(shape of y)`: the same numbers where y is contiguous, and the generator torch's.
    """
    known = any(name in names for names in (FILLED, UNFILLED, VALUE_AT, DRAWN))
    if not known or kwargs.get("generator") is not None or kwargs.get("requires_grad"):
        return None
    strided = isinstance(made, torch.Tensor) and made.layout == torch.strided
    if not strided or not fixed(made.shape) or not made.is_contiguous():
        return None
    options = {"dtype": made.dtype, "device": made.device}
    if name in DRAWN:
        return DRAWN[name], (list(made.shape),), options
    at = VALUE_AT.get(name)
    value = FILLED.get(name, 0) if at is None else next(iter(args[at:]), kwargs.get("fill_value"))
    return ("full", (list(made.shape), value), options) if isinstance(value, (bool, int, float)) else None

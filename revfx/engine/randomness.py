"""Random operators: the generator that one draws from, and its state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


RandomState = tuple[torch.Generator, Tensor]


def state_before(args: Sequence[Any], kwargs: Mapping[str, Any]) -> RandomState:
    """Return the generator that an operator with these arguments draws from, and its state now."""
    generator = kwargs.get("generator")
    device = kwargs.get("device")
    for a in args:
        if isinstance(a, torch.Generator):
            generator = a
        elif isinstance(a, Tensor) and device is None:
            device = a.device
    if generator is None:
        generator = _default_generator(torch.device(device or "cpu"))
    return generator, generator.get_state()


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type in ("cpu", "meta"):  # nothing is drawn on the latter
        return torch.default_generator
    module: Any = torch.get_device_module(device)
    index = getattr(device, "index", None)  # None of the current one, against its annotation
    if index is None:
        index = module.current_device()
    return module.default_generators[index]

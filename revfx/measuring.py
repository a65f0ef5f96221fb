"""What training steps of several ways of running one model take: memory from the allocator's events, time in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revfx.explanation_data import Usage
from revfx.testing import measure_memory


REPEATS = 5  # steps of each way that are timed


def measured(
    ways: Mapping[str, Callable[..., Any]],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    loss: Callable[[Any], Tensor],
    device: str = "cpu",
) -> tuple[Usage, ...]:
    """Measure, by way, the bytes and the median seconds that `loss(way(*args, **kwargs))` and its backward take."""
    steps = {name: _step(way, args, kwargs, loss) for name, way in ways.items()}
    memory = {name: measure_memory(step, device=device) for name, step in steps.items()}
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(REPEATS):
        for name, step in steps.items():
            start = time.perf_counter()
            step().backward()
            if device != "cpu":
                torch.cuda.synchronize(device)
            spent[name].append(time.perf_counter() - start)
    return tuple(
        Usage(name, measured_kept=memory[name].kept, measured_peak=memory[name].peak, seconds=statistics.median(s))
        for name, s in spent.items()
    )


def _step(way: Callable[..., Any], args: Any, kwargs: Any, loss: Callable[[Any], Tensor]) -> Callable[[], Tensor]:
    return lambda: loss(way(*args, **kwargs))


def device_of(model: nn.Module) -> str:
    """Return the device of a model's first parameter, as `measure_memory` takes it."""
    first = next((p.device for p in model.parameters()), torch.device("cpu"))
    return str(first)

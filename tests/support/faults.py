"""What the tests of faults share: modes that raise at the n-th operation, and what a step may leave behind."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Own(BaseException):
    """An exception of the user's that no `except Exception` catches."""


KINDS = (KeyboardInterrupt, MemoryError, Own, KeyError)
_CONTEXTS = ("_set_grad_enabled", "_enter_autocast", "_exit_autocast")  # with these torch's own contexts end


class Dispatched(TorchDispatchMode):
    """Raises `error` in place of the `at`-th operator that reaches a kernel."""

    def __init__(self, at: int = 0, error: BaseException | None = None) -> None:
        super().__init__()
        self.at, self.error, self.count = at, error, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.error is not None and self.count == self.at:
            raise self.error
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    """Raises `error` in place of the `at`-th torch function that Python code calls."""

    def __init__(self, at: int = 0, error: BaseException | None = None) -> None:
        super().__init__()
        self.at, self.error, self.count = at, error, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in _CONTEXTS:
            self.count += 1
            if self.error is not None and self.count == self.at:
                raise self.error
        return func(*args, **(kwargs or {}))


class Busy(nn.Module):
    """Draws, writes buffers, counts, and enters contexts."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.cast = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4, dtype=torch.float32)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = F.dropout(self.norm(self.linear(x)), 0.3, self.training)
        with torch.autocast("cpu", torch.bfloat16):
            h = h + self.cast(x.float()).double()
        with torch.no_grad():
            scale = h.abs().mean()
        return torch.tanh(h) * (1 + scale)


@dataclass(frozen=True)
class Left:
    """What plain code would have changed too: the random state, buffers and counters."""

    random: bytes
    buffers: tuple[tuple[float, ...], ...]
    counts: tuple[int, ...]

    @staticmethod
    def by(model: nn.Module) -> Left:
        """As it is now."""
        buffers = tuple(tuple(b.flatten().tolist()) for b in model.buffers())
        return Left(bytes(torch.get_rng_state()), buffers, tuple(m.calls for m in busy(model)))


def busy(model: nn.Module) -> list[Busy]:
    return [m for m in model.modules() if isinstance(m, Busy)]


def around(model: nn.Module) -> dict[str, Any]:
    """What no step may change, whether it ends well or not: modes, patches, and what hangs on the model."""
    tables: list[Callable[[nn.Module], dict[str, Any]]] = [
        lambda m: m._parameters,  # pyright: ignore[reportPrivateUsage]
        lambda m: m._buffers,  # pyright: ignore[reportPrivateUsage]
        lambda m: m._modules,  # pyright: ignore[reportPrivateUsage]
    ]
    C: Any = torch._C  # pyright: ignore[reportPrivateUsage]
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "autocast's cache": torch.is_autocast_cache_enabled(),
        "default dtype and device": (torch.get_default_dtype(), torch.get_default_device()),
        "function modes": C._len_torch_function_stack(),
        "dispatch modes": C._len_torch_dispatch_stack(),
        "hooks on saved tensors": C._autograd._top_saved_tensors_default_hooks(True),
        "patches": (nn.Module.__init__, nn.Module.__call__, torch.set_rng_state, torch.autograd.Function.apply),
        "patched reads": "__getattribute__" in vars(nn.Module),
        "garbage collection": gc.isenabled(),
        "filters of warnings": list(warnings.filters),
        "modules": [
            (name, m.training, {k: id(v) for table in tables for k, v in table(m).items()}, sorted(vars(m)))
            for name, m in model.named_modules()
        ],
    }

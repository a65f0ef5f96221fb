"""Test tools for users' own models: gradients, inverses, memory."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revfx import rules
from revfx.arguments import normalize_arguments
from revfx.block import RevBlock
from revfx.converted import Reversible, conversion_of
from revfx.errors import RevfxError
from revfx.inspection import (
    direction_errors,
    gradients as gradients,
    is_floating,
    relative_error as relative_error,
    round_trip,
)
from revfx.modes import store_activations as store_activations


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step beyond those before it: `kept` after the forward, `peak` over forward and backward.

    `live`: the bytes after each allocation and each release, in order; empty on CUDA, where none is seen.
    """

    kept: int
    peak: int
    live: tuple[int, ...] = field(default=(), repr=False, compare=False)


def assert_same_grads(
    model: Callable[..., Any],
    reference: Callable[..., Any],
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    rtol: float | None = None,
    seed: int = 0,
) -> None:
    """Raise unless both have the same gradients for every input and parameter: names, dtypes, shapes and values.

    Args:
        model, reference: modules (or functions) of the same inputs.
        args: example inputs: a tensor, or a tuple of positional arguments. Tensors in them, also nested, get gradients
            if they require one.
        kwargs: keyword arguments.
        loss: from the output to a scalar; default a sum of sines of all outputs.
        rtol: largest norm of the difference relative to the norm. Default: 0, bit for bit, if `model` is converted,
            lossless and not compiled; else 1e-9 in fp64, 1e-4 in fp32, 5e-2 below.
        seed: of the random numbers.

    Raises:
        AssertionError: names the worst gradient and its error.
    """
    got, want = (gradients(m, args, kwargs, loss=loss, seed=seed) for m in (model, reference))
    if list(got) != list(want):
        raise AssertionError(f"gradients of different names: {sorted(set(got) ^ set(want))}")
    if rtol is None and isinstance(model, Reversible):
        options = [conversion_of(m).options for m in model.modules() if isinstance(m, Reversible)]
        if all(o.exact and not o.compile for o in options):
            rtol = 0.0  # lossless and not compiled: its gradients are the plain model's
    failures: list[tuple[float, str, float, float]] = []  # error in units of its limit, name, error, limit
    for name, w in want.items():
        g = got[name]
        if _type_of(g) != _type_of(w):
            raise AssertionError(f"the gradient of `{name}` is {_type_of(g)}, the reference's {_type_of(w)}")
        if g is None or w is None:
            continue
        limit = rtol
        if limit is None:
            limit = {torch.float64: 1e-9, torch.float32: 1e-4}.get(w.dtype, 5e-2)
        error = relative_error(g, w)
        is_close = torch.equal(g, w) if limit == 0 else error <= limit
        if not is_close:
            failures.append((error / (limit or 1.0), name, error, limit))
    if failures:
        _, name, error, limit = max(failures)
        raise AssertionError(f"the gradient of `{name}` is off by {error:.2e} (relative), more than {limit:.0e}")


def _type_of(gradient: Tensor | None) -> str:
    return "missing" if gradient is None else f"{gradient.dtype}{list(gradient.shape)}"


def check_inverse(
    target: Any, args: Any, kwargs: Mapping[str, Any] | None = None, *, rtol: float | None = None
) -> dict[str, float]:
    """Return the relative error of each inverse, by layer, in the given dtype and in fp64.

    Args:
        target: a converted model, a `RevBlock`, or an operation with an inverse rule, which is solved for each operand.
        args: example inputs, or operands: a tensor, or a tuple of positional arguments.
        kwargs: keyword arguments.
        rtol: largest relative error; default 1e3 eps of the dtype.

    Raises:
        AssertionError: an error above `rtol`; it names the worst layer.
        RevfxError: `target` has no region and no rule.
    """
    positional, named = normalize_arguments(args, kwargs)
    if isinstance(target, (Reversible, RevBlock)):
        errors = round_trip(target, positional, named)
    elif not isinstance(target, nn.Module) and rules.has_rule(target):
        errors = direction_errors(_Operation(target), positional, named)
    else:
        kind = "neither a converted model, a `RevBlock`, nor an operation with a rule"
        raise RevfxError(f"`check_inverse`: {target!r} is {kind}.")
    worst = max(errors, key=lambda name: errors[name], default=None)
    limit = rtol
    if limit is None:
        floating = filter(is_floating, pytree.tree_leaves((positional, named)))
        limit = 1e3 * max((torch.finfo(t.dtype).eps for t in floating), default=0)
    if worst is not None and not errors[worst] <= limit:
        raise AssertionError(f"the inverse is off by {errors[worst]:.2e} (relative), more than {limit:.0e}, at {worst}")
    return errors


class _Operation(nn.Module):
    """A module that applies one operation, to a copy of its first operand because it may work in place."""

    def __init__(self, op: Any) -> None:
        super().__init__()
        self.op = op() if isinstance(op, type) else op

    def forward(self, first: Any, *rest: Any, **named: Any) -> Any:
        if isinstance(first, Tensor):
            first = first.clone()
        return self.op(first, *rest, **named)


WARM_UPS = 2  # steps: a converted model records the first one, and tests its plan in the second one


def measure_memory(step: Callable[[], Tensor], *, device: str = "cpu", warm_up: bool = True) -> Memory:
    """Measure the bytes that a step keeps after the forward, and its peak, beyond the bytes before it.

    The profiler's memory events are counted on the CPU, exact and repeatable; on CUDA, the allocator's statistics.

    Args:
        step: a function that runs a forward and returns its scalar loss; the backward follows.
        device: "cpu", or a CUDA device.
        warm_up: run `WARM_UPS` steps first. Gradients of parameters exist after them, and so do not count.
    """
    if warm_up:
        for _ in range(WARM_UPS):
            step().backward()
    if device != "cpu":
        return _measure_cuda(step, device)
    from torch.profiler import ProfilerActivity, profile, record_function

    with contextlib.ExitStack() as stack:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*Profiler clears events")  # between cycles: here there is only one
            prof = stack.enter_context(profile(activities=[ProfilerActivity.CPU], profile_memory=True))
        loss = step()
        with record_function("revfx::backward"):
            loss.backward()
    kept = 0
    live = [0]
    profiler: Any = prof.profiler
    events = profiler.kineto_results.events()
    backward_start = next(e.start_ns() for e in events if e.name() == "revfx::backward")
    for e in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live.append(live[-1] + e.nbytes())
        if e.start_ns() <= backward_start:
            kept = live[-1]
    return Memory(kept, max(live), tuple(live))


def _measure_cuda(step: Callable[[], Tensor], device: str) -> Memory:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    loss = step()
    kept = torch.cuda.memory_allocated(device) - before
    loss.backward()
    return Memory(kept, torch.cuda.max_memory_allocated(device) - before)

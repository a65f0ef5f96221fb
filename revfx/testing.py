"""The test tools of revfx, for users to test their own models: gradients, inverses, memory."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    directions,
    gradients as gradients,
    is_floating,
    relative_error as relative_error,
    round_trip,
)
from revfx.modes import store_activations as store_activations


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step beyond those before it: `kept` after the forward, `peak` in both directions."""

    kept: int
    peak: int


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
    """Raise unless both give the same gradients for every input and parameter: names, dtypes, shapes and values.

    Args:
        model, reference: modules (or functions) of the same inputs.
        args: example inputs: a tensor, or a tuple of positional arguments. Tensors in them, also nested, get gradients
            if they require one.
        kwargs: keyword arguments.
        loss: from the output to a scalar; default a sum of sines of all outputs.
        rtol: largest norm of the difference relative to the norm; default 0, bit for bit, where `model` is converted
            and lossless and not compiled, else 1e-9 in fp64, 1e-4 in fp32, 5e-2 below.
        seed: of the random numbers.

    Raises:
        AssertionError: names the worst gradient and by how much it is off.
    """
    got, want = (gradients(m, args, kwargs, loss=loss, seed=seed) for m in (model, reference))
    if list(got) != list(want):
        raise AssertionError(f"gradients of different names: {sorted(set(got) ^ set(want))}")
    if rtol is None and isinstance(model, Reversible):
        options = [conversion_of(m).options for m in model.modules() if isinstance(m, Reversible)]
        if all(o.exact and not o.compile for o in options):
            rtol = 0.0  # lossless and not compiled: its gradients are the plain model's
    off: list[tuple[float, str, float, float]] = []  # how many times too much, and of which tensor
    for name, w in want.items():
        g = got[name]
        kind, wanted = ("missing" if t is None else f"{t.dtype}{list(t.shape)}" for t in (g, w))
        if kind != wanted:
            raise AssertionError(f"the gradient of `{name}` is {kind}, the reference's {wanted}")
        if g is None or w is None:
            continue
        limit = rtol if rtol is not None else {torch.float64: 1e-9, torch.float32: 1e-4}.get(w.dtype, 5e-2)
        error = relative_error(g, w)
        if not (torch.equal(g, w) if limit == 0 else error <= limit):
            off.append((error / (limit or 1.0), name, error, limit))
    if off:
        _, name, error, limit = max(off)
        raise AssertionError(f"the gradient of `{name}` is off by {error:.2e} (relative), more than {limit:.0e}")


def check_inverse(
    target: Any, args: Any, kwargs: Mapping[str, Any] | None = None, *, rtol: float | None = None
) -> dict[str, float]:
    """Return the relative error of each value that one step back gives, by layer, in the given dtype and in fp64.

    Args:
        target: a converted model, a `RevBlock`, or an operation with a rule in the table, of which every direction is
            solved and compared.
        args: example inputs, or operands: a tensor, or a tuple of positional arguments.
        kwargs: keyword arguments.
        rtol: largest relative error; default 1e3 eps of the dtype.

    Raises:
        AssertionError: an error above `rtol`; it names the worst layer.
        RevfxError: `target` has no region and no rule.
    """
    given, named = normalize_arguments(args, kwargs)
    if isinstance(target, (Reversible, RevBlock)):
        errors = round_trip(target, given, named)
    elif not isinstance(target, nn.Module) and rules.has_rule(target):
        errors = directions(_Operation(target), given, named)
    else:
        kind = "neither a converted model, a `RevBlock`, nor an operation with a rule"
        raise RevfxError(f"`check_inverse`: {target!r} is {kind}.")
    worst = max(errors, key=lambda name: errors[name], default=None)
    dtypes = [t.dtype for t in pytree.tree_leaves((given, named)) if is_floating(t)]
    limit = rtol if rtol is not None else 1e3 * max((torch.finfo(d).eps for d in dtypes), default=0)
    if worst is not None and not errors[worst] <= limit:
        raise AssertionError(f"the inverse is off by {errors[worst]:.2e} (relative), more than {limit:.0e}, at {worst}")
    return errors


class _Operation(nn.Module):
    """A module that applies one operation, to a copy of its first operand so that it may work in place."""

    def __init__(self, op: Any) -> None:
        super().__init__()
        self.op = op() if isinstance(op, type) else op

    def forward(self, first: Any, *rest: Any, **named: Any) -> Any:
        first = first.clone() if isinstance(first, Tensor) else first
        return getattr(first, self.op)(*rest, **named) if isinstance(self.op, str) else self.op(first, *rest, **named)


WARM_UPS = 2  # steps: a converted model learns in the first one, and proves its plan in the second one


def measure_memory(step: Callable[[], Tensor], *, device: str = "cpu", warm_up: bool = True) -> Memory:
    """Measure the bytes that `step()`, which returns a scalar loss, keeps after the forward, and the peak of the step.

    Counted from the bytes before the call; gradients of parameters count unless they exist already (they do
    after the warm-up run). On CPU the profiler's memory events tell, exact and repeatable; on CUDA the allocator.
    """
    for _ in range(WARM_UPS if warm_up else 0):
        step().backward()
    if device != "cpu":
        return _measure_cuda(step, device)
    from torch.profiler import ProfilerActivity, profile, record_function

    with contextlib.ExitStack() as stack:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*Profiler clears events")  # between cycles: this is one
            prof = stack.enter_context(profile(activities=[ProfilerActivity.CPU], profile_memory=True))
        loss = step()
        with record_function("revfx::backward"):
            loss.backward()
    kept = peak = now = 0
    recorded: Any = prof.profiler
    events = [(e.name(), e) for e in recorded.kineto_results.events()]
    starts = [e.start_ns() for name, e in events if name == "revfx::backward"]
    for e in sorted((e for name, e in events if name == "[memory]"), key=lambda e: e.start_ns()):
        now += e.nbytes()
        peak = max(peak, now)
        if e.start_ns() <= starts[0]:
            kept = now
    return Memory(kept, peak)


def _measure_cuda(step: Callable[[], Tensor], device: str) -> Memory:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    loss = step()
    kept = torch.cuda.memory_allocated(device) - before
    loss.backward()
    return Memory(kept, torch.cuda.max_memory_allocated(device) - before)

"""Measured costs of operators: each different one runs by itself, once for its allocations, then for its time.

Neither follows from shapes: kernels allocate within themselves (blocks of channels, partial sums for each thread),
and on some machines an exponential takes as long as reading memory ten times.
"""

from __future__ import annotations

import functools
import math
import operator
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from revfx import _fake, _torch, codes
from revfx.codes.codec import TYPICAL_WIDTH
from revfx.engine.whole import Whole
from revfx.fit.compiled import Back
from revfx.fit.tape import StepOp, Tape, ValueView
from revfx.layout import span
from revfx.parts import CompiledPart
from revfx.passes._torch import is_random
from revfx.passes.sizes import mute_logger, tensors_of


REPEATS = 3  # runs of each for its time, of which the fastest counts; one if it takes longer than ...
LONG = 0.05  # seconds
FEW, FEWER = 2**15, 2**11  # elements
BYTES_PER_SECOND = 1e10  # that operators read and write, where their times must not depend on the machine
ALIGNMENT = 64  # bytes; wherever an operand begins beyond that, kernels take as long
BIT_COST = 1e-9  # seconds per element that is stored as a bit, in such estimates


@dataclass(frozen=True)
class Cost:
    """Seconds, bytes that are there while it runs besides operands and results, and dtypes, shapes and strides of
    these.
    """

    seconds: float = 0.0
    scratch: int = 0
    results: tuple[Any, ...] = ()


class Costs:
    """The known costs, by the signature of an operator."""

    def __init__(self) -> None:
        self.known: dict[Hashable, Cost] = {}

    def of(self, tape: Tape) -> list[Cost]:
        """Return the cost of each operator of a tape; those that are not known yet are measured.

        Where results are other than fake ones, such as the workspace of an LSTM, the tape is put right.
        """
        costs: list[Cost] = []
        for start, stop in ((0, tape.backward_start), (tape.backward_start, len(tape.ops))):
            keys = [signature(tape, op) for op in tape.ops[start:stop]]
            new = {k: op for k, op in zip(keys, tape.ops[start:stop], strict=True) if k not in self.known}
            with ThreadPoolExecutor(1) as thread:  # in which no autocast, mode or profiler of the user's is active
                found = thread.submit(_measured, tape, [*new.values()], torch.get_num_threads())
                self.known |= zip(new, found.result(), strict=True)
            costs += [self.known[k] for k in keys]
            if start == 0:
                _correct(tape, costs)
        return costs


def estimate_costs(tape: Tape, costs: Sequence[Cost]) -> list[Cost]:
    """Return costs with seconds that follow from the sizes of operands and results, and the same scratch bytes."""
    return [replace(cost, seconds=estimated_seconds(op)) for op, cost in zip(tape.ops, costs, strict=True)]


def estimated_seconds(op: StepOp) -> float:
    """Return the seconds of an operator that follow from the sizes of its operands and results."""
    views = [*op.reads, *(s for s in op.outs if s is not None)]
    return sum(math.prod(s.shape) * s.dtype.itemsize for s in views) / BYTES_PER_SECOND


def _correct(tape: Tape, costs: Sequence[Cost]) -> None:
    """Give a tape the results that operators of its forward really have."""
    real: dict[ValueView | None, ValueView] = {}
    for op, cost in zip(tape.ops, costs, strict=False):
        if _is_dynamic(op):
            continue  # it was measured with other numbers
        for view, found in zip(op.outs, cost.results, strict=False):
            if view is not None and found not in (None, view.place[:3]) and view.value in op.makes:
                dtype, shape, stride = found
                real[view] = replace(view, dtype=dtype, shape=shape, stride=stride)
                tape.allocation(view.value).size = span(shape, stride) * dtype.itemsize

    if real:
        for p in tape.saved:
            p.view = real.get(p.view, p.view)
        for op in tape.ops:
            op.args, op.kwargs, op.reads, op.outs = pytree.tree_map_only(
                ValueView, lambda s: real.get(s, s), (op.args, op.kwargs, op.reads, op.outs)
            )


def sizes_depend_on_data(tape: Tape) -> bool:
    """Return whether a result of the forward has a shape that depends on the numbers in a tensor.

    torch tags all indexing so. With masks it depends on them, with numbers it does not, which fake tensors tell.
    """
    dynamic = {signature(tape, op): op for op in tape.ops[: tape.backward_start] if _is_dynamic(op)}
    return not all(map(_has_fake_results, dynamic.values()))


def _is_dynamic(op: StepOp) -> bool:
    return torch.Tag.dynamic_output_shape in getattr(op.func, "tags", ())


def _has_fake_results(op: StepOp) -> bool:
    """Return whether an operator runs on tensors that have no data."""

    def fake(v: ValueView) -> Tensor:
        return torch.empty_strided(v.shape, v.stride, dtype=v.dtype)

    with _torch.below_autograd(), _fake.FakeMode(), mute_logger(_fake.FAKE_LOGGER):
        try:
            args, kwargs = pytree.tree_map_only(ValueView, fake, (op.args, op.kwargs))
            op.func(*args, **kwargs)
        except Exception:  # of any class: it has no fake results, or none of such operands
            return False
    return True


def signature(tape: Tape, op: StepOp) -> Hashable:
    """Return a key of the call of an operator.

    It has neither the numbers in tensors, nor the place where a tensor begins in its memory, but for the alignment.
    """
    first: dict[int, int] = {}
    leaves, spec = pytree.tree_flatten((op.args, op.kwargs))
    found: list[Hashable] = []
    for leaf in leaves:
        if isinstance(leaf, ValueView):
            allocation = tape.allocation_of[leaf.value]
            shared = first.setdefault(allocation, len(first))
            alignment = leaf.offset * leaf.dtype.itemsize % ALIGNMENT
            found.append((shared, tape.allocations[allocation].device, leaf.dtype, leaf.shape, leaf.stride, alignment))
        elif isinstance(leaf, CompiledPart):
            found.append(CompiledPart)  # alike ones take as long
        else:
            found.append((type(leaf), leaf if isinstance(leaf, Hashable) else str(leaf)))
    return op.func, tuple(found), str(spec)


# --- running single operators on made-up operands
def _operands(tape: Tape, op: StepOp) -> tuple[Any, Any]:
    """Return arguments like those of `op`: random numbers, and zeros of whole ones, which are valid as indices."""
    blocks: dict[int, Tensor] = {}

    def made(leaf: Any) -> Any:
        if isinstance(leaf, torch.Generator):
            return torch.Generator(leaf.device)
        if not isinstance(leaf, ValueView):
            return leaf
        allocation = tape.allocation_of[leaf.value]
        if allocation not in blocks:
            size, device = tape.allocations[allocation].size, tape.allocations[allocation].device
            n = -(-size // leaf.dtype.itemsize)
            draw = leaf.dtype.is_floating_point and leaf.dtype.itemsize > 1
            blocks[allocation] = torch.zeros(n, dtype=leaf.dtype, device=device)
            if draw:
                blocks[allocation].uniform_(generator=torch.Generator(device))  # the default generator is the user's
        whole = blocks[allocation]
        typed = whole if whole.dtype == leaf.dtype else whole.view(torch.uint8).view(leaf.dtype)
        return typed.as_strided(leaf.shape, leaf.stride, leaf.offset)

    return pytree.tree_map(made, (op.args, op.kwargs))


def _measured(tape: Tape, ops: Sequence[StepOp], threads: int) -> list[Cost]:
    torch.set_num_threads(threads)
    found: list[Cost] = []
    with warnings.catch_warnings(), _torch.below_autograd():
        warnings.simplefilter("ignore")
        for op in ops:
            has_state = isinstance(op.func, (Whole, Back)) or is_random(op.func, op.args, op.kwargs)
            with torch.random.fork_rng(enabled=has_state):  # others may draw while other operators are measured
                found.append(_cost(tape, op))
    return found


def _cost(tape: Tape, op: StepOp) -> Cost:
    """Return the cost of an operator; none if it refuses such operands."""
    if isinstance(op.func, Back) and op.func.is_rest:
        return Cost()
    views = (*op.reads, *(s for s in op.outs if s is not None))
    device = next((tape.allocation(s.value).device for s in views), torch.device("cpu"))
    try:
        (args, kwargs), frees = _operands(tape, op), isinstance(op.func, Back)

        def ready() -> Callable[[], Any]:
            return op.func.ready(*args) if frees else functools.partial(op.func, *args, **kwargs)

        if device.type == "cpu":
            out, changes = _torch.trace_allocations(ready)
            used = [*accumulate(changes)]
            most, end = max(used), max(0, used[-1])
        else:
            torch.cuda.synchronize(device)
            start, run = torch.cuda.memory_allocated(device), ready()
            torch.cuda.reset_peak_memory_stats(device)
            out = run()
            most, end = (f(device) - start for f in (torch.cuda.max_memory_allocated, torch.cuda.memory_allocated))
        results = [
            (t.dtype, tuple(t.shape), t.stride()) if isinstance(t, Tensor) else None for t in pytree.tree_leaves(out)
        ]
        made = sum(t.nbytes for t in tensors_of(out)) if frees else end
        del out
        return Cost(_seconds(ready, device) if op.makes else 0.0, max(0, most - made), tuple(results))
    except Exception:
        return Cost()


@functools.cache
def bit_seconds(device: torch.device) -> float:
    """Return the seconds per element to encode a tensor as bits and to decode it."""
    if device.type == "meta":
        return BIT_COST
    many, few = (_bits_seconds(torch.zeros(n, device=device)) for n in (FEW, FEWER))
    return max(many - few, 0.0) / (FEW - FEWER)


@functools.cache
def code_seconds(device: torch.device, dtype: torch.dtype) -> float:
    """Return the seconds per element to encode a tensor as a correction and to decode it."""
    if device.type == "meta":
        return BIT_COST
    many, few = (_code_seconds(torch.ones(n, dtype=dtype, device=device)) for n in (FEW, FEWER))
    return max(many - few, 0.0) / (FEW - FEWER)


def _code_seconds(t: Tensor) -> float:
    prediction = codes.predict(operator.sub, t, torch.zeros_like(t))
    code = codes.encode(t, prediction, TYPICAL_WIDTH)
    encoding = _seconds(lambda: lambda: codes.encode(t, prediction, TYPICAL_WIDTH), t.device)
    return encoding + _seconds(lambda: lambda: codes.decode(prediction, code), t.device)


def _bits_seconds(t: Tensor) -> float:
    """Return the seconds to encode a tensor as bits and to decode it."""

    def run() -> Tensor:
        return codes.unpack_marks(codes.pack_marks(t), len(t), t.dtype)

    return min(_seconds(lambda: run, t.device) for _ in range(4))


def _seconds(ready: Callable[[], Callable[[], Any]], device: torch.device) -> float:
    fastest = float("inf")
    for _ in range(REPEATS):
        run = ready()
        if device.type != "cpu":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
        if fastest > LONG:
            break
    return fastest

"""What operators cost, measured: each that differs runs on its own, once to see what it allocates, then for its time.

Neither can be told from shapes: kernels allocate within themselves (blocks of channels, partial sums for each thread),
and on some machines an exponential takes as long as reading memory ten times.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Generator, Hashable, Sequence
from dataclasses import replace

import torch
from torch.utils import _pytree as pytree

from revfx import _torch
from revfx.fit.kernels import Cost, device_of, on_cpu, on_cuda, operands, seconds
from revfx.fit.tape import Op, Spot, Tape


class Costs:
    """What is known of operators so far, by what tells them apart."""

    def __init__(self) -> None:
        self.known: dict[Hashable, Cost] = {}

    def of(self, tape: Tape) -> list[Cost]:
        """Return the cost of each operator of a tape; those that are not known yet are measured.

        Where results are other than fake ones, such as the workspace of an LSTM, the tape is put right.
        """
        costs: list[Cost] = []
        for start, stop in ((0, tape.turn), (tape.turn, len(tape.ops))):
            keys = [signature(tape, op) for op in tape.ops[start:stop]]
            new = {k: op for k, op in zip(keys, tape.ops[start:stop], strict=True) if k not in self.known}
            with torch.random.fork_rng(), torch.enable_grad(), _plain(), _torch.below_autograd():
                self.known |= _measured(tape, new)
            costs += [self.known[k] for k in keys]
            if start == 0:
                _correct(tape, costs)
        return costs


def _correct(tape: Tape, costs: Sequence[Cost]) -> None:
    """Give a tape the results that operators of its forward really have."""
    real: dict[Spot, Spot] = {}
    for op, cost in zip(tape.ops, costs, strict=False):
        for spot, found in zip(op.outs, cost.results, strict=False):
            if spot is not None and found not in (None, spot.place[:3]) and spot.value in op.makes:
                dtype, shape, stride = found
                real[spot] = replace(spot, dtype=dtype, shape=shape, stride=stride)
                extent = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
                tape.memories[tape.memory_of[spot.value]].size = extent * dtype.itemsize * (0 not in shape)

    def corrected(s: Spot) -> Spot:
        return real.get(s, s)

    if real:
        for p in tape.packs:
            p.spot = None if p.spot is None else corrected(p.spot)
        for op in tape.ops:
            op.args, op.kwargs, op.reads, op.outs = pytree.tree_map_only(
                Spot, corrected, (op.args, op.kwargs, op.reads, op.outs)
            )


@contextlib.contextmanager
def _plain() -> Generator[None]:
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        for kind in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def signature(tape: Tape, op: Op) -> Hashable:
    """Return what tells calls of operators apart, but for numbers in tensors."""
    first: dict[int, int] = {}
    leaves, spec = pytree.tree_flatten((op.args, op.kwargs))
    found: list[Hashable] = []
    for leaf in leaves:
        if isinstance(leaf, Spot):
            memory = tape.memory_of[leaf.value]
            found.append((first.setdefault(memory, len(first)), tape.memories[memory].device, *leaf.place))
        else:
            found.append((type(leaf), leaf if isinstance(leaf, Hashable) else str(leaf)))
    return op.func, tuple(found), str(spec)


def _measured(tape: Tape, new: dict[Hashable, Op]) -> dict[Hashable, Cost]:
    found: dict[Hashable, Cost] = {}
    for device in dict.fromkeys(device_of(tape, op) for op in new.values()):
        mine = {k: op for k, op in new.items() if device_of(tape, op) == device}
        found |= zip(mine, (on_cpu if device.type == "cpu" else on_cuda)(tape, [*mine.values()]), strict=True)
    for k, op in new.items():
        if op.makes:
            with contextlib.suppress(Exception):
                found[k] = replace(found[k], seconds=seconds(op, *operands(tape, op), device_of(tape, op)))
    return found

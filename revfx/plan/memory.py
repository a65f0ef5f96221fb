"""The memory of a tape's values: whether operators fill it, and whether it is a kernel's workspace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from revfx.engine.operators import is_view
from revfx.engine.tape import Tape
from revfx.engine.unit import UnitOp
from revfx.plan.replays import Memory


MAX_FILLED = 2**24  # elements of uninitialized memory of which it is looked at whether all parts are written


def is_filled(tape: Tape, value: int) -> bool:
    """Return whether operators write to all of uninitialized memory, perhaps part by part, before any reads it."""
    whole = tape.values[value]
    assert whole.op is not None
    count = tape.nbytes(value) // whole.view.dtype.itemsize
    written: torch.Tensor | None = None
    for op in tape.ops[whole.op + 1 :]:
        touched = [v for v in op.reads if tape.values[v].allocation == whole.allocation]
        if not touched or is_view(op.func):
            continue
        targets = [was for was, _ in op.written if was in touched]
        if value in targets:
            return True
        if not targets or count > MAX_FILLED or len(targets) < len(touched):
            return False
        if written is None:
            written = torch.zeros(count, dtype=torch.bool)
        for was in targets:
            view = tape.values[was].view
            if view.dtype != whole.view.dtype:
                return False
            written.as_strided(view.shape, view.stride, view.offset).fill_(True)
        if bool(written.all()):
            return True
    return False


def overwritten(tape: Tape, slots: Mapping[int, int], ops: range) -> frozenset[int]:
    """Return the slots, by value, of which operators write over elements, by this or another view."""
    of_allocation: dict[int, list[tuple[int, int]]] = {}
    for value, slot in slots.items():
        of_allocation.setdefault(tape.values[value].allocation, []).append((value, slot))
    found: set[int] = set()
    for number in ops:
        for was, after in tape.ops[number].written:
            written = tape.values[after]
            for value, slot in of_allocation.get(written.allocation, ()):
                known = tape.values[value]
                if known.writes < written.writes and known.view.overlaps(tape.values[was].view):
                    found.add(slot)
    return frozenset(found)


def is_workspace(tape: Tape, value: int) -> bool:
    """Return whether a value is bytes beside other results: a workspace of a kernel, with gaps of any content."""
    known = tape.values[value]
    return known.op is not None and known.view.dtype == torch.uint8 and not tape.ops[known.op].is_single


def first_slots(ops: Sequence[UnitOp], memory: Memory) -> dict[int, int]:
    """Return the slots of tensors that were written to by other views, each with the first slot of that tensor."""
    made: set[int] = set()
    for op in ops:
        made.update(op.outs)
    found = {s: before for s, before in memory.before.items() if s not in made}
    for s in found:
        while found[s] in found:
            found[s] = found[found[s]]
    return found

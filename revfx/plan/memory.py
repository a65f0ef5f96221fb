"""The allocations of a tape's values: uninitialized ones, kernels' workspaces, and writes by several views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from revfx.engine.operators import UNINITIALIZED, is_view
from revfx.engine.tape import Tape
from revfx.engine.unit import UnitOp
from revfx.passes._torch import packet_name
from revfx.plan.replays import SlotMemory


MAX_CHECKED_ELEMENTS = 2**24  # of an uninitialized allocation; writes to parts of a larger one are not tracked


def is_unfilled(tape: Tape, value: int) -> bool:
    """Return whether a value is uninitialized memory that operators read before they fill it, as NumPy does that."""
    at = tape.values[value].op
    return at is not None and packet_name(tape.ops[at].func) in UNINITIALIZED and not _is_filled(tape, value)


def _is_filled(tape: Tape, value: int) -> bool:
    """Return whether operators write all of an uninitialized allocation, perhaps part by part, before any reads it."""
    whole = tape.values[value]
    assert whole.op is not None
    count = tape.nbytes(value) // whole.view.dtype.itemsize
    is_written: torch.Tensor | None = None  # by element
    for op in tape.ops[whole.op + 1 :]:
        touched = [v for v in op.reads if tape.values[v].allocation == whole.allocation]
        if not touched or is_view(op.func):
            continue
        targets = [was for was, _ in op.written if was in touched]
        if value in targets:
            return True
        has_reads = len(targets) < len(touched)
        if not targets or has_reads or count > MAX_CHECKED_ELEMENTS:
            return False
        if is_written is None:
            is_written = torch.zeros(count, dtype=torch.bool)
        for was in targets:
            view = tape.values[was].view
            if view.dtype != whole.view.dtype:
                return False
            is_written.as_strided(view.shape, view.stride, view.offset).fill_(True)
        if bool(is_written.all()):
            return True
    return False


def overwritten_slots(tape: Tape, slots: Mapping[int, int], ops: range) -> frozenset[int]:
    """Return the slots with elements that operators overwrite, by the same view or another one.

    `slots`: by value.
    """
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
    """Return whether a value is the workspace of a kernel: bytes beside other results, with gaps of any content."""
    known = tape.values[value]
    return known.op is not None and known.view.dtype == torch.uint8 and not tape.ops[known.op].is_single


def first_slots(ops: Sequence[UnitOp], memory: SlotMemory) -> dict[int, int]:
    """Return the slots of tensors after writes by other views, each with the first slot of the same tensor."""
    made: set[int] = set()
    for op in ops:
        made.update(op.outs)
    found = {slot: before for slot, before in memory.before.items() if slot not in made}
    for slot in found:
        while found[slot] in found:
            found[slot] = found[found[slot]]
    return found

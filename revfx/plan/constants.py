"""The constants of a tape: tensors from before the forward, and small ones that follow from them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from revfx._fsdp import is_freed
from revfx.engine import dispatch
from revfx.engine.tape import Ref, Tape


def constants_of(tape: Tape) -> dict[int, Tensor]:
    """Return the constants of a tape, by value; those that follow from others are recomputed."""
    found: dict[int, Tensor] = {}
    for value in sorted({*tape.constants, *tape.fixed}):
        t = tape.constants.get(value)
        if t is None:
            t = _compute(tape, value, found)
        if t is not None and not is_freed(t):
            found[value] = t
    return found


def _compute(tape: Tape, value: int, known: dict[int, Tensor]) -> Tensor | None:
    """Return a value that an operator computes from known ones; None if it reads others, or writes."""
    at = tape.values[value].op
    if at is None:
        return None
    op = tape.ops[at]
    if op.written or not known.keys() >= {*op.reads}:
        return None
    args, kwargs = pytree.tree_map_only(Ref, lambda r: known[int(r)], (op.args, op.kwargs))
    with torch.no_grad(), dispatch.unseen():
        results = pytree.tree_leaves(op.func(*args, **kwargs))
    return results[op.outs.index(value)]

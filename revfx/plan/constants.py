"""The numbers of constants: of tensors that were there before a forward, and of small ones that follow from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from revfx._fsdp import is_freed
from revfx.engine import dispatch
from revfx.engine.tape import Ref, Tape


def constants_of(tape: Tape) -> dict[int, Tensor]:
    """Return the constants of a tape by value; those that follow from others are recomputed."""
    found: dict[int, Tensor] = {}
    for value in sorted({*tape.constants, *tape.fixed}):
        t = tape.constants.get(value)
        if t is None:
            t = _computed(tape, value, found)
        if t is not None and not is_freed(t):
            found[value] = t
    return found


def _computed(tape: Tape, value: int, known: dict[int, Tensor]) -> Tensor | None:
    """Return a value that an operator computes from known ones."""
    at = tape.values[value].op
    if at is None:
        return None
    op = tape.ops[at]
    if op.written or not all(v in known for v in op.reads):
        return None
    args, kwargs = _filled((op.args, op.kwargs), known)
    with torch.no_grad(), dispatch.unseen():
        results = pytree.tree_leaves(op.func(*args, **kwargs))
    return results[op.outs.index(value)]


def _filled(tree: Any, known: dict[int, Tensor]) -> Any:
    return pytree.tree_map_only(Ref, lambda r: known[int(r)], tree)

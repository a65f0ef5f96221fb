"""Collectives: operators that all processes of a group run together, and agree on whether to run again.

Replays run them again, as a checkpoint does. So no process may decide by itself that a unit with collectives is kept:
the others would wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from revfx.engine.operators import is_collective
from revfx.engine.unit import Unit


GROUP = "group_name"  # the argument that says which processes


def groups_of(unit: Unit) -> list[Any]:
    """Return the groups of processes that run the collectives of a unit."""
    found: dict[Any, None] = {}
    for op in unit.ops:
        if is_collective(op.func):
            names = [a.name for a in op.func._schema.arguments]
            if GROUP in names:
                at = names.index(GROUP)
                found[op.args[at] if at < len(op.args) else op.kwargs[GROUP]] = None
    return list(found)


def run_collective(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a collective, and wait for its results."""
    out = func(*args, **kwargs)
    if isinstance(out, Tensor):
        return _arrived(out)
    return [_arrived(t) for t in out]


def all_agree(answer: bool, groups: Sequence[Any], device: torch.device) -> bool:
    """Return whether all processes of some groups give the answer true."""
    for group in groups:
        answers = torch.tensor(int(answer), device=device)
        answer = bool(_arrived(torch.ops._c10d_functional.all_reduce(answers, "min", group)))
    return answer


def _arrived(t: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(t)

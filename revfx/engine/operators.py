"""Operators of torch as the engine sees them: the arguments that they write, and whether they may run again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from revfx.passes._torch import is_mutating, is_overload, may_alias


aten: Any = torch.ops.aten
STATISTICS: dict[Any, tuple[int, int]] = {  # arguments that a normalisation in training writes
    aten.native_batch_norm.default: (3, 4),
    aten._native_batch_norm_legit.default: (3, 4),
    aten.cudnn_batch_norm.default: (3, 4),
    aten.miopen_batch_norm.default: (3, 4),
}
# Their results are filled by a later write, perhaps unseen.
UNINITIALIZED = frozenset("empty empty_like empty_strided new_empty new_empty_strided empty_permuted resize".split())
# Of their first argument they read the shape, the strides, the dtype and the device alone.
OF_SHAPE = frozenset(
    "zeros_like ones_like full_like rand_like randn_like randint_like new_zeros new_ones new_full".split()
)


@cache
def is_writer(func: Any) -> bool:
    """Return whether an operator writes to an argument, but for running statistics."""
    return is_overload(func) and is_mutating(func) and func not in STATISTICS


def changes_versions(func: Any) -> bool:
    """Return whether version counters change as an operator returns: it writes, or a view takes over its base's."""
    return is_overload(func) and _changes_versions(func)


@cache
def _changes_versions(func: Any) -> bool:
    return is_writer(func) or may_alias(func)


@cache
def written_positions(func: Any) -> tuple[tuple[int, str], ...]:
    """Return the positions and names of the arguments that an operator writes to."""
    found: list[tuple[int, str]] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append((position, argument.name))
    return tuple(found)


def written_arguments(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors among the arguments that an operator writes to, but for running statistics."""
    if func in STATISTICS or not is_mutating(func):
        return []
    found: list[Tensor] = []
    for position, name in written_positions(func):
        given = args[position] if position < len(args) else kwargs.get(name)
        several = given if isinstance(given, (list, tuple)) else [given]
        found += [t for t in several if isinstance(t, Tensor)]
    return found


def is_repeatable(func: Any) -> bool:
    """Return whether an operator computes the same results again, given the random state: one of torch's own, or a
    collective.
    """
    if not is_overload(func):
        return getattr(func, "is_repeatable", False)  # a compiled part
    return func.namespace in ("aten", "prims") or is_collective(func)


def is_collective(func: Any) -> bool:
    """Return whether all processes of a group run an operator together, or wait for one."""
    return is_overload(func) and func.namespace in ("_c10d_functional", "_c10d_functional_autograd")


def is_question(func: Any) -> bool:
    """Return whether an operator asks a tensor for its device or layout, as happens to fake ones alone."""
    return is_overload(func) and func.namespace == "prim"


def is_view(func: Any) -> bool:
    """Return whether an operator returns a view of its arguments."""
    return is_overload(func) and may_alias(func) and not is_mutating(func)

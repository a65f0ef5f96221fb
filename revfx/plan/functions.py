"""The functions of couplings: modules that a replay runs again whole, and that may be compiled."""

from __future__ import annotations

import itertools

from torch import nn

from revfx.plan.couplings import Couplings
from revfx.plan.spans import Span, find_spans


def functions_of(found: Couplings, model: nn.Module) -> dict[str, str]:
    """Return the largest modules with calls that lie within one unit each, and are not inverted.

    Returns:
        By path, the user's file and line in the module.
    """
    # A module is split if an operator of a call is in no unit, or in another unit than the one before.
    unit_of = _recomputed_units(find_spans(found))
    split: set[str] = {""}
    where: dict[str, str] = {}  # by path, the first line
    paths_before: list[str] = []  # of the modules around the operator before
    unit_before: int | None = None
    for number in sorted(set(found.tape_graph.op_of.values())):  # without views of parameters
        op = found.tape.ops[number]
        paths = _enclosing_paths(op.module)
        unit = unit_of.get(number)
        for path in paths:
            where.setdefault(path, op.where)
            is_same_call = path in paths_before
            if unit is None or (is_same_call and unit != unit_before):
                split.add(path)
        paths_before, unit_before = paths, unit

    largest: dict[str, str] = {}
    for path in sorted(where, key=len):
        has_forward = path not in split and type(model.get_submodule(path)).forward is not nn.Module.forward
        if has_forward and largest.keys().isdisjoint(_enclosing_paths(path)):
            largest[path] = where[path]
    return largest


def _recomputed_units(units: list[Span]) -> dict[int, int]:
    """Return by operator the number of its unit, if nothing inverts the operator."""
    found: dict[int, int] = {}
    for number, span in enumerate(units):
        found.update(dict.fromkeys(set(span.ops) - span.inverted, number))
    return found


def _enclosing_paths(path: str) -> list[str]:
    """Return the paths of a module and of those around it, the outermost one first."""
    return list(itertools.accumulate(path.split("."), "{}.{}".format))

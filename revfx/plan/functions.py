"""The functions of couplings: modules that a replay runs again whole, and that may be compiled."""

from __future__ import annotations

from torch import nn

from revfx.plan.couplings import Couplings
from revfx.plan.units import Span, spans


def functions_of(found: Couplings, model: nn.Module) -> dict[str, str]:
    """Return the paths of the largest modules with calls that lie within one unit each, and are not inverted.

    Returns:
        By path, the user's file and line in the module.
    """
    unit_of = _units(spans(found))
    bad: set[str] = {""}
    first: dict[str, str] = {}  # by path, the first line
    before: list[str] = []  # the modules around the operator before
    unit_before: int | None = None
    for number in sorted({*found.of.op_of.values()}):  # but views of parameters
        op = found.tape.ops[number]
        paths = _around(op.module)
        unit = unit_of.get(number)
        for path in paths:
            first.setdefault(path, op.where)
            goes_on = path in before and unit != unit_before
            if unit is None or goes_on:
                bad.add(path)
        before, unit_before = paths, unit
    good: dict[str, str] = {}
    for path in sorted(first, key=len):
        has_forward = path not in bad and type(model.get_submodule(path)).forward is not nn.Module.forward
        if has_forward and not any(outer in good for outer in _around(path)):
            good[path] = first[path]
    return good


def _units(units: list[Span]) -> dict[int, int]:
    """Return by operator the number of its unit, of those that nothing inverts."""
    found: dict[int, int] = {}
    for number, span in enumerate(units):
        for op in range(span.first, span.last + 1):
            if op not in span.inverted:
                found[op] = number
    return found


def _around(path: str) -> list[str]:
    """Return the paths of a module and of those around it."""
    names = path.split(".")
    return [".".join(names[: k + 1]) for k in range(len(names))]

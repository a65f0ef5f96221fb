"""Units and plans, as the extension of the native watcher takes them."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from typing import Any

from revfx.engine.checkers import COMPARED, is_factory
from revfx.engine.forward import drops
from revfx.engine.operators import is_writer, written_positions
from revfx.engine.plan import Plan, UnitPlan
from revfx.engine.unit import Number, Slot, Unit, UnitOp
from revfx.passes._torch import is_overload


LOG = logging.getLogger("revfx")
MADE, FIRST_EXTERNAL, EXTERNAL, NUMBER, CONSTANT, LIST, ANY = range(7)  # kinds of arguments
IGNORED, EXTERNAL_RESULT, MADE_RESULT, MADE_AGAIN = range(4)  # kinds of results
NONE, SAME, DETACH, ALIAS, COPY = range(5)  # ways to hold a result
_plans: weakref.WeakKeyDictionary[Plan, tuple[Any, ...]] = weakref.WeakKeyDictionary()
_units: weakref.WeakKeyDictionary[UnitPlan, Any] = weakref.WeakKeyDictionary()


def compiled_plan(module: Any, plan: Plan) -> Any:
    """Return a plan for the extension, compiled when it has learnt something."""
    known = _plans.get(plan)
    units = list(plan.units.values())
    paths = (plan.path, *plan.others)
    state = [(unit, unit.is_fallback) for unit in units], paths
    if known is not None and known[0] == state:
        return known[1]
    compiled = module.Plan()
    for unit_plan in units:
        if unit_plan not in _units:
            _units[unit_plan] = _compiled_unit(module, unit_plan.unit)
        if _units[unit_plan] is not None:
            compiled.add(unit_plan, _units[unit_plan])
    for path in plan.others:
        for unit_plan, first in zip(path.sequence, path.firsts, strict=False):
            compiled.begin_at(first, unit_plan)
    compiled.drop_at([*frozenset().union(*(path.dropped_at for path in paths))])
    _plans[plan] = state, compiled
    return compiled


def _compiled_unit(module: Any, unit: Unit) -> Any:
    """Return a unit for the extension; None if the native watcher can't see or compare one of its operators."""
    compiled = module.Unit(unit.slots, unit.numbers, drops(unit), unit.renamed, [*unit.read])
    generator = _Describer(unit)
    for number, op in enumerate(unit.ops):
        if not is_overload(op.func):
            return None
        try:
            compiled.add(*generator.describe(op), unit.rewritten(number))
        except (RuntimeError, TypeError, ValueError) as e:
            LOG.info("The native watcher leaves out %s: %s", unit, e)
            return None
    return compiled


Pattern = tuple[int, int, tuple[int, ...] | None, bool, Any]


class _Describer:
    """Describes the operators of a unit, in order; see `Checker` for the counterpart in Python."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.bound: set[int] = set()  # external slots that appeared
        self.done: set[int] = set()  # slots of results that were made
        self.cloned: list[int] = []  # external slots of the operator that are copied before it

    def describe(self, op: UnitOp) -> tuple[Any, ...]:
        """Return the arguments of the extension's `Unit.add`."""
        self.cloned = self._first_written(op)
        schema = op.func._schema
        arguments: list[Pattern | None] = []
        positions = iter(op.args)
        for argument in schema.arguments:
            # Python's handlers are given trailing arguments only if they differ from their defaults
            if argument.name in op.kwargs:
                arguments.append(self._argument(op.kwargs[argument.name]))
            elif argument.kwarg_only:
                arguments.append(None)
            else:
                given = next(positions, self)
                arguments.append(None if given is self else self._argument(given))
        results: list[Any] = []
        if any(slot >= 0 for slot in op.outs):
            for slot in op.outs:
                results.append(self._result(op, slot))
        return schema.name, schema.overload_name, arguments, results, op.is_single, op.state >= 0, self.cloned

    def _first_written(self, op: UnitOp) -> list[int]:
        """Return the external tensors that their first operator writes to, and that are read again."""
        found: list[int] = []
        for position, name in written_positions(op.func) if is_writer(op.func) else ():
            a = op.args[position] if position < len(op.args) else op.kwargs.get(name)
            if type(a) is Slot and a in self.unit.external & self.unit.read and a not in self.bound:
                found.append(int(a))
        return found

    def _argument(self, a: Any) -> Pattern:
        if type(a) is Slot:
            return self._slot(int(a))
        if type(a) is Number:
            return NUMBER, int(a), None, False, None
        if isinstance(a, (list, tuple)) and _has_slot(a):
            return LIST, -1, None, False, [self._argument(x) for x in a]
        return (CONSTANT if _is_compared(a) else ANY), -1, None, False, a

    def _slot(self, slot: int) -> Pattern:
        slot = self.unit.same.get(slot, slot)
        if slot not in self.unit.external:
            return MADE, slot, None, False, None
        if slot in self.bound:
            return EXTERNAL, slot, None, False, None
        self.bound.add(slot)
        if slot in self.unit.cloned:
            self.cloned.append(slot)
        return FIRST_EXTERNAL, slot, self.unit.shapes.get(slot), slot in self.unit.layouts, None

    def _result(self, op: UnitOp, slot: int) -> tuple[Any, ...]:
        unit = self.unit
        if slot in self.done:
            return MADE_AGAIN, slot, None, NONE, NONE, False
        if slot < 0 or slot in self.bound:
            return IGNORED, -1, None, NONE, NONE, False
        self.done.add(slot)
        if slot in unit.external:
            self.bound.add(slot)
            return EXTERNAL_RESULT, slot, None, NONE, NONE, False
        held = alive = NONE
        if slot in unit.held:
            held = COPY if slot in unit.cloned else DETACH if is_factory(op) else ALIAS
        elif slot in unit.alive:
            alive = DETACH if op.is_view else SAME
        return MADE_RESULT, slot, unit.shapes.get(slot), held, alive, slot in unit.layouts


def _is_compared(a: Any) -> bool:
    if isinstance(a, (list, tuple)):
        return bool(a) and all(map(_is_compared, a))
    return a is None or isinstance(a, COMPARED)


def _has_slot(values: Sequence[Any]) -> bool:
    return any(type(x) is Slot or (isinstance(x, (list, tuple)) and _has_slot(x)) for x in values)

"""Checkers: generated functions that compare one operator with that of a unit, and note the numbers of the call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from revfx import _torch
from revfx.engine import dispatch
from revfx.engine.operators import is_writer, written_positions
from revfx.engine.randomness import state_before
from revfx.engine.unit import Number, Slot, Unit, UnitOp
from revfx.layout import address, copy_with_layout, offset_of


# Arguments of other classes, such as handles of the profiler, tell nothing.
COMPARED = (str, int, float, complex, torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True, slots=True)
class Checker:
    """The checker of one operator.

    Attributes:
        func: the operator.
        before: called with the match and the arguments before it runs; None if nothing is to be noted then.
        after: called with the match, the arguments and the result; returns whether it is the operator of the unit.
    """

    func: Any
    before: Callable[..., None] | None
    after: Callable[..., bool]


def checkers_of(unit: Unit) -> Sequence[Checker]:
    """Generate the checkers of all operators of a unit."""
    return _Generator(unit).run()


def is_factory(op: UnitOp) -> bool:
    """Return whether an operator makes a tensor of no others."""
    return op.is_single and not any(type(a) is Slot for a in (*op.args, *op.kwargs.values()))


def is_alias(a: Tensor | None, b: Any) -> bool:
    """Return whether two tensors are the same elements of the same memory, as a detached tensor and its original."""
    if a is None or not isinstance(b, Tensor) or a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not (_torch.is_plain(a) and _torch.is_plain(b)) or a.layout != torch.strided or b.layout != torch.strided:
        return False
    return address(a) == address(b) and a.stride() == b.stride()


class _Generator:
    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.bound: set[int] = set()  # external slots that appeared
        self.done: set[int] = set()  # slots of results that were made
        self.names: dict[str, Any] = {
            "Tensor": Tensor, "ref": weakref.ref, "state_before": state_before, "offset_of": offset_of,
            "alias": dispatch.alias, "is_alias": is_alias, "version": _torch.version, "copied": copy_with_layout,
        }  # fmt: skip
        self.lines: list[str] = []

    def run(self) -> Sequence[Checker]:
        has_before = [self._function(i, op) for i, op in enumerate(self.unit.ops)]
        exec("\n".join(self.lines), self.names)
        found: list[Checker] = []
        for i, op in enumerate(self.unit.ops):
            before = self.names[f"before_{i}"] if has_before[i] else None
            found.append(Checker(op.func, before, self.names[f"after_{i}"]))
        return found

    def _function(self, i: int, op: UnitOp) -> bool:
        self.before, self.after = list[str](), list[str]()
        if op.state >= 0:
            self.before.append("match.states.append(state_before(args, kwargs))")
        self._copy_before_write(op)
        self.after.append(f"if len(args) != {len(op.args)} or len(kwargs) != {len(op.kwargs)}: return False")
        for k, a in enumerate(op.args):
            self._argument(f"args[{k}]", a)
        for name, a in op.kwargs.items():
            self._argument(f"kwargs[{name!r}]", a)
        self._results(op)
        for first, slot in self.unit.rewritten(i):
            self.after.append(f"again = made[{first}]()")
            self.after.append("if again is None: return False")
            self.after.append(f"match.held[{slot}] = alias(again)")
        if self.before:
            self.lines += [f"def before_{i}(match, args, kwargs):", *(f"    {line}" for line in self.before)]
        self.lines.append(f"def after_{i}(match, args, kwargs, out):")
        self.lines += ["    made, external, numbers = match.made, match.external, match.numbers"]
        self.lines += [*(f"    {line}" for line in self.after), "    return True"]
        return bool(self.before)

    def _copy_before_write(self, op: UnitOp) -> None:
        """Hold a copy of an external tensor that its first operator writes to."""
        if not is_writer(op.func):
            return
        for position, name in written_positions(op.func):
            is_positional = position < len(op.args)
            a = op.args[position] if is_positional else op.kwargs.get(name)
            if type(a) is Slot and int(a) in self.unit.external & self.unit.read and int(a) not in self.bound:
                place = f"args[{position}]" if is_positional else f"kwargs[{name!r}]"
                self.before.append(f"match.held[{int(a)}] = copied({place})")

    def _argument(self, name: str, a: Any) -> None:
        if type(a) is Slot:
            self._slot(name, int(a))
        elif type(a) is Number:
            self.after.append(f"numbers[{int(a)}] = {name}")
        elif isinstance(a, (list, tuple)) and a:
            self.after.append(f"if len({name}) != {len(a)}: return False")
            for k, x in enumerate(a):
                self._argument(f"{name}[{k}]", x)
        elif a is None or isinstance(a, bool):
            self.after.append(f"if {name} is not {a}: return False")
        elif isinstance(a, COMPARED):
            constant = f"constant_{len(self.names)}"
            self.names[constant] = a
            self.after.append(f"if type({name}) is not type({constant}) or {name} != {constant}: return False")

    def _slot(self, name: str, slot: int) -> None:
        slot = self.unit.same.get(slot, slot)
        if slot not in self.unit.external:
            self.after.append(f"if made[{slot}]() is not {name} and not match.is_made({slot}, {name}): return False")
        elif slot in self.bound:
            self.after.append(
                f"if external[{slot}] is not {name} and not is_alias(external[{slot}], {name}): return False"
            )
        else:
            self.bound.add(slot)
            self.after.append(f"if not isinstance({name}, Tensor): return False")
            self.after.append(f"external[{slot}] = {name}")
            if slot in self.unit.entry:
                self.after.append(f"match.versions[{slot}] = version({name})")
            self._shape(name, slot)
            self._layout(name, slot)
            if slot in self.unit.cloned:
                self.before.append(f"match.held[{slot}] = copied({name})")

    def _shape(self, name: str, slot: int) -> None:
        shape = self.unit.shapes.get(slot)
        if shape is not None:
            self.after.append(f"if {name}.shape != {tuple(shape)}: return False")

    def _layout(self, name: str, slot: int) -> None:
        if slot in self.unit.layouts:
            layout = f"tuple({name}.shape), {name}.stride(), offset_of({name}), {name}.dtype, {name}.device"
            self.after.append(f"match.layouts[{slot}] = {layout}")

    def _results(self, op: UnitOp) -> None:
        unit = self.unit
        if not op.is_single and any(s >= 0 for s in op.outs):
            self.after.append(f"if len(out) != {len(op.outs)}: return False")
        for k, slot in enumerate(op.outs):
            if slot < 0 or slot in self.bound:
                continue
            name = "out" if op.is_single else f"out[{k}]"
            if slot in self.done:
                self.after.append(f"match.again.append(({slot}, ref({name}))); match.slot_of[id({name})] = {slot}")
                continue
            self.done.add(slot)
            if slot in unit.external:
                self.bound.add(slot)
                self.after.append(f"external[{slot}] = {name}")
                continue
            self._shape(name, slot)
            self.after.append(f"made[{slot}] = ref({name}); match.slot_of[id({name})] = {slot}")
            if slot in unit.held:
                held = f"copied({name})" if slot in unit.cloned else f"alias({name})"
                if is_factory(op):
                    held = f"{name}.detach()"  # as below
                self.after.append(f"match.held[{slot}] = {held}")
            elif slot in unit.alive:
                # not the result itself: autograd makes a view, or a new tensor, its own if nobody else refers to it
                self.after.append(f"match.alive[{slot}] = {name}.detach()")
            self._layout(name, slot)

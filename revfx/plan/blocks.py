"""The first forward of a kind: saved tensors are dropped block by block, as under a checkpoint of each block.

The plan is known only after the forward, which is too late for a model that does not fit. So the operators of each
block become a unit when the block ends. The unit is replayed at once and compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from revfx import _torch
from revfx._fsdp import is_freed
from revfx.engine import dispatch
from revfx.engine.backward import Pass
from revfx.engine.call import UnitCall, copy_held, memory_of
from revfx.engine.learn import Learning
from revfx.engine.operators import is_collective
from revfx.engine.proof import prove, same_values
from revfx.engine.saved import SavedTensor
from revfx.layout import copy_with_layout
from revfx.plan.nodes import layout_of
from revfx.plan.replays import Unreplayable
from revfx.plan.spans import Span
from revfx.plan.units import UnitBuilder


MODULE_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
MIN_FREED_RATIO = 2  # bytes that a block has to free for each byte of its inputs


def block_paths(model: nn.Module) -> dict[str, str]:
    """Return the block of each module, by path: the innermost member of a list of modules that has members itself."""
    found: dict[str, str] = {}
    lists: set[str] = set()
    for path, module in model.named_modules():
        parent = path.rpartition(".")[0]
        if parent in lists and next(module.children(), None) is not None:
            found[path] = path
        elif parent in found:
            found[path] = found[parent]
        if isinstance(module, MODULE_LISTS) and len(module) > 1:
            lists.add(path)
    return found


class BlockLearning(Learning):
    """Record the tape of a forward, and drop the saved tensors of each block as it ends.

    Attributes:
        proven: the values that were dropped after a replay returned the same bits.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor] = ()) -> None:
        super().__init__(model, inputs)
        self.proven: set[int] = set()
        self.backward_pass: Pass = Pass()
        self._blocks = block_paths(model)
        self._block = ""  # the block that runs now
        self._first = 0  # its first operator
        self._first_saved = 0
        self._holders: dict[int | None, list[UnitCall]] = {}  # by storage: calls that hold tensors in it
        self._operands: dict[int, tuple[Tensor, int]] = {}  # by value: tensors from before the block, with versions

    def before(self, module: str) -> None:
        """End a block, if the next operator lies in another one."""
        block = self._blocks.get(module, "")
        if block != self._block:
            self._end_block()
            self._block, self._first, self._first_saved = block, len(self.tape.ops), len(self.saved)
            self._operands = {}

    def number(self, t: Tensor) -> int:
        """Return the number of the value that `t` holds; hold `t` until the block ends if its replay needs it.

        The replay is also given the views that the block makes of outside memory.
        """
        value = super().number(t)
        if self._block and self._is_given(value, self._first) and value not in self._operands:
            self._operands[value] = dispatch.alias(t), _torch.version(t)
        return value

    def _is_given(self, value: int, first: int) -> bool:
        """Return whether a value is given to the replay of a block that begins with operator `first`."""
        op = self.tape.values[value].op
        return op is None or op < first or self.tape.is_outside(value)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if error[0] is None:
            self._end_block()

    def before_write(self, written: Sequence[Tensor]) -> None:
        """Copy the tensors that blocks hold in memory that is about to be written to."""
        for key in dict.fromkeys(map(memory_of, written)):
            if key is not None:
                copy_held(self._holders.pop(key, ()), key)
                self._copy_operands(self._operands, key)

    def _copy_operands(self, operands: dict[int, tuple[Tensor, int]], memory: int) -> None:
        for value, (t, version) in operands.items():
            if memory_of(t) == memory and _torch.version(t) == version:
                copy = copy_with_layout(t)
                operands[value] = copy, _torch.version(copy)

    def _end_block(self, last: int | None = None) -> None:
        """Drop the saved tensors of the block, which ends with operator `last`, or the latest one."""
        # Kernel settings would change the replay. Processes must agree on collectives, but may gain differently.
        first = self._first
        if last is None:
            last = len(self.tape.ops) - 1
        if not self._block or last <= first or self.tape.changes_settings or dispatch.on_fakes.get():
            return
        if any(is_collective(op.func) for op in self.tape.ops[first : last + 1]):
            return

        # The operators of the block become a unit, if dropping frees enough.
        span = Span(first, last, (), (), (), frozenset(), frozenset(), frozenset())
        builder = UnitBuilder(self.tape, span)
        try:
            unit = builder.run()
        except Unreplayable:
            return
        call = self._call(builder, unit)
        if call is None or self._gain(builder, call) <= 0:
            return

        # A replay at once proves the saved tensors that it returns with the same bits.
        by_slot: dict[int, list[SavedTensor]] = {}
        for saved, slot in self._droppable(builder, unit.droppable):
            by_slot.setdefault(slot, []).append(saved)
        value_of = {slot: value for value, slot in builder.slots.items()}

        def drop_if_same(slot: int, t: Tensor) -> None:
            for saved in by_slot.get(slot, ()):
                if saved.tensor is None:
                    continue
                if slot in unit.workspaces or same_values(t, saved.tensor):
                    saved.drop(call, slot)
                    call.pending[slot] = call.pending.get(slot, 0) + 1
                    self.proven.add(value_of[slot])

        prove(unit.forward, call.inputs(unit.forward), drop_if_same)
        for t in call.given.values():
            key = memory_of(t)
            if key is not None:
                self._holders.setdefault(key, []).append(call)

    def _droppable(self, builder: UnitBuilder, slots: frozenset[int]) -> Sequence[tuple[SavedTensor, int]]:
        """Return the saved tensors of the block that lie in some slots, with their slots."""
        found: list[tuple[SavedTensor, int]] = []
        of_block = slice(self._first_saved, None)
        for reference, (_, value) in zip(self.saved[of_block], self.tape.saved[of_block], strict=True):
            saved, slot = reference(), builder.slots.get(value)
            if saved is not None and slot in slots:
                found.append((saved, slot))
        return found

    def _gain(self, builder: UnitBuilder, call: UnitCall) -> int:
        """Return the bytes that dropping frees, minus `MIN_FREED_RATIO` times those that only the replay holds."""
        freed: dict[int, int] = {}
        held: dict[int, int] = {}
        saved_allocations = {self.tape.values[value].allocation for _, value in self.tape.saved[self._first_saved :]}
        for value, slot in builder.slots.items():
            allocation = self.tape.values[value].allocation
            is_temporary = self.tape.allocations[allocation].role in ("", "input")
            if slot in call.given and is_temporary and allocation not in saved_allocations:
                held[allocation] = self.tape.nbytes(value)
        for saved, _ in self._droppable(builder, call.unit.droppable):
            assert saved.tensor is not None
            freed[_torch.storage_key(saved.tensor)] = saved.tensor.untyped_storage().nbytes()
        return sum(freed.values()) - MIN_FREED_RATIO * sum(held.values())

    def _call(self, builder: UnitBuilder, unit: Any) -> UnitCall | None:
        """Return the call of a block's unit; None if an input of its replay is gone."""
        given: dict[int, Tensor] = {}
        for value, slot in builder.slots.items():
            if slot not in unit.given and slot not in unit.held:
                continue
            t, version = self._operands.get(value, (None, -1))
            if t is None or _torch.version(t) != version:
                t = self.tensor(value)
            if t is None or is_freed(t):
                return None
            allocation = self.tape.allocations[self.tape.values[value].allocation]
            is_written = allocation.is_outside and allocation.writes  # the next forward will write to it, too
            given[slot] = copy_with_layout(t) if is_written or slot in unit.cloned else dispatch.alias(t)
        layouts = {slot: layout_of(self.tape, value) for value, slot in builder.slots.items()}
        states = [op.state for op in self.tape.ops[self._first :] if op.state is not None]
        versions = {slot: _torch.version(t) for slot, t in given.items()}
        return UnitCall(unit, self.backward_pass, given, versions, builder.numbers, states, layouts)

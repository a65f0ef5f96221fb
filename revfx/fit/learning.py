"""Learning under a budget: a step runs as it is, below a checkpoint's memory, and is recorded with its backward."""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revfx import _torch
from revfx.engine import dispatch
from revfx.engine.call import memory_of
from revfx.engine.saved import SavedTensor
from revfx.engine.tape import Ref
from revfx.engine.whole import Whole
from revfx.fit.compiled import PartCall
from revfx.fit.grouping import RecordedStep
from revfx.fit.step_recorder import StepRecorder
from revfx.fit.tape import ValueView
from revfx.passes.sizes import tensors_of
from revfx.plan.blocks import BlockLearning


PART = 8  # a block ends when it saved more than this part of all so far ...
GAIN = 2.9  # ... and so many times the bytes that are handed on from it


@dataclass
class _Start:
    """Where a block may begin.

    Attributes:
        op: its first operator.
        of_step: the same, of the step's operators.
        saved: the number of saved tensors so far.
        handed_on: bytes that are made in the block before, and held by the program.
        of_block: bytes that the block before saved.
        operands: by value, tensors from before that it reads, with their versions.
    """

    op: int
    of_step: int
    saved: int
    handed_on: int
    of_block: int
    operands: dict[int, tuple[Tensor, int]] = field(default_factory=dict[int, "tuple[Tensor, int]"])


class StepLearning(BlockLearning):
    """Record the tape of a forward, drop the saved tensors of each block as it ends, and record the whole step.

    Blocks end where little is handed on. Where the next one begins shows a few operators later, so the tensors that it
    would read from before are held since.

    Args:
        finished: called with the recorder of the step when its backward has ended.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor], finished: Callable[[StepRecorder], None]) -> None:
        super().__init__(model, inputs)
        self.step: StepRecorder = StepRecorder(model, finished)
        self._block = type(model).__name__
        self._start = 0  # the first operator of the block, of those of the step
        self._next: _Start | None = None  # where the block may end
        self._time = dispatch.autograd_time()
        self._total = self._of_block = 0  # bytes of saved tensors, of all blocks and of this one
        self._ours: dict[int, int] = {}  # by storage: how many tensors in it are held for autograd, or for replays
        self._in_memory: dict[int, list[weakref.ref[SavedTensor]]] = {}  # by storage: the saved tensors
        self.value_of: dict[int, int] = {}  # by value of the tape, the value of the step
        self._unsettled: dict[int, Any] = {}  # storages of saved tensors that others may hold, as weak references
        self._settled: dict[int, Any] = {}  # those that no one else holds
        self.set_unpack(self.step.unpack)

    def before(self, module: str) -> None:
        """End the block, if more is handed on from here than before."""
        self._settle()
        handed_on = self.step.live_bytes(self._start)
        if self._next is not None and handed_on > self._next.handed_on:
            self._end_block(self._next.op - 1)
            self._begin(self._next)
            handed_on = self.step.live_bytes(self._start)
        if self._of_block >= max(self._total // PART, GAIN * handed_on, 1):
            before, start = self._next, (len(self.tape.ops), len(self.step.tape.ops), len(self.saved))
            self._next = _Start(*start, handed_on, self._of_block)
            if before is not None:
                self._recount()

    def _begin(self, start: _Start) -> None:
        self._first, self._first_saved, self._operands = start.op, start.saved, start.operands
        self._start, self._next = start.of_step, None
        self._total, self._of_block = self._total + start.of_block, self._of_block - start.of_block
        self._recount()

    def number(self, t: Tensor) -> int:
        """Return the number of the value that `t` holds; hold it until the block ends if another one made it."""
        held = len(self._operands)
        value = super().number(t)
        if len(self._operands) > held:
            self._count(t)
        start = self._next
        if start is not None and self._is_given(value, start.op) and value not in start.operands:
            start.operands[value] = dispatch.alias(t), _torch.version(t)
            self._count(t)
        return value

    def _copy_operands(self, operands: dict[int, tuple[Tensor, int]], memory: int) -> None:
        super()._copy_operands(operands, memory)
        if self._next is not None:
            super()._copy_operands(self._next.operands, memory)
        if memory in self._in_memory:
            self._ours[memory] = self._count_ours(memory)

    def _count(self, t: Tensor) -> None:
        """Count a tensor that is held for replays."""
        key = memory_of(t)
        if key is not None and not isinstance(t, nn.Parameter):
            self._watch(t, key)
            self._ours[key] = self._count_ours(key)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._operands, self._next = {}, None
        if error[0] is None:
            self._recount()
            self._settle()

    def end(self, inputs: Sequence[Tensor], returned: Sequence[Tensor]) -> RecordedStep:
        """Return the step before its backward; `inputs` and `returned` are the tensors of the forward."""
        self.tape.returned = [self.number(t) for t in returned]
        self.before_write([*inputs, *returned])  # whether they are shows in the next call
        step, proven = self.step, frozenset(self.proven)
        recorded = RecordedStep(step.tape, self.tape, step.numbers, self.value_of, proven, self._blocks)
        self._begin_backward(returned)
        return recorded

    def _begin_backward(self, returned: Sequence[Tensor]) -> None:
        self._unsettled, self._settled, self._in_memory, self._holders = {}, {}, {}, {}
        self.step.begin_backward(self._time, returned)

    def _note_saved(self, saved: SavedTensor, t: Tensor) -> None:
        super()._note_saved(saved, t)
        made_by = self.tape.values[self.tape.saved[-1][1]].op
        self.step.note_saved(saved, t, 0 if made_by is None else bisect_right(self.step.numbers, made_by))
        if t.layout == torch.strided and _torch.is_plain(t):
            key = _torch.storage_key(t)
            if isinstance(t, nn.Parameter):
                return
            if not self._in_memory.get(key):
                self._of_block += t.untyped_storage().nbytes()
            self._watch(t, key)
            self._in_memory[key].append(weakref.ref(saved))
            self._ours[key] = self._count_ours(key)

    def _watch(self, t: Tensor, key: int) -> None:
        """Look out for when nobody else holds the storage of a tensor any more."""
        if key not in self._in_memory:
            self._in_memory[key] = []
            self._unsettled[key] = weakref.ref(t.untyped_storage(), lambda _: self._gone(key))

    def _gone(self, key: int) -> None:
        """Forget a storage: another one may take its key."""
        for tensors in (self._unsettled, self._settled, self._in_memory, self._ours):
            tensors.pop(key, None)

    def _recount(self) -> None:
        for key in self._unsettled:
            self._ours[key] = self._count_ours(key)

    def _count_ours(self, key: int) -> int:
        """Return how many tensors in a storage are held for autograd, or for replays."""
        saved = [reference() for reference in self._in_memory[key]]
        count = sum(1 for s in saved if s is not None and s.tensor is not None)
        for operands in (self._operands, {} if self._next is None else self._next.operands):
            count += sum(1 for t, _ in operands.values() if memory_of(t) == key)
        for call in dict.fromkeys(self._holders.get(key, ())):
            count += sum(1 for t in call.given.values() if memory_of(t) == key)
        return count

    def _settle(self) -> None:
        """Note the storages that nobody but autograd holds any more."""
        for key, reference in [*self._unsettled.items()]:
            storage = reference()
            if storage is not None and _torch.users_of(storage) <= self._ours[key]:
                self.step.end_of(key)
                self._settled[key] = self._unsettled.pop(key)

    def _record(self, func: Any, args: Any, kwargs: Any, run: Callable[..., Any]) -> Any:
        known, time = self.step.before(func, args, kwargs), dispatch.autograd_time()
        out = super()._record(func, args, kwargs, run)
        op = self.tape.ops[-1]
        if isinstance(func, Whole):
            self.step.tape.offered += [s.value for s in known.views if isinstance(s, ValueView)]
            self.step.parts.append(PartCall(func, known.views, time, dispatch.autograd_time()))
        self.step.after(known, out, len(self.tape.ops) - 1, op.module, op.where)
        for ref, view in zip(pytree.tree_leaves((op.args, op.kwargs)), known.views, strict=True):
            if type(ref) is Ref and isinstance(view, ValueView):
                self.value_of[int(ref)] = view.value
        for t in (*known.given, *tensors_of(out)):
            if isinstance(t, Tensor) and self.is_known(t):
                self._note_value(t)
        return out

    def _note_value(self, t: Tensor) -> None:
        """Note which value of the step a tensor holds now."""
        view = self.step.view(t)
        if view is None:
            return
        self.value_of[super().number(t)] = view.value
        key = _torch.storage_key(t)
        if key in self._settled:  # autograd's own functions may hold more than shows
            self._unsettled[key] = self._settled.pop(key)
            self._ours[key] = self._count_ours(key)

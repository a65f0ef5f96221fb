"""The recorder of a training step: operators, allocations and saved tensors, as they appear.

The forward is recorded beside the engine's tape of it (`learning.py`). The backward is seen by hooks on the nodes of
autograd's graph: each turns on a dispatch mode, which lasts until its node has run.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from revfx import _torch
from revfx.engine import dispatch
from revfx.engine.operators import written_positions
from revfx.engine.saved import SavedTensor
from revfx.engine.wrappers import SavedWrapper
from revfx.fit.compiled import Back, PartCall
from revfx.fit.tape import SavedRecord, StepAllocation, StepOp, Tape, ValueView
from revfx.passes._torch import is_mutating, is_overload
from revfx.passes.sizes import tensors_of


@dataclass
class Before:
    """An operator that is about to run.

    Attributes:
        given: its arguments, flat.
        views: the same, with views in the place of tensors.
        spec: their structure.
        written: the views that it writes to.
    """

    func: Any
    given: Sequence[Any]
    views: Sequence[Any]
    spec: pytree.TreeSpec
    written: tuple[ValueView, ...]


class StepRecorder:
    """Records a step; see `Tape`.

    Args:
        model: its parameters and buffers, and tensors that are known to nobody, were there before the step.
        finished: called with this object when the first backward pass has ended.

    Attributes:
        numbers: by operator of the forward, its number on the engine's tape.
        is_backward: the forward is through.
        begins: called when the backward begins.
    """

    def __init__(self, model: nn.Module, finished: Callable[[StepRecorder], None]) -> None:
        self.tape: Tape = Tape()
        self.numbers: list[int] = []
        self._before = set[int]()  # storages of parameters and their gradients
        self._parameters = [*model.parameters()]
        for p in self._parameters:
            for t in (p, p.grad):
                if t is not None and _is_strided(t):
                    self._before.add(_torch.storage_key(t))
        self.begins: Callable[[], None] | None = None
        self._finished: Callable[[StepRecorder], None] | None = finished
        self._known: dict[int, tuple[int, Any]] = {}  # by storage: its allocation, and a weak reference
        self._live: set[int] = set()  # allocations that others than autograd hold
        self._saved_numbers = weakref.WeakKeyDictionary[SavedTensor, int]()
        self._doubles: dict[int, tuple[set[int], Any]] = {}  # by storage: the saved tensors that the backward got in it
        self._moment, self._turns = -1, 0  # before which operator autograd kept or read last, and how much it read
        self._handles: list[Any] = []
        self._watched: list[Any] = []  # weak references, which call back
        self.is_backward: bool = False
        self._has_begun = False
        self._task = -1  # the number of the backward pass
        self.parts: list[PartCall] = []
        self.begun: set[int] = set()  # parts of which a backward has run

    @property
    def is_over(self) -> bool:
        """Whether its backward has ended, or will not be recorded."""
        return self._finished is None

    # --- allocations
    def view(self, t: Tensor, made: bool = False) -> ValueView | None:
        """Return where a tensor lies; None if it has no storage of its own."""
        if not _is_strided(t):
            return None
        key = _torch.storage_key(t)
        if key not in self._known:
            self._enter(t, key, made)
        number = self._known[key][0]
        allocation = self.tape.allocations[number]
        if allocation.end is not None and not self.is_backward:  # somebody held it all the same
            allocation.end = None
            self._live.add(number)
        value = allocation.values[-1]
        return ValueView(value, t.dtype, tuple(t.shape), tuple(t.stride()), int(t.storage_offset()))

    def _enter(self, t: Tensor, key: int, made: bool) -> None:
        storage, number = t.untyped_storage(), len(self.tape.allocations)
        allocation = StepAllocation(storage.nbytes(), t.device, len(self.tape.ops))
        if not made and (key in self._before or not self.is_backward):
            allocation.is_outside, allocation.storage = True, key
        self.tape.allocations.append(allocation)
        self._value(number, len(self.tape.ops) if made else None)
        self._live.add(number)
        self._known[key] = number, weakref.ref(storage, lambda _: self._leave(key, number, allocation))

    def _leave(self, key: int, number: int, allocation: StepAllocation) -> None:
        self._live.discard(number)
        if allocation.end is None:
            allocation.end = self.slot()
        self._known.pop(key, None)

    def live_bytes(self, start: int) -> int:
        """Return the bytes that operators from `start` on have made and others than autograd hold."""
        found = 0
        for number in self._live:
            allocation = self.tape.allocations[number]
            if allocation.born >= start and not allocation.is_outside:
                found += allocation.size
        return found

    def slot(self) -> int:
        """Return the slot from which on an allocation that is freed now is gone."""
        return 2 * len(self.tape.ops) + (self._moment == len(self.tape.ops))

    def _value(self, allocation: int, op: int | None) -> None:
        self.tape.allocations[allocation].values.append(len(self.tape.allocation_of))
        self.tape.allocation_of.append(allocation)
        self.tape.made_by.append(op)

    def end_of(self, key: int) -> None:
        """Note that from now on nobody but autograd holds a storage, given by its key."""
        known = self._known.get(key)
        if known is not None and self.tape.allocations[known[0]].end is None:
            self.tape.allocations[known[0]].end = self.slot()
            self._live.discard(known[0])

    # --- operators
    def before(self, func: Any, args: Any, kwargs: Any) -> Before:
        """Return the operands of an operator that is about to run."""
        given, spec = pytree.tree_flatten((args, kwargs))
        views = [self.view(t) if isinstance(t, Tensor) else t for t in given]
        written = _written(func, args, kwargs) if is_overload(func) and is_mutating(func) else ()
        old = tuple([s for t in written if (s := self.view(t)) is not None])
        return Before(func, given, views, spec, old)

    def after(self, known: Before, out: Any, number: int, module: str, where: str) -> None:
        """Add an operator that has run, unless it made nothing but views.

        Args:
            known: from before it ran.
            out: its result.
            number: its number on the engine's tape.
            module, where: the innermost module, and the user's line; in the backward the name of autograd's node.
        """
        owned = {_torch.storage_key(t) for t in known.given if isinstance(t, Tensor) and _is_strided(t)}
        made = [t for t in tensors_of(out) if _is_strided(t) and _torch.storage_key(t) not in owned]
        if not made and not known.written:
            return
        tape = self.tape
        for at, t in enumerate(known.given):
            if isinstance(t, Tensor) and _is_strided(t):
                saved, _ = self._doubles.get(_torch.storage_key(t), ((), None))
                for k in saved:
                    tape.reads.setdefault(k, set()).add((len(tape.ops), at))
        before = len(tape.allocation_of)
        for s in known.written:
            self._value(tape.allocation_of[s.value], len(tape.ops))
        outs = tuple([self.view(t, True) if isinstance(t, Tensor) else None for t in pytree.tree_leaves(out)])
        args, kwargs = pytree.tree_unflatten(known.views, known.spec)
        reads, makes = (
            tuple([s for s in known.views if isinstance(s, ValueView)]),
            tuple(range(before, len(tape.allocation_of))),
        )
        tape.ops.append(StepOp(known.func, tuple(args), kwargs, reads, outs, known.written, makes, module, where))
        if not self.is_backward:
            self.numbers.append(number)

    # --- autograd
    def note_saved(self, saved: SavedTensor, t: Tensor, made: int) -> None:
        """Note a saved tensor: the object that autograd holds, the tensor that it stands for, and how many operators
        ran before this was made.
        """
        view, records, self._moment = self.view(t), self.tape.saved, len(self.tape.ops)
        record = SavedRecord(None if isinstance(t, nn.Parameter) else view, len(self.tape.ops), made)
        records.append(record)
        self._saved_numbers[saved] = len(records) - 1
        self._watched.append(weakref.ref(saved, lambda _: self._released(record)))

    def _released(self, record: SavedRecord) -> None:
        record.end = self.slot()

    @_torch.never_compiled
    def unpack(self, saved: SavedTensor | SavedWrapper) -> Tensor:
        """Return the tensor of a saved tensor that the backward reads."""
        t = saved.get()
        number = self._saved_numbers.get(saved) if isinstance(saved, SavedTensor) else None
        if number is None or not self.is_backward or self._finished is None:
            return t
        record, self._moment = self.tape.saved[number], len(self.tape.ops)
        if record.read_at is None:
            record.read_at, record.read_order = len(self.tape.ops), self._turns
            self._turns += 1
        if _is_strided(t) and record.view is not None:
            key = _torch.storage_key(t)
            if key not in self._doubles:
                reference = weakref.ref(t.untyped_storage(), lambda _: self._gone(key))
                self._doubles[key] = set(), reference
                self._known.setdefault(key, (self.tape.allocation_of[record.view.value], reference))
            self._doubles[key][0].add(number)
        return t

    def _gone(self, key: int) -> None:
        """Note that the backward has freed the tensors in a storage."""
        self._known.pop(key, None)
        for number in self._doubles.pop(key)[0]:
            self.tape.saved[number].end = self.slot()

    # --- the backward
    def begin_backward(self, start: int, returned: Sequence[Tensor]) -> None:
        """Note that the forward is through, and look at the backward.

        Args:
            start: the number of autograd's nodes at which the forward began.
            returned: the tensors that it returned.
        """
        self.tape.backward_start, self.is_backward = len(self.tape.ops), True
        needing = [t for t in returned if t.requires_grad]
        needing = [t for t in needing if not t.dim()] or needing  # where there is a loss, it is what is differentiated
        self.tape.output_bytes = sum(t.nbytes for t in needing if t.dim())
        for t in returned:
            known = self._known.get(_torch.storage_key(t)) if _is_strided(t) else None
            if known is not None:
                self.tape.allocations[known[0]].returned = True
        see, found = _Backward(self), set[Any]()
        todo: list[Any] = [t.grad_fn for t in returned]
        while todo:
            node = todo.pop()
            if node is None or node in found or node._sequence_nr() < start:
                continue
            found.add(node)
            is_shared = node.name().endswith("AccumulateGrad")  # by the backwards of other forwards
            part = self._part_of(node)
            if part is not None:
                watch = _PartBackward(self, part, node.name())
                self._handles += [node.register_prehook(watch.begin), node.register_hook(watch.end)]
            else:
                self._handles.append(node.register_prehook(see.begin_shared if is_shared else see.begin))
            todo += [following for following, _ in node.next_functions]

    def _part_of(self, node: Any) -> PartCall | None:
        """Return the call of a compiled part of which the compiler made the backward that a node runs."""
        at = bisect_right(self.parts, node._sequence_nr(), key=lambda part: part.start) - 1
        if at < 0 or node._sequence_nr() >= self.parts[at].stop or not _torch.is_compiled_node(node):
            return None
        return self.parts[at]

    def begin(self, is_shared: bool) -> bool:
        """Return whether the backward is to be recorded; note its first node."""
        if is_shared and self._task != _torch.graph_task_id():
            return False
        if torch.is_grad_enabled():  # the backward has a graph of its own, and all of this one stays
            self._finished = None
        if self._finished is None:
            return False
        if not self._has_begun:
            self._has_begun, self._task = True, _torch.graph_task_id()
            if self.begins is not None:
                self.begins()
            _torch.at_end_of_backward(self._end)
        return True

    def _end(self) -> None:
        finished, self._finished = self._finished, None
        for handle in self._handles:
            handle.remove()
        self._handles = []
        tape = self.tape
        self._find_outside()
        self._end_gradients()
        for m in tape.allocations:
            if m.returned and not m.is_outside and m.born < tape.backward_start:
                m.end = 2 * max(tape.backward_start, m.born + 1) + 1
        self._known, self._doubles, self._watched, self._parameters = {}, {}, [], []
        is_kept = any(p.read_at is not None and p.end is None for p in tape.saved)
        if finished is not None and not is_kept:  # the graph, for another backward
            finished(self)

    def _find_outside(self) -> None:
        """Mark memory from before the step that the backward sees first, such as buckets of gradients."""
        for m in self.tape.allocations:
            if m.end is None and self.tape.made_by[m.values[0]] is None:
                m.is_outside = True

    def _end_gradients(self) -> None:
        """Have gradients that the step is the first to make end when they are added: later ones find them there."""
        for p in self._parameters:
            known = None if p.grad is None or not _is_strided(p.grad) else self._known.get(_torch.storage_key(p.grad))
            if known is not None and not self.tape.allocations[known[0]].is_outside:
                allocation = self.tape.allocations[known[0]]
                allocation.end = min(2 * (allocation.born + 1) + 2, 2 * len(self.tape.ops) + 1)


class _PartBackward:
    """Records the backward of a compiled part as one operator."""

    def __init__(self, recorder: StepRecorder, part: PartCall, name: str) -> None:
        self._recorder, self._part, self._name = recorder, part, name
        self._known: Before | None = None

    @_torch.never_compiled
    def begin(self, _: Any) -> None:
        """Note that it is about to run."""
        if self._recorder.begin(False):
            spec = pytree.tree_structure((tuple(self._part.operands), {}))
            back = Back(self._part.whole, is_rest=self._part.start in self._recorder.begun)
            self._recorder.begun.add(self._part.start)
            self._known = Before(back, (), self._part.operands, spec, ())

    @_torch.never_compiled
    def end(self, gradients: Sequence[Tensor | None], _: Any) -> None:
        """Add it to the tape: it has run."""
        known, self._known = self._known, None
        if known is not None:
            self._recorder.after(known, gradients, -1, "", self._name)


class _Backward(TorchDispatchMode):
    """Records the operators of a backward; it is on while a node runs."""

    supports_higher_order_operators = True

    def __init__(self, recorder: StepRecorder) -> None:
        super().__init__()
        self._recorder = recorder

    @_torch.never_compiled
    def begin(self, _: Any) -> None:
        """Go on for the node that is about to run."""
        if self._recorder.begin(False):
            dispatch.push_mode(self)

    @_torch.never_compiled
    def begin_shared(self, _: Any) -> None:
        """Go on for a node that other graphs share, if it is this backward that comes to it."""
        if self._recorder.begin(True):
            dispatch.push_mode(self)

    @_torch.never_compiled
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(map(dispatch.is_wrapper, types)):
            return NotImplemented
        if not is_overload(func):
            return func(*args, **kwargs)
        known = self._recorder.before(func, args, kwargs)
        out = func(*args, **kwargs)
        node = _torch.backward_node()
        self._recorder.after(known, out, -1, "", "" if node is None else node.name())
        return out


def _is_strided(t: Tensor) -> bool:
    return t.layout == torch.strided and _torch.is_plain(t) and not t.is_nested and not is_lazy(t)


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors among the arguments that an operator writes."""
    found: list[Tensor] = []
    for position, name in written_positions(func):
        found += tensors_of(args[position] if position < len(args) else kwargs.get(name))
    return found

"""Backward passes: which calls of units hold replayed tensors, and the check when one ends."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from revfx import _torch
from revfx.codes import Code, Codec
from revfx.engine import dispatch
from revfx.engine.fingerprints import Comparison, judge, read
from revfx.errors import NondeterminismWarning, warn
from revfx.passes._torch import OVERFLOWED


if TYPE_CHECKING:
    from revfx.engine.call import UnitCall
    from revfx.engine.plan import UnitPlan


class Pass:
    """The backward passes of one forward: which calls hold replayed tensors now.

    State belongs to a forward, not to a model: threads may share a model.
    """

    def __init__(self) -> None:
        self.settings: tuple[Any, ...] = _torch.kernel_settings()
        self.lock: threading.RLock = threading.RLock()
        self.task: int = -1  # the number of the backward pass
        self.is_over = False  # one has ended
        self.same_settings: bool = True
        self.active: list[UnitCall] = []
        self.staged: list[weakref.ref[UnitCall]] = []  # calls that hold tensors until the backward asks for them
        self.comparisons: list[Comparison] = []
        self.tried: list[UnitPlan] = []  # of which all tensors are compared
        self.begins: Callable[[], None] | None = None  # called when a pass begins
        self.ended: Callable[[bool], None] | None = None  # called at the end: were all values right?
        self.coded: list[tuple[Code, Codec]] = []  # codes that may have lost escapes, on accelerators

    def join(self) -> None:
        """Note the backward pass that runs on this thread, if it is another one."""
        task = _torch.graph_task_id()
        if task == self.task:
            return
        self.clear()
        self.task, self.same_settings = task, _torch.kernel_settings() == self.settings
        if self.begins is not None:
            self.begins()
        if task >= 0:
            with _lock:
                ending = _endings.get(task)
                if ending is None:
                    ending = _endings[task] = Ending(task)
                    _torch.at_end_of_backward(ending)
                ending.passes.append(self)

    def end(self, task: int) -> tuple[list[Comparison], list[tuple[Code, Codec]]]:
        """Let go of replayed tensors as a pass ends; return the fingerprints, and codes that may have lost escapes."""
        with self.lock:
            if self.task == task:  # else another thread's pass goes on
                self.clear()
            noted, self.comparisons = self.comparisons, []
            coded, self.coded = self.coded, []
            return noted, coded

    def activate(self, call: UnitCall) -> None:
        """Let go of the tensors of other calls, as the backward came to this one.

        Not so of calls that go forwards in stages: the backward comes back to them.
        """
        if call.unit.is_staged:
            self.staged.append(weakref.ref(call))
            return
        waiting: list[UnitCall] = []
        for other in self.active:
            if other is not call:
                other.values.clear()
                for slot in other.entries.keys() - other.taken:
                    del other.entries[slot]
                if other.entries:
                    waiting.append(other)
        self.active = [*waiting, call]

    def clear(self) -> None:
        """Let go of all replayed tensors."""
        for call in self.active:
            call.values.clear()
            call.entries.clear()
        for reference in self.staged:
            staged = reference()
            if staged is not None:
                staged.restart()
        self.active, self.staged, self.task = [], [], -1


class Ending:
    """The end of a backward pass: its callback, and the only owner of `passes`, which go even if the pass raises.

    Attributes:
        passes: of the forwards that the backward pass came to.
    """

    def __init__(self, task: int) -> None:
        self.task: int = task
        self.passes: list[Pass] = []

    def __call__(self) -> None:
        """Check all that the backward pass replayed; see `check`."""
        passes, self.passes = self.passes, []
        is_right = False
        try:
            self.check(passes)
            is_right = True
        finally:
            for one in passes:
                one.is_over = True
                for unit in one.tried:
                    unit.is_tried |= is_right
                one.tried.clear()
                if one.ended is not None:
                    one.ended(is_right)

    def check(self, passes: Sequence[Pass]) -> None:
        """Compare all that was replayed by one read of each device; nothing of a step that is captured."""
        noted: list[Comparison] = []
        coded: list[tuple[Code, Codec]] = []
        for one in passes:
            comparisons, some = one.end(self.task)
            noted += comparisons
            coded += some
        words = [c.now.words for c in noted[:1]] + [code.words for code, _ in coded[:1]]
        if dispatch.on_fakes.get() or any(map(_torch.is_capturing, words)):
            return
        with dispatch.unseen():  # it may be the end of a backward in the midst of a forward
            differs, counts = read(noted, [code.count for code, _ in coded if code.count is not None])
            lost = [codec for (code, codec), count in zip(coded, counts, strict=True) if count > len(code.values)]
            for codec in lost:
                codec.counts_next = True
            if lost:
                warn(OVERFLOWED, NondeterminismWarning)  # differences have this cause
            elif differs:
                judge(noted)

    def __del__(self) -> None:
        for one in self.passes:  # those of a pass that raised
            one.end(self.task)


_endings = weakref.WeakValueDictionary[int, Ending]()  # by backward pass
_lock = threading.Lock()

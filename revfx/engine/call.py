"""Calls of units: the tensors that one holds of its forward, and how the backward obtains its saved tensors.

The calls of a forward form chains: the exit of one is the entry of the next. A call in the midst of a chain inverts:
its codes and the entry of the next call give its own entry. So no call but the last one of a chain holds its exit, and
none but the first one its entry.

The backward asks for the saved tensors of the last call first. The first request runs the replay of the call, after
those of the calls that its exit comes from. Then the tensors of other calls are let go.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from revfx import _fsdp, _torch, codes
from revfx.ambient import kernels_of
from revfx.codes import Code, Codec, Prediction
from revfx.engine import dispatch
from revfx.engine.fingerprints import Comparison, Fingerprint, fingerprint, judge, read
from revfx.engine.observe import Observer
from revfx.engine.randomness import RandomState
from revfx.engine.unit import Replay, Unit
from revfx.errors import NondeterminismWarning, warn
from revfx.layout import copied
from revfx.passes._torch import OVERFLOWED


class Pass:
    """The backward passes of one forward: which calls hold replayed tensors now.

    State belongs to a forward, not to a model: threads may share a model.
    """

    def __init__(self) -> None:
        self.settings = _torch.kernel_settings()
        self.lock = threading.RLock()
        self.task = -1  # the number of the backward pass
        self.same_settings = True
        self.active: list[UnitCall] = []
        self.comparisons: list[Comparison] = []
        self.coded: list[tuple[Code, Codec]] = []  # codes that may have lost escapes, on accelerators

    def join(self) -> None:
        """Note the backward pass that runs on this thread, if it is another one."""
        task = _torch.graph_task_id()
        if task == self.task:
            return
        self.clear()
        self.task, self.same_settings = task, _torch.kernel_settings() == self.settings
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
        """Let go of the tensors of other calls, as the backward came to this one."""
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
        self.active, self.task = [], -1


class Ending:
    """The end of a backward pass: its callback, and the only owner of `passes`, which go even if the pass raises.

    Attributes:
        passes: of the forwards that the backward pass came to.
    """

    def __init__(self, task: int) -> None:
        self.task, self.passes = task, list[Pass]()

    def __call__(self) -> None:
        """Check all that the backward pass replayed, by one read of each device; nothing of a step that is captured."""
        noted: list[Comparison] = []
        coded: list[tuple[Code, Codec]] = []
        passes, self.passes = self.passes, []
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
                codec.due = True
            if lost:
                warn(OVERFLOWED, NondeterminismWarning)  # differences have this cause
            elif differs:
                judge(noted)

    def __del__(self) -> None:
        for one in self.passes:  # those of a pass that raised
            one.end(self.task)


_endings = weakref.WeakValueDictionary[int, Ending]()  # by backward pass
_lock = threading.Lock()


@dataclass(eq=False)
class UnitCall:
    """One call of a unit.

    Attributes:
        given: by slot, tensors that the replays read: external and held ones.
        versions: by slot, how often they had been written to.
        numbers, states, layouts: other inputs of the replays.
        codes: of the values that inverses give; None of those that are held instead.
        site: its position in the sequence of the plan.
        settings: how kernels are set, if the forward changes that.
        observer: looks on, if there is one.
        inverts: it goes backwards; else it holds its entry and goes forwards.
        is_rounded: values come back accurate to rounding.
        exits: by slot, tensors of the exit that are held.
        links: by slot of the exit, the later call, and the slot there, that gives it.
        fingerprints: by slot, of replayed tensors.
        pending: by slot, how many saved tensors were dropped.
        values: by slot, replayed tensors that the backward still asks for.
        entries: by slot, tensors of the entry that earlier calls take.
        taken: slots of the entry that earlier calls take for their replays.
    """

    unit: Unit
    backward_pass: Pass
    given: dict[int, Tensor]
    versions: dict[int, int]
    numbers: Sequence[Any]
    states: Sequence[RandomState]
    layouts: dict[int, Any]
    site: int = 0
    settings: tuple[Any, ...] | None = None
    observer: Observer | None = None
    codes: list[Code | None] = field(default_factory=list["Code | None"])
    inverts: bool = False
    is_rounded: bool = False
    exits: dict[int, tuple[Tensor, int]] = field(default_factory=dict[int, "tuple[Tensor, int]"])
    links: dict[int, tuple[UnitCall, int]] = field(default_factory=dict[int, "tuple[UnitCall, int]"])
    fingerprints: dict[int, Fingerprint] = field(default_factory=dict[int, Fingerprint])
    pending: dict[int, int] = field(default_factory=dict[int, int])
    values: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    entries: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    taken: set[int] = field(default_factory=set[int])
    left: dict[int, int] = field(default_factory=dict[int, int])

    def copy_held(self, memory: int) -> None:
        """Copy the tensors that this call holds in memory that is about to be written to."""
        for slot, t in self.given.items():
            if memory_of(t) == memory:
                self.given[slot] = copy = copied(t)
                self.versions[slot] = _torch.version(copy)
        for slot, (t, _) in self.exits.items():
            if memory_of(t) == memory:
                copy = copied(t)
                self.exits[slot] = copy, _torch.version(copy)

    def fetch(self, slot: int) -> Tensor:
        """Return the tensor of a slot for the backward."""
        backward_pass = self.backward_pass
        with backward_pass.lock:
            if slot not in self.values or backward_pass.task != _torch.graph_task_id():
                backward_pass.join()
                with torch.enable_grad(), dispatch.replaying(), self._as_in_the_forward():
                    if slot in self.unit.exit and slot not in self.pending:
                        return self._exit(slot)
                    if slot not in self.values:
                        self.replay()
            t = self.values[slot]
            self.left[slot] -= 1
            if self.left[slot] <= 0:
                del self.values[slot]
            return t

    def _as_in_the_forward(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which kernels are set as they were around the unit."""
        if self.settings is not None:
            return kernels_of(self.settings)
        if self.backward_pass.same_settings:
            return contextlib.nullcontext()
        return kernels_of(self.backward_pass.settings)

    def _exit(self, slot: int) -> Tensor:
        if slot in self.links:
            later, entry = self.links[slot]
            if entry not in later.entries:
                later.replay()
            return later.entries[entry]
        return _torch.unchanged(*self.exits[slot])

    def replay(self) -> None:
        """Run the replay, after those of the later calls that it needs."""
        waiting = [self]
        while waiting:
            call = waiting[-1]
            missing = call.missing()
            if missing:
                waiting += missing
                continue
            waiting.pop()
            call._run()

    def missing(self) -> list[UnitCall]:
        """Return the later calls whose entries are needed, and not there."""
        if not self.inverts:
            return []
        found: list[UnitCall] = []
        for later, entry in self.links.values():
            if entry not in later.entries and later not in found:
                found.append(later)
        return found

    def _run(self) -> None:
        unit = self.unit
        replay = unit.backward if self.inverts else unit.forward
        assert replay is not None
        inputs = self.inputs(replay, self.backward_pass.comparisons)
        for later, entry in self.links.values():
            later.entries.pop(entry, None)
        self.backward_pass.activate(self)
        settings = self._as_in_the_forward() if self.settings is not None else contextlib.nullcontext()
        with settings, _fsdp.gathered(self.given.values()):
            results = replay.run(inputs)
        self.left = dict(self.pending)
        for slot, t in zip(replay.outputs, results, strict=True):
            if self.observer is not None:
                self.observer.replayed(self, slot, t)
            if slot in self.pending:
                self.values[slot] = t
            if slot in unit.entry:
                self.entries[slot] = t
            if slot in self.fingerprints:
                now = fingerprint(t)
                self.backward_pass.comparisons.append(Comparison(self.fingerprints[slot], now, f"a tensor of {unit}"))

    def inputs(self, replay: Replay, noted: list[Comparison] | None = None) -> list[Any]:
        """Return the inputs of a replay of this call; fingerprints of decoded values are added to `noted`."""
        found: list[Any] = []
        for kind, index in replay.inputs:
            if kind == "slot":
                found.append(self._tensor(index))
            elif kind == "number":
                found.append(self.numbers[index])
            elif kind == "state":
                found.append(self.states[index])
            elif kind == "code":
                code = self.codes[index]
                held = self.unit.coded[index].head
                found.append(self._tensor(held) if code is None else Decoder(code, self, noted))
            else:
                found.append(self.layouts[index])
        return found

    def _tensor(self, slot: int) -> Tensor:
        if slot not in self.given:
            slot = self.unit.same.get(slot, slot)
        t = self.given.get(slot)
        if t is not None and t.layout != torch.strided:
            return t  # kernels count writes of their own
        if t is not None:
            return _torch.unchanged(t, self.versions[slot])
        return self._exit(slot)


@dataclass(frozen=True)
class Decoder:
    """Decodes one value of a call, and adds its fingerprints, of then and now, to `noted`."""

    code: Code
    call: UnitCall
    noted: list[Comparison] | None

    def __call__(self, prediction: Prediction, spent: Tensor | None) -> Tensor:
        """Return the value; `spent`: see `revfx.codes.decode`."""
        x, words = codes.decode(prediction, self.code, spent)
        if self.noted is not None:
            then, now = Fingerprint(self.code.words, x.dtype, self.call.is_rounded), Fingerprint(words, x.dtype)
            self.noted.append(Comparison(then, now, f"a tensor of {self.call.unit}"))
        return x


def memory_of(t: Tensor) -> int | None:
    """Return a number that tensors in the same memory share; None of tensors that have no storage of their own."""
    return _torch.storage_key(t) if t.layout == torch.strided and _torch.is_plain(t) else None

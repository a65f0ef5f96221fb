"""Calls of units: the tensors that one holds of its forward, and how the backward obtains its saved tensors.

The calls of a forward form chains: the exit of one is the entry of the next. A call in the midst of a chain inverts:
its codes and the entry of the next call give its own entry. So no call but the last one of a chain holds its exit, and
none but the first one its entry.

The backward asks for the saved tensors of the last call first. The first request runs the replay of the call, after
those of the calls that its exit comes from. Then the tensors of other calls are let go.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from revfx import _fsdp, _torch, codes
from revfx.ambient import kernels_of
from revfx.codes import Code, Prediction
from revfx.engine import dispatch
from revfx.engine.backward import Pass
from revfx.engine.bit_mask import BitMask
from revfx.engine.fingerprints import Comparison, Fingerprint, fingerprint
from revfx.engine.observe import Observer
from revfx.engine.plan import UnitPlan
from revfx.engine.randomness import RandomState
from revfx.engine.unit import Replay, Unit
from revfx.layout import copy_views


@dataclass(eq=False)
class UnitCall:
    """One call of a unit.

    Attributes:
        given: by slot, tensors that the replays read: external and held ones.
        versions: by slot, their version counters.
        numbers, states, layouts: other inputs of the replays.
        codes: the corrections of inverses; None for a value that is held instead.
        site: the position in the sequence of the plan.
        kept: slots that are never dropped; see `UnitPlan`.
        settings: the settings of kernels, if the forward changes them.
        observer: an observer of completed calls and replays.
        trial: the plan of the unit, if this call is the first whose tensors are all compared.
        inverts: whether it runs its backward replay; otherwise it holds its entry and runs forwards.
        is_rounded: whether recomputed values are accurate to rounding only.
        exits: by slot, tensors of the exit that are held.
        links: by slot of the exit, the later call that gives it, and the slot there.
        fingerprints: by slot, fingerprints of replayed tensors.
        pending: by slot, the number of dropped saved tensors.
        values: by slot, replayed tensors that the backward still needs.
        entries: by slot, tensors of the entry that earlier calls take.
        taken: slots of the entry that earlier calls take for their replays.
        bit_masks: by slot, the bits that are kept of saved tensors.
        stage: the number of stages that have run.
        dropout_masks: by slot, the zeros and ones that the replays read.
        passed: by slot, tensors that stages left for later ones.
        borrowed: by slot of the entry, the earlier call that gives it, and the slot there.
        debts: by slot of the exit, the number of later calls and saved tensors that take it from this call.
        lent: by slot, the recomputed tensors of the exit that are held for them.
        owed: the debts that remain in this backward.
    """

    unit: Unit
    backward_pass: Pass
    given: dict[int, Tensor]
    versions: dict[int, int]
    numbers: Sequence[Any]
    states: Sequence[RandomState]
    layouts: dict[int, Any]
    site: int = 0
    kept: Collection[int] = ()
    settings: tuple[Any, ...] | None = None
    observer: Observer | None = None
    trial: UnitPlan | None = None
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
    bit_masks: dict[int, BitMask] = field(default_factory=dict[int, BitMask])
    stage: int = 0
    dropout_masks: dict[int, BitMask] = field(default_factory=dict[int, BitMask])
    passed: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    borrowed: dict[int, tuple[UnitCall, int]] = field(default_factory=dict[int, "tuple[UnitCall, int]"])
    debts: dict[int, int] = field(default_factory=dict[int, int])
    lent: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    owed: dict[int, int] = field(default_factory=dict[int, int])

    def held_in(self, memory: int) -> list[Tensor]:
        """Return the tensors that this call holds in a storage."""
        held = [*self.given.values(), *(t for t, _ in self.exits.values())]
        return [t for t in held if memory_of(t) == memory]

    def take_copies(self, copies: Mapping[int, Tensor]) -> None:
        """Replace held tensors by copies, which are given by the ids of the tensors."""
        for slot, t in self.given.items():
            copy = copies.get(id(t))
            if copy is not None:
                self.given[slot] = copy
                self.versions[slot] = _torch.version(copy)
        for slot, (t, _) in self.exits.items():
            copy = copies.get(id(t))
            if copy is not None:
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
                        self.replay(slot)
            t = self.values[slot]
            self.left[slot] -= 1
            if self.left[slot] <= 0:
                del self.values[slot]
            return t

    def _as_in_the_forward(self) -> contextlib.AbstractContextManager[None]:
        """Return a context with the settings of kernels that were in force around the unit."""
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
        return _torch.checked_version(*self.exits[slot])

    def restart(self) -> None:
        """Free the replayed tensors, so that the next backward starts the replays over."""
        for tensors in (self.values, self.passed, self.lent):
            tensors.clear()
        self.stage = 0
        self.owed = {}

    # --- tensors of the exit that later calls borrow
    def fetch_lent(self, slot: int) -> Tensor:
        """Return a tensor of the exit for the backward, which later calls may borrow as well."""
        backward_pass = self.backward_pass
        with backward_pass.lock:
            backward_pass.join()
            with torch.enable_grad(), dispatch.replaying(), self._as_in_the_forward():
                if slot not in self.lent:
                    assert self.unit.loan is not None
                    self._borrow(self.unit.loan, {slot})
            t = self.lent[slot]
            self._repay(slot)
            return t

    def borrow(self, slot: int, lender: UnitCall, exit: int) -> None:
        """Free a tensor of the entry, if the earlier call with this exit can recompute it."""
        if exit in lender.unit.lends and exit not in lender.kept:
            self.given.pop(slot, None)
            self.borrowed[slot] = lender, exit
            if slot in self.unit.last_loan:
                lender.debts[exit] = lender.debts.get(exit, 0) + 1

    def _borrow(self, replay: Replay, asked: Collection[int] = ()) -> None:
        """Let earlier calls recompute the tensors that a replay borrows, the earliest ones first.

        `asked`: slots to lend as well, if it is the replay for loans.
        """
        waiting: list[tuple[UnitCall, Replay, set[int]]] = [(self, replay, {*asked})]
        while waiting:
            call, needing, lending = waiting[-1]
            lacking: dict[int, tuple[UnitCall, set[int]]] = {}
            for lender, exit in call.loans_of(needing):
                if exit not in lender.lent:
                    lacking.setdefault(id(lender), (lender, set()))[1].add(exit)
            if lacking:
                for lender, slots in lacking.values():
                    assert lender.unit.loan is not None
                    waiting.append((lender, lender.unit.loan, slots))
                continue
            waiting.pop()
            if not lending <= call.lent.keys():
                call._lend(lending)
                call._return_loans(needing, waiting)

    def loans_of(self, replay: Replay) -> list[tuple[UnitCall, int]]:
        """Return the tensors that a replay borrows: the earlier calls that give them, and the slots there."""
        return [self.borrowed[index] for kind, index in replay.inputs if kind == "slot" and index in self.borrowed]

    def _return_loans(self, loan: Replay, waiting: Sequence[tuple[UnitCall, Replay, set[int]]]) -> None:
        """Free the tensors that a replay for loans borrowed, but for those that are owed, or that others wait for."""
        wanted = [taken for call, replay, _ in waiting for taken in call.loans_of(replay)]
        for lender, exit in self.loans_of(loan):
            if lender.owed.get(exit, 0) <= 0 and (lender, exit) not in wanted:
                lender.lent.pop(exit, None)

    def _lend(self, asked: set[int]) -> None:
        """Recompute tensors of the exit: those that are asked for, and others that are owed."""
        loan = self.unit.loan
        assert loan is not None
        if not self.lent:
            self.backward_pass.activate(self)
        if not self.owed:
            self.owed = dict(self.debts)
        results = loan.run(self.inputs(loan, self.backward_pass.comparisons))
        for slot, t in zip(loan.outputs, results, strict=True):
            if slot in asked or self.owed.get(slot, 0) > 0:
                self.lent[slot] = t
            self._compare(slot, t)

    def _repay(self, slot: int) -> None:
        left = self.owed[slot] = self.owed.get(slot, 0) - 1
        if left <= 0:
            self.lent.pop(slot, None)

    def replay(self, slot: int = -1) -> None:
        """Run the replay up to the stage of a slot, after the replays of later calls that it needs."""
        if not self.inverts:
            self._run_stages(slot)
            return
        waiting = [self]
        while waiting:
            call = waiting[-1]
            missing = call.missing()
            if missing:
                waiting += missing
                continue
            waiting.pop()
            if call.inverts:
                assert call.unit.backward is not None
                call._run(call.unit.backward)
            else:
                call._run_stages(-1)

    def missing(self) -> list[UnitCall]:
        """Return the later calls whose entries are needed and not yet recomputed."""
        if not self.inverts:
            return []
        found: list[UnitCall] = []
        for later, entry in self.links.values():
            if entry not in later.entries and later not in found:
                found.append(later)
        return found

    def _run_stages(self, slot: int) -> None:
        """Run stages until one has given a slot, or all of them."""
        stages = self.unit.stages
        if self.stage == len(stages):
            self.values.clear()
            self.stage = 0
        while self.stage < len(stages) and (slot < 0 or slot not in self.values):
            if self.borrowed:
                self._borrow(stages[self.stage])
            self._run(stages[self.stage])
            for entry, (lender, exit) in self.borrowed.items():
                if self.unit.last_loan.get(entry) == self.stage:
                    lender._repay(exit)
            self.stage += 1
        if self.trial is not None and self.stage == len(stages):
            self.backward_pass.tried.append(self.trial)

    def _begin(self) -> None:
        """Take the exit from later calls, which free it."""
        for later, entry in self.links.values():
            later.entries.pop(entry, None)
        self.backward_pass.activate(self)
        self.left = dict(self.pending)

    def _run(self, replay: Replay) -> None:
        unit = self.unit
        inputs = self.inputs(replay, self.backward_pass.comparisons)
        if self.stage == 0:
            self._begin()
        for passed in [s for s in self.passed if unit.last_reader[s] == self.stage]:
            del self.passed[passed]
        settings = self._as_in_the_forward() if self.settings is not None else contextlib.nullcontext()
        with settings, _fsdp.gather_weights(self.given.values()):
            results = replay.run(inputs)
        for slot, t in zip(replay.outputs, results, strict=True):
            if self.observer is not None:
                self.observer.replayed(self, slot, t)
            if slot in self.pending:
                self.values[slot] = t
            if unit.last_reader.get(slot, -1) > self.stage:
                self.passed[slot] = t
            if slot in unit.entry:
                self.entries[slot] = t
            self._compare(slot, t)

    def _compare(self, slot: int, t: Tensor) -> None:
        """Note the fingerprint of a replayed tensor, if there is one of the forward."""
        if slot in self.fingerprints:
            then, now = self.fingerprints[slot], fingerprint(t)
            self.backward_pass.comparisons.append(Comparison(then, now, f"a tensor of {self.unit}"))

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
        t = self.passed.get(slot)
        if t is not None:
            return t
        if slot in self.dropout_masks:
            return self.dropout_masks[slot].fetch(slot)
        if slot in self.borrowed:
            lender, exit = self.borrowed[slot]
            return lender.lent[exit]
        t = self.given.get(slot)
        if t is not None and t.layout != torch.strided:
            return t  # kernels count writes of their own
        if t is not None:
            return _torch.checked_version(t, self.versions[slot])
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


@dataclass(frozen=True)
class Loan:
    """A saved tensor that lies in the exit of a call, which later calls may borrow."""

    call: UnitCall

    def fetch(self, slot: int) -> Tensor:
        """Return the tensor of a slot for the backward."""
        return self.call.fetch_lent(slot)


def copy_held(calls: Sequence[UnitCall], memory: int) -> None:
    """Copy the tensors that calls hold in memory that is about to be written to."""
    held = {id(t): t for call in calls for t in call.held_in(memory)}
    if held:
        copies = dict(zip(held, copy_views([*held.values()]), strict=True))
        for call in calls:
            call.take_copies(copies)


def memory_of(t: Tensor) -> int | None:
    """Return a number that tensors in the same memory share; None of tensors that have no storage of their own."""
    return _torch.storage_key(t) if t.layout == torch.strided and _torch.is_plain(t) else None

"""One forward under a plan: saved tensors that units can recompute are dropped.

A unit's tensors are kept until its last operator has matched. So a forward that takes another path has lost nothing,
and a first call can be proven: its replay runs at once, while the saved tensors are there to compare with.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from revfx import _torch
from revfx.codes import Codec, Prediction, predict
from revfx.engine import dispatch
from revfx.engine.backward import Pass
from revfx.engine.bit_mask import nonzero_mask, positive_mask
from revfx.engine.call import Loan, UnitCall, copy_held, memory_of
from revfx.engine.exits import Exit, ExitKey, place_of
from revfx.engine.fingerprints import fingerprint, is_fingerprinted
from revfx.engine.match import HeldTensor, Match
from revfx.engine.observe import observer
from revfx.engine.operators import changes_versions
from revfx.engine.plan import Path, Plan, UnitPlan
from revfx.engine.proof import prove_call
from revfx.engine.saved import SavedTensor
from revfx.engine.unit import Coded, Unit
from revfx.engine.whole import Whole
from revfx.errors import NotConvertedWarning, warn
from revfx.layout import address


def drops(unit: Unit) -> bool:
    """Return whether a unit drops tensors and may begin anywhere: one of a single, usual operator would everywhere."""
    return bool(unit.droppable) and (len(unit.ops) > 1 or any(isinstance(op.func, Whole) for op in unit.ops))


class Forward:
    """One forward under a plan.

    Attributes:
        count: the number of units that matched.
        position: the position in the path of the unit that is expected next.
        coded_bytes: bytes of the codes.
        unsettled: the latest call, while its last operator still runs, if that changes version counters.
        addresses: the addresses of the exits of the latest call.
        has_left: whether the forward has left all paths; `leaving` is called then.
        holders: by storage, the calls that hold tensors in it.
        kept_cuts: by chain, the number of entries and exits of units that are held.
        path: the path that the forward follows so far.
        others: paths that it may switch to.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan: Plan = plan
        self.count: int = 0
        self.position: int = 0
        self.coded_bytes: int = 0
        self.path: Path = plan.path
        self.others: list[Path] = [*plan.others]
        self.unsettled: UnitCall | None = None
        self.has_left: bool = False
        self.leaving: Callable[[], None] | None = None
        self.addresses: list[int] = []
        self.backward_pass: Pass = Pass()
        self.kept_cuts: dict[int, int] = {}
        self._calls: list[UnitCall] = []
        self.holders: dict[int, list[UnitCall]] = {}
        self._exits: dict[ExitKey, Exit] = {}  # by the id of a tensor, and by its address and shape
        self._latest_exits: list[ExitKey] = []  # the keys there of the latest call

    @property
    def expected(self) -> UnitPlan | None:
        """The unit at this position."""
        sequence = self.path.sequence
        return sequence[self.position] if self.position < len(sequence) else None

    @property
    def expected_at(self) -> int:
        """The number of the operator at which that unit begins: -1 if it may anywhere, `NEVER` without one."""
        return self.path.first(self.position)

    def beginning(self, number: int) -> list[UnitPlan]:
        """Return the units of other paths that begin at an operator."""
        found: list[UnitPlan] = []
        for path in self.others:
            at = bisect_left(path.firsts, number)
            if at < len(path.sequence) and path.firsts[at] == number and path.sequence[at] not in found:
                found.append(path.sequence[at])
        return found

    @_torch.never_compiled
    def switch_path(self, number: int) -> bool:
        """Switch to another path with a unit that begins at an operator or later; without one, the forward has left."""
        while self.others:
            self.path = self.others.pop(0)
            self.position = bisect_left(self.path.firsts, number)
            if self.expected is not None:
                return True
        self.has_left = True
        if self.leaving is not None:
            self.leaving()
        return False

    def _switch_to(self, match: Match) -> None:
        """Switch to the path of a unit, if that is another one; the forward may still switch back."""
        for path in self.others:
            at = bisect_left(path.firsts, match.first)
            if at < len(path.sequence) and path.firsts[at] == match.first and path.sequence[at] is match.of:
                self.others.remove(path)
                self.others.append(self.path)
                self.path, self.position = path, at
                return

    @_torch.never_compiled
    def may_begin(self, match: Match) -> bool:
        """Return whether a matched first operator may be the beginning of its unit.

        The expected unit may. Another one has to continue a chain, or must be no single view or sum; see `drops`.
        """
        unit = match.of.unit
        if match.of is self.expected or drops(unit):
            return True
        return bool(self._earlier_calls(unit, match))

    def _exit_of(self, t: Tensor | None, version: int | None = None) -> Exit | None:
        """Return the exit that `t` is, or is an alias of, at a version; by default at its current one."""
        known = None if t is None else self._known_exit(t, version)
        if known is None or known.slot not in known.call.links:
            return known
        call, slot = known.call, known.slot
        while slot in call.links and call.links[slot][1] in call.links[slot][0].unit.exit:
            call, slot = call.links[slot]  # the later call passes it on
        return known._replace(call=call, slot=slot)

    def _known_exit(self, t: Tensor, version: int | None) -> Exit | None:
        known = self._exits.get(id(t))
        if known is not None and known.tensor() is t:
            return known if known.version == (_torch.version(t) if version is None else version) else None
        if self._exits and t.layout == torch.strided and _torch.is_plain(t):
            known = self._exits.get((address(t) or 0, t.shape))
            if known is not None and known.shows(t):
                holder = known.tensor()
                now = _torch.version(t if holder is None else holder)
                return known if known.version in (now, version) else None  # as it is, or as the unit read it
        return None

    @_torch.never_compiled
    def before_write(self, written: Sequence[Tensor], active: Sequence[Match]) -> None:
        """Copy tensors that calls or active matches hold in storages that are about to be written to."""
        for key in dict.fromkeys(map(memory_of, written)):
            if key is None:
                continue
            for match in active:
                match.copy_held(key)
            copy_held(self.holders.pop(key, ()), key)

    @_torch.never_compiled
    def settle(self) -> None:
        """Note the version counters of the latest call's tensors, as its last operator has returned."""
        call, self.unsettled = self.unsettled, None
        if call is None:
            return
        call.versions = {slot: _torch.version(t) for slot, t in call.given.items()}
        for slot, (t, _) in call.exits.items():
            call.exits[slot] = t, _torch.version(t)
        for key in self._latest_exits:
            t = self._exits[key].tensor()
            if t is not None:
                self._exits[key] = self._exits[key]._replace(version=_torch.version(t))

    @_torch.never_compiled
    def save(self, t: Tensor) -> SavedTensor:
        """Return the object that autograd holds in the place of a tensor that no active match made."""
        if self.unsettled is not None:
            self.settle()
        saved = SavedTensor(t)
        self.drop_if_exit(saved, t)
        return saved

    @_torch.never_compiled
    def drop_if_exit(self, saved: SavedTensor, t: Tensor) -> None:
        """Drop a saved tensor that is the exit of a call, which recomputes it."""
        if self.unsettled is not None:
            self.settle()
        known = self._exit_of(t)
        if known is None or known.version != saved.version:
            return
        unit = known.call.unit
        if not unit.is_staged:
            saved.drop(known.call, known.slot)
        elif known.slot in unit.lends and known.slot not in known.call.kept:
            known.call.debts[known.slot] = known.call.debts.get(known.slot, 0) + 1
            saved.drop(Loan(known.call), known.slot)
        elif known.slot in unit.droppable | unit.compressed and known.slot not in known.call.kept:
            self._drop_one(saved, known.call, known.slot, t)

    def end(self) -> None:
        """Forget the tensors of the forward, and count the cuts that are kept."""
        self.settle()
        self._exits, self.holders = {}, {}
        for call in self._calls:
            chain = self.path.chain(call.site)
            held = (not call.inverts) + any(slot not in call.links for slot in call.exits)
            self.kept_cuts[chain] = self.kept_cuts.get(chain, 0) + held
        self._calls = []

    @_torch.never_compiled
    def complete(self, match: Match) -> None:
        """Make a call of a unit that matched to its end, link it with its neighbours, and drop its saved tensors."""
        matched, unit = match.of, match.of.unit
        if self.others and matched is not self.expected:
            self._switch_to(match)
        if matched.is_broken or not matched.facts_hold(match.tensor):
            return
        # Hold the inputs of the replay, or encode the corrections of its inverses.
        site = self.path.site(matched, self.position)
        earlier = self._earlier_calls(unit, match)
        if not unit.is_staged:  # couplings link to couplings only
            earlier = [link for link in earlier if not link[1].unit.is_staged]
        call = UnitCall(unit, self.backward_pass, {}, {}, match.numbers, match.states, match.layouts)
        call.site, call.kept, call.observer = site, matched.kept, observer.get()
        if self.plan.notes_settings:
            call.settings = _torch.kernel_settings()
        call.inverts = unit.backward is not None and bool(earlier)
        call.is_rounded = call.inverts and not self.plan.lossless
        slots = unit.read_backwards if call.inverts else unit.read_forwards
        call.given, call.versions, memory = match.hold(slots, unit.entry)
        if call.inverts:
            self._encode(matched, call, match, site)
        if unit.dropout_masks:
            self._compress_dropout_masks(call, match)
        exits = match.exits(unit.exit, unit.exit_before_writes)
        if not unit.is_staged:
            call.exits = {held.slot: (held.alias, held.version) for held in exits}
        # Prove the first call of each kind before anything is dropped.
        kind = (-1 if unit.is_staged else site), matched, tuple([code is None for code in call.codes])
        if kind not in self.plan.proven and not dispatch.on_fakes.get():
            if not prove_call(matched, call, match, self.plan.reasons):
                return
            self.plan.proven.add(kind)
        # Link the call with its neighbours, and drop its saved tensors.
        if unit.is_staged:
            for slot, lender, exit in earlier:
                call.borrow(slot, lender, exit)
        self._link(call, earlier, exits)
        self._fingerprint(call, earlier, match)
        if call.observer is not None:
            call.observer.completed(call, match)
        self._drop(call, match)
        # Later writes to these storages copy the tensors that the call holds.
        memory.update(held.memory for held in exits if held.memory is not None and held.slot in call.exits)
        memory.update(key for c in unit.coded if c.head in call.given and (key := memory_of(call.given[c.head])))
        for key in memory:
            self.holders.setdefault(key, []).append(call)
        self.unsettled = call if changes_versions(unit.ops[-1].func) else None
        self.count += 1
        if earlier or matched is self.expected:  # an unexpected unit without a link does not tell the position
            self.position = site + 1
        self._calls.append(call)

    def _compress_dropout_masks(self, call: UnitCall, match: Match) -> None:
        """Keep drawn zeros and ones as bits, read from a later value of the same allocation."""
        saved = {slot: s.tensor for s, slot in match.saved}
        for mask, later in call.unit.dropout_masks.items():
            t = saved.get(later)
            if t is None:
                t = match.tensor(later)
            assert t is not None  # as it is saved, or held until here
            call.dropout_masks[mask] = nonzero_mask(t)

    def _earlier_calls(self, unit: Unit, match: Match) -> list[tuple[int, UnitCall, int]]:
        """Return entries that are exits of earlier calls: the slot, the earlier call, and the slot there."""
        found: list[tuple[int, UnitCall, int]] = []
        for slot in unit.entry:
            known = self._exit_of(match.given(slot), match.version(slot))
            if known is not None:
                found.append((slot, known.call, known.slot))
        return found

    def _encode(self, matched: UnitPlan, call: UnitCall, match: Match, site: int) -> None:
        """Encode the corrections of inverses; hold a tensor whose code is no smaller, or whose inverse fails."""
        for number, coded in enumerate(matched.unit.coded):
            x = match.operand(coded.head)
            key = site, matched, number
            codec = self.plan.codecs.get(key)
            if codec is None:
                codec = self.plan.codecs[key] = Codec(wide=coded.arc.coded)
            code = None
            if codec.needs_prediction(x):
                prediction = self._predict(coded, match)
                if prediction is not None:
                    code = codec.encode(x, prediction)
                else:
                    codec.width, codec.counts_next = None, False
                if codec.width is None and coded.arc.declared:
                    self._distrust(coded, matched.unit)
            call.codes.append(code)
            if code is None:
                call.given[coded.head] = alias = dispatch.alias(x)
                call.versions[coded.head] = _torch.version(alias)
                continue
            self.coded_bytes += code.nbytes
            if code.count is not None:
                self.backward_pass.coded.append((code, codec))

    def _predict(self, coded: Coded, match: Match) -> Prediction | None:
        """Return the prediction of an inverse; None if a declared one raises."""
        try:
            return predict(coded.arc.solve, *(match.operand(s) for s in coded.tail))
        except Exception as e:  # of any class: the code is a library's
            if not coded.arc.declared or isinstance(e, torch.OutOfMemoryError):
                raise
            return None

    def _distrust(self, coded: Coded, unit: Unit) -> None:
        """Warn, once per place, that a declared inverse does not give back its input."""
        name = f"`{coded.arc.declared}` ({unit.where[1]})"
        if name not in self.plan.distrusted:
            self.plan.distrusted.add(name)
            text = (
                f"The inverse of {name} does not give back its input, or it fails. The input is kept, as without revfx,"
                " and gradients are exact. Correct this inverse, or take back its declaration."
            )
            warn(text, NotConvertedWarning)

    def _link(self, call: UnitCall, earlier: Sequence[tuple[int, UnitCall, int]], exits: Sequence[HeldTensor]) -> None:
        """Let earlier calls take their exits from this call's entry, and note the exits of this call."""
        if call.inverts:
            for slot, before, exit in earlier:
                before.links[exit] = call, slot
                before.exits.pop(exit, None)
                if before.inverts:
                    call.taken.add(slot)
        self.addresses, self._latest_exits = [], []
        for held in exits:
            storage, place = None, ()
            if call.unit.is_staged and held.memory is not None:
                storage, place = weakref.ref(held.tensor.untyped_storage()), place_of(held.tensor)
            exit = Exit(weakref.ref(held.tensor), call, held.slot, held.version, storage, place)
            self._exits[id(held.tensor)] = exit
            self._latest_exits.append(id(held.tensor))
            if held.address is not None:
                key = held.address, held.tensor.shape  # the first part of a tensor has its address
                self._exits[key] = exit
                self._latest_exits.append(key)
                self.addresses.append(held.address)

    def _drop(self, call: UnitCall, match: Match) -> None:
        unit = match.of.unit
        for saved, slot in match.saved:
            if slot in unit.droppable | unit.compressed and slot not in call.kept:
                assert saved.tensor is not None
                self._drop_one(saved, call, slot, saved.tensor)
            elif unit.is_staged and saved.tensor is not None:
                self.drop_if_exit(saved, saved.tensor)  # a new view of a tensor that an earlier unit recomputes

    def _drop_one(self, saved: SavedTensor, call: UnitCall, slot: int, t: Tensor) -> None:
        if slot in call.unit.compressed:
            if slot not in call.bit_masks:
                call.bit_masks[slot] = positive_mask(t)
            saved.drop(call.bit_masks[slot], slot)
            return
        saved.drop(call, slot)
        call.pending[slot] = call.pending.get(slot, 0) + 1

    def _fingerprint(self, call: UnitCall, earlier: list[tuple[int, UnitCall, int]], match: Match) -> None:
        """Note few fingerprints, as each tensor depends on all that was replayed before it: of the last saved tensor.

        All tensors of a budget's unit have one until a backward has found them equal. Codes have their own. The first
        call of a chain that inverts has one of its entry.
        """
        unit = call.unit
        slots = [slot for _, slot in match.saved if slot in unit.droppable and slot not in match.of.kept]
        if unit.is_staged:
            slots += [slot for slot in unit.exit if slot in unit.droppable and slot not in match.of.kept]
        slots = [slot for slot in dict.fromkeys(slots) if slot not in unit.workspaces]
        if unit.is_staged and not match.of.is_tried:
            call.trial = match.of
        else:
            slots = slots[-1:]
        corrects = any(call.codes) if unit.coded else unit.rounds
        if call.inverts and corrects:
            slots = []  # an error shows further up the chain
        if call.inverts and not any(before.inverts for _, before, _ in earlier):
            checked = {c.head for c, code in zip(unit.coded, call.codes, strict=True) if code is not None}
            slots += [slot for slot in unit.entry if slot not in unit.kept and slot not in checked]
        saved = {slot: s.tensor for s, slot in match.saved}
        for slot in slots:
            t = saved.get(slot)
            if t is None:
                t = match.held.get(slot)  # as it was before a write
            if t is None:
                t = match.tensor(slot)
            if t is not None and is_fingerprinted(t):
                call.fingerprints[slot] = fingerprint(t, call.is_rounded)

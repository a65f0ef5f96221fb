"""Watching in Python: a dispatch mode compares the operators of a forward with the units of a plan."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from revfx import _torch
from revfx.engine import dispatch
from revfx.engine.dispatch import HookedMode, is_wrapper
from revfx.engine.forward import Forward, drops
from revfx.engine.match import Match
from revfx.engine.operators import is_question, is_writer, written_arguments
from revfx.engine.plan import Plan, UnitPlan
from revfx.engine.saved import SavedTensor
from revfx.engine.whole import whole_call
from revfx.engine.wrappers import SavedWrapper
from revfx.parts import CompiledPart


class Watching(HookedMode):
    """Match the operators that run while it is entered; `forward` drops the saved tensors of units that match.

    Args:
        plan: the units.

    Usually one match is active, that of the expected unit. While there is none, another unit may begin; if then the
    expected one begins too, there are two.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan: Plan = plan
        self.forward: Forward = Forward(plan)
        self.active: list[Match] = []
        self.number: int = -1  # of the operator that runs
        self.is_off_path: bool = False  # the forward has left all recorded paths: units may begin anywhere
        self.has_stopped: bool = False  # no unit begins any more
        self._pending: list[SavedTensor] = []  # of the compiled part that runs
        self.set_hooks(self._pack, lambda saved: saved.get())

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.active = []
        self.forward.end()

    def is_innermost(self) -> bool:
        """Return whether no other code has set saved-tensor hooks or dispatch modes inside."""
        return dispatch.has_innermost_hooks(self) and dispatch.innermost_mode() is self

    def stop(self) -> None:
        """Let no unit begin any more; tensors that earlier ones hold are still protected from writes."""
        self.has_stopped = True

    @_torch.never_compiled
    def _pack(self, t: Tensor) -> SavedTensor | SavedWrapper:
        if is_wrapper(type(t)) and not t.is_nested:
            return SavedWrapper(t, self._pack)
        saved = None
        for match in self.active:
            slot = match.slot(t)
            if slot >= 0:
                saved = saved or SavedTensor(t)
                match.saved.append((saved, match.of.unit.slot_at(slot, match.at)))
        return saved or self.forward.save(t)

    @_torch.never_compiled
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(map(is_wrapper, types)):
            return NotImplemented  # their class runs others
        kwargs = kwargs or {}
        if types and is_question(func):
            return func(*args, **kwargs)
        if self.forward.unsettled is not None:
            self.forward.settle()
        if is_writer(func):
            self.forward.before_write(written_arguments(func, args, kwargs), self.active)
        return self._run(func, args, kwargs)

    def part(self, part: CompiledPart, args: Any, kwargs: Any) -> Any:
        """Make the call of a compiled part, which is an operator of units."""
        call = whole_call(part, args, kwargs)
        self._pending = call.saved
        with dispatch.unwatched():
            self._run(call.whole, call.operands, {}, call.run)
        for saved in call.saved:
            if saved.tensor is not None:
                self.forward.drop_if_exit(saved, saved.tensor)  # an operand, which may be the exit of a call
        self._pending = []
        return call.take()

    def _attach(self, match: Match) -> None:
        """Have a match know the saved tensors of a compiled part that it made."""
        for saved in self._pending:
            slot = -1 if saved.tensor is None else match.slot(saved.tensor)
            if slot >= 0:
                match.saved.append((saved, slot))

    def _run(self, func: Any, args: Any, kwargs: Any, run: Any = None) -> Any:
        active, run = self.active, run or func
        self.number += 1
        if len(active) != 1 or active[0].checker.func is not func:
            if active or func in self.plan.starts:
                return self._advance(func, args, kwargs, run)
            return run(*args, **kwargs)
        match = active[0]
        checker = match.checker
        if checker.before is not None:
            checker.before(match, args, kwargs)
        out = run(*args, **kwargs)
        if checker.after(match, args, kwargs, out):
            match.at += 1
            if self._pending:
                self._attach(match)
            if match.is_complete:
                self.active = []
                self.forward.complete(match)
        else:
            self._discard(match, self.number + 1)
        return out

    def _advance(self, func: Any, args: Any, kwargs: Any, run: Any) -> Any:
        """Run an operator that goes on with several matches, ends some, or begins others."""
        for match in [m for m in self.active if m.checker.func is not func]:
            self._discard(match, self.number)
        running = [*self.active]
        starting = [Match(u) for u in self._starting(func)]
        for match in (*running, *starting):
            if match.checker.before is not None:
                match.checker.before(match, args, kwargs)
        out = run(*args, **kwargs)
        for match in running:
            if match.checker.after(match, args, kwargs, out):
                match.at += 1
                self._attach(match)
            else:
                self._discard(match, self.number + 1)
        for match in starting:
            if match.checker.after(match, args, kwargs, out) and self.forward.may_begin(match):
                match.at, match.first = 1, self.number
                self.active.append(match)
                self._attach(match)
        self._complete()
        return out

    def _starting(self, func: Any) -> list[UnitPlan]:
        """Return the units that may begin with an operator: the expected one, others if it is not running."""
        candidates = [] if self.has_stopped else self.plan.starts.get(func, [])
        expected, at = self.forward.expected, self.forward.expected_at
        if candidates and at >= 0 and not self.is_off_path:
            is_running = any(m.of is expected for m in self.active)
            if self.number < at or is_running or (self.number == at and expected in candidates):
                beginning = self.forward.beginning(self.number)
                return [u for u in candidates if u in beginning or (self.number == at and u is expected)]
            if self._loses(self.number):
                return self._starting(func)
        if at >= 0:
            return [] if self.active else [u for u in candidates if u.is_fallback]
        if self.active and not self.plan.has_varied:
            return [u for u in candidates if u is expected and all(m.of is not u for m in self.active)]
        if expected in candidates and not self.plan.has_varied:
            return [u for u in candidates if u is expected]
        return candidates

    def _complete(self) -> None:
        """Complete the match that has come to its end, unless that of the expected unit is still running.

        If that one failed before, another one counts instead, which drops something.
        """
        complete = [m for m in self.active if m.is_complete]
        if not complete:
            return
        expected = next((m for m in self.active if m.of is self.forward.expected), None)
        chosen = complete[0] if expected is None else expected
        if not chosen.is_complete:
            others = [m for m in complete if chosen.of.may_fail and drops(m.of.unit)]
            if not others:
                for match in complete:
                    self._discard(match, self.number + 1)
                return
            chosen = others[0]
        for match in [m for m in self.active if m is not chosen]:
            self._discard(match, self.number + 1)
        self.active = []
        self.forward.complete(chosen)

    def _discard(self, match: Match, following: int) -> None:
        """End a match that failed; units may begin with operator `following`."""
        self.active.remove(match)
        if match.of is self.forward.expected and match.at > 1:
            if self.forward.expected_at < 0:
                self.plan.has_varied = match.of.may_fail = True
            self._loses(following)

    def _loses(self, number: int) -> bool:
        """Note that the forward left the way that it went; return whether it goes on with another from an operator."""
        if self.active:
            number = self.active[0].first
        self.is_off_path = not (self.forward.expected_at >= 0 and self.forward.switch_path(number))
        return not self.is_off_path

"""Learning: a forward runs as it is, and a dispatch mode beside it records its tape."""

from __future__ import annotations

import functools
import sys
import traceback
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from revfx import _torch
from revfx.engine import dispatch
from revfx.engine.dispatch import HookedMode, is_wrapper
from revfx.engine.operators import is_question, written_arguments
from revfx.engine.randomness import state_before
from revfx.engine.saved import SavedTensor
from revfx.engine.tape import Allocation, Op, Ref, Tape, Value, View
from revfx.engine.whole import Whole, whole_call
from revfx.engine.wrappers import SavedWrapper, unwrapped
from revfx.errors import is_revfx, is_users
from revfx.parts import CompiledPart
from revfx.passes._torch import is_overload, is_random
from revfx.passes.facts import LIMIT


Result = TypeVar("Result")


def unprofiled(function: Callable[..., Result]) -> Callable[..., Result]:
    """Hide the calls that `function` makes from Python's profile function; one of ours finds declared inverses.

    Recording makes 150 times as many calls as an encoder does, and took three times as long with them reported.
    """

    @functools.wraps(function)
    def hidden(*args: Any, **kwargs: Any) -> Result:
        profile = sys.getprofile()
        if not callable(profile):  # there is none, or one in C, which can't be set again
            return function(*args, **kwargs)
        sys.setprofile(None)
        try:
            return function(*args, **kwargs)
        finally:
            sys.setprofile(profile)

    return hidden


class Learning(HookedMode):
    """Record the tape of the operators that run while it is entered; all saved tensors are kept.

    Args:
        model: its modules have paths on the tape, and its parameters and buffers roles.
        inputs: the tensors that the forward is given, which are no constants.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self._inputs = {id(t) for t in unwrapped(inputs)}
        self.tape: Tape = Tape()
        self._settings = _torch.kernel_settings()
        self.saved: list[weakref.ref[SavedTensor]] = []  # as on the tape
        self._values: dict[int, tuple[int, weakref.ref[Tensor]]] = {}  # by the id of a tensor
        self._saved_at: dict[int, int] = {}  # by value: the number of a saved tensor
        self._tensors: dict[int, weakref.ref[Tensor]] = {}  # by value
        self._views: dict[tuple[int, int, View], int] = {}  # by allocation, its writes, and view: a value
        self._memory: dict[int, tuple[int, Any]] = {}  # by storage, or tensor without: an allocation
        self._start = dispatch.autograd_time()
        self._fixed: set[int] = set()  # operators that read constants alone
        self._modules = {id(m): path for path, m in model.named_modules()}
        self._roles: dict[int, str] = {}
        for role, tensors in (("buffer", model.buffers()), ("parameter", model.parameters())):
            self._roles.update({id(t): role for t in unwrapped(tensors)})
        self.set_unpack(lambda saved: saved.get())

    def set_unpack(self, unpack: Callable[[Any], Tensor]) -> None:
        """Set the function that returns the tensor of a saved tensor for the backward."""
        self._unpack = unpack
        self.set_hooks(self._pack, unpack)

    @_torch.never_compiled
    @unprofiled
    def _pack(self, t: Tensor) -> SavedTensor | SavedWrapper:
        if is_wrapper(type(t)) and not t.is_nested:
            return SavedWrapper(t, self._pack)
        saved = SavedTensor(t)
        if dispatch.is_compiling():
            return saved
        self._note_saved(saved, t)
        return saved

    def _note_saved(self, saved: SavedTensor, t: Tensor) -> None:
        value = self.number(t)
        self.tape.saved.append((len(self.tape.ops), value))
        self._saved_at[value] = len(self.saved)
        self.saved.append(weakref.ref(saved))

    # --- values
    def number(self, t: Tensor) -> int:
        """Return the number of the value that `t` holds now."""
        known = self._values.get(id(t))
        if known is None or known[1]() is not t:
            return self._enter(t)
        value = self.tape.values[known[0]]
        allocation = self.tape.allocations[value.allocation]
        if value.writes == allocation.writes:
            return known[0]
        if not any(n > value.writes and view.overlaps(value.view) for n, view in allocation.written):
            return known[0]
        return self._enter(t, before=known[0])

    def _enter(self, t: Tensor, op: int | None = None, before: int | None = None) -> int:
        """Return the value of a tensor that the tape does not know yet, made by an operator or by nobody."""
        number, view = self._allocation(t, op is not None), _view_of(t)
        allocation = self.tape.allocations[number]
        key = number, allocation.writes, view
        value = self._views.get(key)
        if value is None:
            value = self._views[key] = len(self.tape.values)
            if op is None and allocation.last_write is not None and allocation.writes:
                op = allocation.last_write  # the tensor is a view of what this operator wrote
            self.tape.values.append(Value(number, allocation.writes, view, t.device, op, before))
            is_constant = allocation.is_outside and allocation.role != "input" and not allocation.writes
            if is_constant and not t.requires_grad:
                if op is None:
                    self.tape.constants[value] = t
                else:  # a view, which may come to hold the graph
                    self.tape.fixed.add(value)
            elif op in self._fixed and allocation.is_strided and t.numel() <= LIMIT:
                self.tape.fixed.add(value)
                if allocation.writes:
                    with dispatch.unseen():
                        self.tape.constants[value] = t.detach().clone()  # it may be written to again
        reference = weakref.ref(t)
        self._values[id(t)] = value, reference
        self._tensors[value] = reference
        return value

    def _allocation(self, t: Tensor, is_made: bool) -> int:
        has_storage = t.layout == torch.strided and _torch.is_plain(t) and not t.is_nested and not is_lazy(t)
        owner: Any = t.untyped_storage() if has_storage else t
        key = _torch.storage_key(t) if has_storage else id(t)
        role = "input" if id(t) in self._inputs else self._roles.get(id(t), "")
        if not role and not is_made and dispatch.is_older(t, self._start):
            role = "attribute"
        known = self._memory.get(key)
        if known is not None and known[1]() is not None:
            is_set = role in ("parameter", "buffer") and not self.tape.allocations[known[0]].is_outside
            if not is_set:  # by `p.data = ...` in the forward: the next one finds it there
                return known[0]
        number = len(self.tape.allocations)
        nbytes = owner.nbytes() if has_storage else 0
        self.tape.allocations.append(Allocation(nbytes, not is_made, has_storage, role))
        self._memory[key] = number, weakref.ref(owner)
        return number

    def is_known(self, t: Tensor) -> bool:
        """Return whether the tape has a value that `t` holds."""
        known = self._values.get(id(t))
        return known is not None and known[1]() is t

    def tensor(self, value: int) -> Tensor | None:
        """Return a tensor that holds a value: the user's, or a saved one; None if there is none any more."""
        t = self._tensors[value]()
        if t is not None and self._values[id(t)][0] == value:
            return t
        at = self._saved_at.get(value)
        saved = None if at is None else self.saved[at]()
        return None if saved is None else saved.tensor

    # --- operators
    def before(self, module: str) -> None:
        """Prepare for an operator of a module, which is about to run."""

    def before_write(self, written: Sequence[Tensor]) -> None:
        """Prepare for an operator that is about to write to tensors."""

    @_torch.never_compiled
    @unprofiled
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(map(is_wrapper, types)):
            return NotImplemented  # their class runs others
        is_foreign = any(map(_torch.is_fake_class, types)) and not dispatch.on_fakes.get()
        if is_foreign or dispatch.is_compiling() or is_question(func):
            return func(*args, **kwargs)
        return self._record(func, args, kwargs, func)

    def part(self, part: CompiledPart, args: Any, kwargs: Any) -> Any:
        """Make the call of a compiled part, and record it as an operator."""
        call = whole_call(part, args, kwargs)
        call.unpack = self._unpack
        with dispatch.unwatched():
            self._record(call.whole, call.operands, {}, call.run)
            for saved in call.saved:
                assert saved.tensor is not None
                self._note_saved(saved, saved.tensor)
        return call.take()

    def _record(self, func: Any, args: Any, kwargs: Any, run: Callable[..., Any]) -> Any:
        """Run an operator, or its stand-in `run`, and add it to the tape."""
        module, where = self._place()
        if isinstance(func, Whole):
            module = self._modules.get(id(args[0].module), module)
        self.tape.changes_settings |= _torch.kernel_settings() != self._settings
        self.before(module)
        spec = pytree.tree_map_only(Tensor, lambda t: Ref(self.number(t)), (args, kwargs))
        is_operator = is_overload(func)
        has_state = is_random(func, args, kwargs) if is_operator else isinstance(func, Whole)
        state = state_before(args, kwargs) if has_state else None
        written = written_arguments(func, args, kwargs) if is_operator else []
        before = [self.number(t) for t in written]
        self.before_write(written)
        out = run(*args, **kwargs)
        number = len(self.tape.ops)
        changed: set[int] = set()
        for value in before:
            changed.add(self.tape.values[value].allocation)
        for at in changed:
            self.tape.allocations[at].writes += 1
            self.tape.allocations[at].last_write = number
        for value in before:
            allocation = self.tape.allocations[self.tape.values[value].allocation]
            allocation.written.append((allocation.writes, self.tape.values[value].view))
        op = Op(func, tuple(spec[0]), spec[1], state=state, module=module, where=where)
        if is_operator and state is None and all(v in self.tape.constants or v in self.tape.fixed for v in op.reads):
            self._fixed.add(number)
        after = [self._written(t, number, was) for t, was in zip(written, before, strict=True)]
        results = [out] if isinstance(out, Tensor) else pytree.tree_leaves(out)
        if any(is_wrapper(type(t)) for t in results):
            results = unwrapped(results)
        outs: list[int | None] = []
        for t in results:
            outs.append(self._result(t, number) if isinstance(t, Tensor) else None)
        op.outs, op.is_single = tuple(outs), isinstance(out, Tensor)
        op.written = tuple(zip(before, after, strict=True))
        self.tape.ops.append(op)
        return out

    def _written(self, t: Tensor, op: int, before: int) -> int:
        return self._enter(t, op, before)

    def _result(self, t: Tensor, op: int) -> int:
        known = self._values.get(id(t))
        if known is not None and known[1]() is t:
            return self.number(t)
        return self._enter(t, op)

    def _place(self) -> tuple[str, str]:
        """Return the path of the innermost module that runs, and the user's file and line.

        Before Python 3.13, a frame whose variables were read, here or for a profile function, holds them as they were
        until they are read again. So those of all frames of the forward are read: no tensor that the program has let go
        of is alive when an operator runs.
        """
        module = where = ""
        is_inside = is_outside = False  # of the forward: the engine's own frames come first, its caller's last
        for frame, line in traceback.walk_stack(_torch.caller()):
            code = frame.f_code
            is_outside |= is_inside and is_revfx(code.co_filename)
            is_inside |= not is_revfx(code.co_filename)
            if not where and is_users(code.co_filename):
                where = f"{code.co_filename}:{line}"
            if is_inside and not is_outside:
                variables = frame.f_locals
                if not module and code.co_name == "forward":
                    module = self._modules.get(id(variables.get("self")), "")
            if where and is_outside:
                break
        return module, where


def _view_of(t: Tensor) -> View:
    if t.is_nested or is_lazy(t):
        return View(t.dtype, (), (), id(t))
    if t.layout != torch.strided or not _torch.is_plain(t):
        return View(t.dtype, tuple(t.shape), (), id(t))
    return View(t.dtype, tuple(t.shape), t.stride(), int(t.storage_offset()), t.is_conj(), t.is_neg())

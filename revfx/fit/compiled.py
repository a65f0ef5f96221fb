"""Compiled parts of a model: a call of one is an operator of the tape, whatever it runs inside.

It gives what autograd keeps of it and what it returns, and runs again whole, by the same kernels.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Hashable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.utils import _pytree as pytree

from revfx import _torch
from revfx.ambient import Autocast, autocast_of, autocast_states, device_types, given
from revfx.capture.memo import structure
from revfx.eager.reach import Reach
from revfx.eager.state import CallState, Random
from revfx.errors import RevfxError
from revfx.layout import leaf
from revfx.passes.sizes import tensors_of
from revfx.world import RealWorld


Gradients = Callable[[Sequence[Tensor | None]], Sequence[Tensor | None]]

active_step: ContextVar[Any] = ContextVar("revfx_active_step", default=None)  # a step, or what records one

running: ContextVar[Sequence[BlockCall]] = ContextVar("revfx_running", default=())  # of the converted model that runs


class Part:
    """What stands in the place of a module's compiled `call`: it tells who is watching."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self.module, self.call = module, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watch = None if torch.compiler.is_compiling() else active_step.get()
        return self.call(*args, **kwargs) if watch is None else watch.part(self, args, kwargs)

    def __reduce__(self) -> Any:
        return Part, (self.module, self.call)

    @cached_property
    def reach(self) -> Reach:
        """Return what a call can see."""
        return Reach((self.module,))

    def state(self) -> CallState:
        """Return what a call that begins now depends on, to be settled when it has ended."""
        state = CallState(type(self.module).__name__, self.reach)
        devices = {p.device for p in (*self.module.parameters(), *self.module.buffers())}
        state.random = Random(d for d in devices if d.type != "cpu")
        return state


class BlockCall(Part):
    """A part of the converted model that is `running`; for others its module's own call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self not in running.get():  # another thread runs the plain model
            return _torch.UNCOMPILED_CALL(self.module, *args, **kwargs)
        return super().__call__(*args, **kwargs)


class BlockCalls:
    """Compiled calls of a model's blocks, which are in place only while the converted model runs.

    The plain model shares its modules with the converted one, and stays uncompiled.
    """

    def __init__(self, calls: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> None:
        self.calls = [BlockCall(module, call) for module, call in calls]
        self.lock, self.users = threading.Lock(), 0

    @contextlib.contextmanager
    def active(self) -> Generator[None]:
        """Open a context in which blocks run compiled, for the thread that opens it."""
        with self.lock:
            self.users += 1
            for call in self.calls:
                vars(call.module)[_torch.COMPILED] = call
        try:
            with given(running, self.calls):
                yield
        finally:
            with self.lock:
                self.users -= 1
                if not self.users:
                    for call in self.calls:
                        vars(call.module).pop(_torch.COMPILED, None)


def parts_of(model: nn.Module) -> list[str]:
    """Return the names of the compiled modules that lie in no others; their calls can be watched from now on.

    Raises:
        RevfxError: the model is compiled as a whole.
    """
    found: list[str] = []
    for name, m in model.named_modules():
        if not _torch.is_compiled(m) or any(name.startswith(f"{outer}.") for outer in found):
            continue
        if not name:
            what = "it is compiled as a whole, and no part of that can run again:"
            raise RevfxError(f"{what} compile its blocks instead (`block.compile()`), or see `compile=True`.")
        found.append(name)
        call = vars(m).get(_torch.COMPILED) or partial(_torch.UNCOMPILED_CALL, m)
        if not isinstance(call, Part):
            vars(m)[_torch.COMPILED] = Part(m, call)
    return found


@dataclass(frozen=True)
class StateOf:
    """In the place of an operator's argument: the state that the how-many-th call of a part in a step begins with."""

    number: int = field(compare=False)


@dataclass(frozen=True)
class Whole:
    """A call as an operator, of the state that it begins with and its leaves: which of these need gradients, what was
    set around it, and what it shares with calls that are alike.
    """

    part: Part = field(compare=False)
    kind: Hashable
    spec: pytree.TreeSpec
    needs: tuple[bool, ...]
    grad: bool
    autocast: Autocast
    cached: bool

    @staticmethod
    def of(part: Part, leaves: Sequence[Any], spec: pytree.TreeSpec, cached: bool) -> Whole:
        """Return that of a call that is made now."""
        needs = tuple([isinstance(t, Tensor) and t.requires_grad for t in leaves])
        kind = structure(getattr(part.module, "_orig_mod", part.module))
        return Whole(part, kind, spec, needs, torch.is_grad_enabled(), autocast_states(device_types()), cached)

    def __str__(self) -> str:
        return f"compiled {type(getattr(self.part.module, '_orig_mod', self.part.module)).__name__}"

    def run(self, leaves: Sequence[Any]) -> tuple[Any, Gradients]:
        """Return what the call returns, and what gives the gradients of its leaves and parameters for those of that; it
        holds none of these tensors.
        """
        with torch.set_grad_enabled(self.grad):
            root = torch.zeros((), requires_grad=True)
            starts = [needs and self.grad for needs in self.needs]
            given = [
                Entry.apply(root, t) if start else leaf(t, needs) if isinstance(t, Tensor) else t
                for t, start, needs in zip(leaves, starts, self.needs, strict=True)
            ]
            args, kwargs = pytree.tree_unflatten(given, self.spec)
            result = self.part.call(*args, **kwargs)
        outs = [get_gradient_edge(t) if t.requires_grad else None for t in tensors_of(result)]
        wanted: list[Any] = [get_gradient_edge(t) for t, start in zip(given, starts, strict=True) if start]
        wanted += [p for p in self.part.module.parameters() if p.requires_grad]

        def gradients(of: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
            both = [(e, g) for e, g in zip(outs, of, strict=True) if e is not None and g is not None]
            return torch.autograd.grad([e for e, _ in both], wanted, [g for _, g in both], allow_unused=True)

        return result, gradients

    def again(self, state: CallState | StateOf, *leaves: Any) -> tuple[Any, Gradients, list[Tensor]]:
        """Return the same of the call as it is made once more, from its state (none: to see what it costs, with nothing
        of the user's changed or told), and what autograd keeps of it.
        """
        kept: list[Tensor] = []

        @_torch.uncompiled
        def pack(t: Tensor) -> Tensor:
            kept.append(t.detach())
            return kept[-1]

        with contextlib.ExitStack() as stack:
            if isinstance(state, CallState):
                stack.callback(state.put_back())
            else:
                stack.enter_context(RealWorld(self.part.module, (), {}).entered())
            stack.enter_context(autocast_of(self.autocast, self.cached))
            stack.enter_context(_torch.above_autograd())
            stack.enter_context(saved_tensors_hooks(pack, _torch.uncompiled(lambda t: t)))
            return *self.run(leaves), kept

    def __call__(self, state: CallState | StateOf, *leaves: Any) -> list[Tensor]:
        """Return what autograd keeps of the call, and its results."""
        result, _, kept = self.again(state, *leaves)
        return [*kept, *(t.detach() for t in tensors_of(result))]


@dataclass(frozen=True)
class Back:
    """The backward of a call as an operator, of the operands of the forward and the gradients of its results."""

    whole: Whole

    def __str__(self) -> str:
        return f"backward of {self.whole}"

    def ready(self, *operands: Any) -> Callable[[], Any]:
        """Return what runs it once; what autograd keeps for it goes on the way."""
        n = 1 + len(self.whole.needs)
        _, gradients, _ = self.whole.again(*operands[:n])
        return lambda: gradients(operands[n:])


class Entry(torch.autograd.Function):
    """The identity of the second of two tensors, at which a graph of autograd's begins: it leads on to the first."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, t: Tensor) -> Tensor:
        """Return it."""
        return t.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Do nothing, as nobody asks beyond."""
        return None, None


class Bracket(torch.autograd.Function):
    """`run()`, and in the backward `back` of the gradients, for some tensors: what is in between has its own graph."""

    @staticmethod
    def forward(ctx: Any, run: Any, back: Any, *_: Tensor) -> Any:
        """Return the results."""
        ctx.back, outs = back, run()
        found = [(t.detach(), t.requires_grad) for t in outs]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[t for t, needs in found if not needs])
        return tuple([t for t, _ in found])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        """Return the gradients of the tensors."""
        return None, None, *ctx.back(gradients)

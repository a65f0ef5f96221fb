"""Compiled parts of a model: a call of one is an operator of the tape, whatever it runs inside.

It gives what autograd keeps of it and what it returns, and runs again whole, by the same kernels.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.utils import _pytree as pytree

from revfx import _torch
from revfx.ambient import Autocast, autocast_of, autocast_states, device_types
from revfx.layout import leaf
from revfx.parts import Part, structure
from revfx.passes.sizes import tensors_of
from revfx.world.fake import RealWorld
from revfx.world.reach import Reach
from revfx.world.state import CallState, Random


Gradients = Callable[[Sequence[Tensor | None]], Sequence[Tensor | None]]

_reaches: weakref.WeakKeyDictionary[Part, Reach] = weakref.WeakKeyDictionary()


def state_of(part: Part) -> CallState:
    """Return what a call of a part that begins now depends on, to be settled when it has ended."""
    module = part.module
    if part not in _reaches:
        _reaches[part] = Reach((module,))
    state = CallState(type(module).__name__, _reaches[part])
    devices = {p.device for p in (*module.parameters(), *module.buffers())}
    state.random = Random(d for d in devices if d.type != "cpu")
    return state


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

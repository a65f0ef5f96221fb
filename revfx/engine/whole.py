"""Calls of compiled parts as operators: nobody looks into them, and they run again whole, by the same kernels."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from revfx import _torch
from revfx.ambient import Autocast, all_default_states, autocast_states, device_types, restore, set_variable
from revfx.engine import dispatch
from revfx.engine.saved import SavedTensor
from revfx.layout import as_leaf
from revfx.parts import CompiledPart, content, part_observer, structure
from revfx.passes.sizes import tensors_of


class Again(NamedTuple):
    """A call that was made once more: the saved tensors, its arguments, and its results, with a graph of their own."""

    saved: Sequence[Tensor]
    leaves: Sequence[Any]
    results: Sequence[Tensor]


@dataclass(frozen=True)
class Whole:
    """Calls of compiled parts that are alike, as an operator.

    Its operands are the part, the leaves of its arguments, and the parameters of the module, which it reads by itself.
    Its results are the tensors that autograd saves of it, and those that it returns.

    Attributes:
        name: of the module's class.
        structure: of the module.
        spec: the structure of its arguments.
        leaves: their types, shapes and strides, as other ones may have other kernels, which save other tensors.
        needs: which of these leaves need gradients.
        modes: whether each module in it is in training.
        grad, autocast, is_cached: the grad mode and autocast around it, and whether autocast kept its casts.
    """

    name: str
    structure: Hashable
    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    needs: tuple[bool, ...]
    modes: tuple[bool, ...]
    grad: bool
    autocast: Autocast
    is_cached: bool

    @property
    def is_repeatable(self) -> bool:
        """Whether it may run again: no call wrote to its arguments so far."""
        return self not in _writers

    def __str__(self) -> str:
        return f"compiled {self.name}"

    @property
    def __name__(self) -> str:
        return f"compiled_{self.name}"

    def run(self, part: CompiledPart, leaves: Sequence[Any], hooks: saved_tensors_hooks) -> Any:
        """Call a part, with hooks for saved tensors; nobody looks on."""
        args, kwargs = pytree.tree_unflatten(list(leaves), self.spec)
        with dispatch.unwatched(), set_variable(part_observer, None), hooks:
            return part.call(*args, **kwargs)

    def again(self, part: CompiledPart, operands: Sequence[Any]) -> Again:
        """Call a part once more; buffers and random states stay as they are."""
        kept: list[Tensor] = []

        @_torch.never_compiled
        def pack(t: Tensor) -> Tensor:
            kept.append(t.detach())
            return kept[-1]

        with contextlib.ExitStack() as stack:
            stack.enter_context(dispatch.outside())
            stack.enter_context(undisturbed(part.module))
            stack.enter_context(_in_modes(part.module, self.modes))
            for device, enabled, dtype in self.autocast:  # compiled functions are guarded by these
                stack.enter_context(torch.autocast(device, dtype, enabled, self.is_cached))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            leaves: list[Any] = []
            for x, needs in zip(operands, self.needs, strict=False):
                leaves.append(as_leaf(x, needs) if isinstance(x, Tensor) else x)
            result = self.run(part, leaves, saved_tensors_hooks(pack, _torch.never_compiled(lambda t: t)))
            return Again(kept, leaves, tensors_of(result))

    def __call__(self, part: CompiledPart, *operands: Any) -> list[Tensor]:
        """Call a part once more; return the saved tensors, and the results."""
        again = self.again(part, operands)
        return [*again.saved, *(t.detach() for t in again.results)]


@dataclass
class WholeCall:
    """A call that is made now.

    Attributes:
        unpack: returns the tensor of a saved tensor for the backward.
        saved: the saved tensors.
        result: of the call.
    """

    whole: Whole
    operands: tuple[Any, ...]
    unpack: Callable[[Any], Tensor] = SavedTensor.get
    saved: list[SavedTensor] = field(default_factory=list[SavedTensor])
    result: Any = None

    def run(self, part: CompiledPart, *operands: Any) -> list[Tensor]:
        """Make the call; return the results of the operator."""
        leaves = operands[: len(self.whole.needs)]
        before = [(t, _torch.version(t)) for t in tensors_of(leaves)]
        self.result = self.whole.run(part, leaves, saved_tensors_hooks(self._pack, self.unpack))
        if any(_torch.version(t) != version for t, version in before):
            _writers.add(self.whole)
        return [*(s.tensor for s in self.saved if s.tensor is not None), *tensors_of(self.result)]

    def take(self) -> Any:
        """Return the result, and free all tensors: hooks that are still to be called hold this object."""
        result, self.result, self.saved, self.operands = self.result, None, [], ()
        return result

    @_torch.never_compiled
    def _pack(self, t: Tensor) -> SavedTensor:
        saved = SavedTensor(t)
        self.saved.append(saved)
        return saved


def whole_call(part: CompiledPart, args: Any, kwargs: Any) -> WholeCall:
    """Return a call of a part as that of an operator."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    needs = tuple([isinstance(t, Tensor) and t.requires_grad for t in leaves])
    states, is_cached = autocast_states(device_types()), torch.is_autocast_cache_enabled()
    types = tuple(map(_type_of, leaves))
    module = getattr(part.module, "_orig_mod", part.module)
    modes = tuple([m.training for m in part.module.modules()])
    key = spec, types, needs, modes, torch.is_grad_enabled(), states, is_cached
    mine = _of_part.setdefault(part, {})
    if key not in mine:
        whole = Whole(type(module).__name__, structure(module), *key)
        mine[key] = _operators.setdefault(whole, whole)
        while len(_operators) > MAX_OPERATORS:
            del _operators[next(iter(_operators))]
    return WholeCall(mine[key], (part, *leaves, *module.parameters()))


def _type_of(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return type(x)
    return content(x), x.stride() if x.layout == torch.strided else x.layout


@contextlib.contextmanager
def _in_modes(module: nn.Module, modes: Sequence[bool]) -> Generator[None]:
    """Open a context in which modules are in training, or not, as they were."""
    changed = [m for m, training in zip(module.modules(), modes, strict=True) if m.training != training]
    for m in changed:
        m.training = not m.training
    try:
        yield
    finally:
        for m in changed:
            m.training = not m.training


MAX_OPERATORS = 256  # that are known at once
_operators: dict[Whole, Whole] = {}
_writers = set[Whole]()
_of_part: weakref.WeakKeyDictionary[CompiledPart, dict[Any, Whole]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def undisturbed(module: nn.Module) -> Generator[None]:
    """Open a context after which random states, and the buffers of a module, are as before."""
    buffers = [(b, b.clone()) for b in module.buffers()]
    generators = all_default_states()
    with torch.random.fork_rng(), dispatch.writes_uncounted(b for b, _ in buffers):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, then in buffers:
                    buffer.copy_(then)
            restore(generators)

"""Worlds in which a model's parameters, buffers and arguments are other tensors for a while: fake ones, or doubles."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revfx import _fake, _fsdp, _torch
from revfx.ambient import all_generators, restore
from revfx.world.snapshot import Snapshot
from revfx.world.values import GlobalReads


MAX_REAL_ELEMENTS = 2**20  # elements of a tensor of whole numbers that may be there for real


class World:
    """A model and its arguments: the model holds fake tensors while the world is entered.

    `whole`: those of whole numbers and flags, such as token ids, are real copies, as code may ask for their values.
    """

    def __init__(self, model: nn.Module, args: Any, kwargs: Any, *, whole: bool = False) -> None:
        self.model, self.given, self.whole = model, (args, kwargs), whole
        self.mode = _fake.FakeMode()
        self.fakes: dict[int, tuple[Tensor, Tensor]] = {}  # by the id of the real one, with it
        self.computed_in = _fsdp.computed_in(model.modules())

    @contextlib.contextmanager
    def entered(self) -> Generator[tuple[Any, Any]]:
        """Open a context that gives its arguments; after it the model and Python's random numbers are as before."""
        modules = list(self.model.modules())
        before, drawn = Snapshot(modules), all_generators()
        read = GlobalReads(type(m).forward for m in modules)
        try:
            for m in filter(_fsdp.is_sharded, modules):
                _fsdp.ungathered(m)
            for _, table, then in before.tables:
                table.update({name: self.stand_in(t) for name, t in then.items() if isinstance(t, Tensor)})
            yield pytree.tree_map_only(Tensor, self.stand_in, self.given)
        finally:
            before.restore()
            read.put_back()
            restore(drawn)

    def stand_in(self, t: Tensor) -> Tensor:
        """Return the fake of a real tensor; it has a gradient already, as after the first step of a training."""
        if id(t) in self.fakes:
            return self.fakes[id(t)][1]
        if (
            self.whole
            and not t.is_floating_point()
            and not t.is_complex()
            and t.numel() <= MAX_REAL_ELEMENTS
            and _torch.is_plain(t)
        ):
            self.fakes[id(t)] = t, copy_of(t)
        else:
            fake = self._fake(t)
            fake.requires_grad_(t.requires_grad)
            if isinstance(t, nn.Parameter):
                fake = nn.Parameter(fake, t.requires_grad)
                if t.requires_grad:
                    with self.mode, torch.no_grad():
                        fake.grad = torch.empty_like(fake)
            self.fakes[id(t)] = t, fake
        return self.fakes[id(t)][1]

    def real_of(self, fake: Tensor) -> Tensor | None:
        """Return the tensor that a fake one stands for; None of those that operators made."""
        return next((real for real, other in self.fakes.values() if other is fake), None)

    def _fake(self, t: Tensor) -> Tensor:
        """Return a fake tensor like `t`, in a tape's world at the beginning of an allocation of its own."""
        if self.whole and _is_ordinary(t):
            with self.mode:
                return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
        return _fake.to_fake(self.mode, t.detach(), self.computed_in.get(id(t)))


class RealWorld(World):
    """A world of the model's own numbers, without gradients of its parameters.

    Buffers, arguments, and parameters that share a storage are copies.
    """

    def stand_in(self, t: Tensor) -> Tensor:
        """Return the copy of a tensor; a parameter with a storage of its own is not copied."""
        if id(t) not in self.fakes:
            if isinstance(t, nn.Parameter):
                has_own = not _is_ordinary(t) or t.untyped_storage().nbytes() == t.nbytes
                own = nn.Parameter(t.detach() if has_own else copy_of(t), t.requires_grad)
                if t.requires_grad:
                    own.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            else:
                own = copy_of(t).requires_grad_(t.requires_grad)
            self.fakes[id(t)] = t, own
        return self.fakes[id(t)][1]


def copy_of(t: Tensor) -> Tensor:
    """Return a copy of a tensor with the same strides, at the beginning of an allocation of its own."""
    if not _is_ordinary(t):
        return t.detach().clone()
    copy = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
    once = tuple([slice(None) if stride else slice(1) for stride in t.stride()])  # of expanded dimensions one element
    copy[once].copy_(t.detach()[once])
    return copy


def _is_ordinary(t: Tensor) -> bool:
    """Return whether shape, strides and dtype are all that a tensor has besides its elements."""
    special = t.is_nested or t.is_quantized or t.is_conj() or t.is_neg()
    return _torch.is_plain(t) and t.layout == torch.strided and not special

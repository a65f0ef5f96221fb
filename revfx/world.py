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
from revfx.capture.effects import Snapshot
from revfx.capture.guards import GlobalReads
from revfx.eager import dtensor


FEW = 2**20  # elements of a tensor of whole numbers that may be there for real


class World:
    """A model and its arguments: the model holds fake tensors while the world is entered.

    `whole`: those of whole numbers and flags, such as token ids, are real copies, as code may ask for their values.
    """

    def __init__(self, model: nn.Module, args: Any, kwargs: Any, *, whole: bool = False) -> None:
        self.model, self.given, self.whole = model, (args, kwargs), whole
        self.mode = _fake.FakeMode()
        self.fakes: dict[int, tuple[Tensor, Tensor]] = {}  # by the id of the real one, with it
        self.computed_in = dtensor.computed_in(model.modules())

    @contextlib.contextmanager
    def entered(self) -> Generator[tuple[Any, Any]]:
        """Open a context that gives its arguments; after it the model and Python's random numbers are as before."""
        modules = list(self.model.modules())
        before, drawn = Snapshot(modules), all_generators()
        read = GlobalReads(type(m).forward for m in modules)
        try:
            for m in filter(_fsdp.is_sharded, modules):
                dtensor.ungathered(m)
            for _, table, then in before.tables:
                table.update({name: self.stand_in(t) for name, t in then.items() if isinstance(t, Tensor)})
            yield pytree.tree_map_only(Tensor, self.stand_in, self.given)
        finally:
            before.restore()
            read.put_back()
            restore(drawn)

    def stand_in(self, t: Tensor) -> Tensor:
        """Return the fake of a real tensor; it has a gradient already, as after the first step of a training."""
        if self.whole and not t.is_floating_point() and not t.is_complex() and t.numel() <= FEW and _torch.is_plain(t):
            return self.fakes.setdefault(id(t), (t, t.clone()))[1]
        if id(t) not in self.fakes:
            fake = _fake.to_fake(self.mode, t.detach(), self.computed_in.get(id(t)))
            fake.requires_grad_(t.requires_grad)
            if isinstance(t, nn.Parameter):
                fake = nn.Parameter(fake, t.requires_grad)
                if t.requires_grad:
                    with self.mode, torch.no_grad():
                        fake.grad = torch.empty_like(fake)
            self.fakes[id(t)] = t, fake
        return self.fakes[id(t)][1]


class RealWorld(World):
    """A world of the model's own numbers, whose gradients go nowhere; buffers and arguments are copies."""

    def stand_in(self, t: Tensor) -> Tensor:
        """Return what is there in the place of a tensor."""
        if id(t) not in self.fakes:
            own = t.detach() if isinstance(t, nn.Parameter) else t.detach().clone()
            if isinstance(t, nn.Parameter):
                own = nn.Parameter(own, t.requires_grad)
                if t.requires_grad:
                    own.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            self.fakes[id(t)] = t, own.requires_grad_(t.requires_grad)
        return self.fakes[id(t)][1]

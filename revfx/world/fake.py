"""Temporary replacement of a model's parameters, buffers and arguments: by fake tensors, or by copies."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revfx import _fake, _fsdp, _torch
from revfx.ambient import all_default_states, restore
from revfx.world.snapshot import Snapshot
from revfx.world.values import GlobalReads


MAX_REAL_ELEMENTS = 2**20  # elements of an integer tensor that gets a real copy


class FakeWorld:
    """A model and its arguments: the model holds fake tensors while the world is entered.

    `whole`: tensors of integers and flags, such as token ids, get real copies, as code may read their values.
    """

    def __init__(self, model: nn.Module, args: Any, kwargs: Any, *, whole: bool = False) -> None:
        self.model: nn.Module = model
        self.arguments: tuple[Any, Any] = (args, kwargs)
        self.whole: bool = whole
        self.mode: _fake.FakeMode = _fake.FakeMode()
        self.fakes: dict[int, tuple[Tensor, Tensor]] = {}  # by the id of the real tensor: it and its replacement
        self.gathered_dtypes: dict[int, torch.dtype] = _fsdp.gathered_dtypes(model.modules())

    @contextlib.contextmanager
    def entered(self) -> Generator[tuple[Any, Any]]:
        """Open a context that gives the replaced arguments; then restore the model and the random generators."""
        modules = list(self.model.modules())
        snapshot, generators = Snapshot(modules), all_default_states()
        global_reads = GlobalReads(type(m).forward for m in modules)
        try:
            for m in filter(_fsdp.is_sharded, modules):
                _fsdp.remove_gather_hooks(m)
            for table, content in snapshot.tables:
                table.update({name: self.replace(t) for name, t in content.items() if isinstance(t, Tensor)})
            yield pytree.tree_map_only(Tensor, self.replace, self.arguments)
        finally:
            snapshot.restore()
            global_reads.put_back()
            restore(generators)

    def replace(self, t: Tensor) -> Tensor:
        """Return the replacement of a real tensor."""
        if id(t) not in self.fakes:
            self.fakes[id(t)] = t, self._build_replacement(t)
        return self.fakes[id(t)][1]

    def real_of(self, fake: Tensor) -> Tensor | None:
        """Return the tensor that a fake tensor replaces; None if an operator computed it."""
        return next((real for real, other in self.fakes.values() if other is fake), None)

    def _build_replacement(self, t: Tensor) -> Tensor:
        """Return a fake tensor, or a real copy of integers under `whole`."""
        is_integer = not t.is_floating_point() and not t.is_complex()
        if self.whole and is_integer and t.numel() <= MAX_REAL_ELEMENTS and _torch.is_plain(t):
            return _copy(t)
        fake = self._build_fake(t)
        fake.requires_grad_(t.requires_grad)
        if isinstance(t, nn.Parameter):
            fake = nn.Parameter(fake, t.requires_grad)
            if t.requires_grad:  # it has a gradient, as after the first step of a training
                with self.mode, torch.no_grad():
                    fake.grad = torch.empty_like(fake)
        return fake

    def _build_fake(self, t: Tensor) -> Tensor:
        """Return a fake tensor like `t`; under `whole`, at the beginning of an allocation of its own."""
        if self.whole and _is_ordinary(t):
            with self.mode:
                return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
        return _fake.to_fake(self.mode, t.detach(), self.gathered_dtypes.get(id(t)))


class CopiedWorld(FakeWorld):
    """A world of the model's own numbers, without gradients of its parameters.

    Buffers, arguments, and parameters that share a storage are copies.
    """

    def _build_replacement(self, t: Tensor) -> Tensor:
        """Return a copy of a tensor; a parameter with a storage of its own is not copied."""
        if not isinstance(t, nn.Parameter):
            return _copy(t).requires_grad_(t.requires_grad)
        has_own_storage = not _is_ordinary(t) or t.untyped_storage().nbytes() == t.nbytes
        parameter = nn.Parameter(t.detach() if has_own_storage else _copy(t), t.requires_grad)
        if t.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        return parameter


def _copy(t: Tensor) -> Tensor:
    """Return a copy of a tensor with the same strides, at the beginning of an allocation of its own."""
    if not _is_ordinary(t):
        return t.detach().clone()
    copy = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
    once = tuple([slice(None) if stride else slice(1) for stride in t.stride()])  # one element of expanded dimensions
    copy[once].copy_(t.detach()[once])
    return copy


def _is_ordinary(t: Tensor) -> bool:
    """Return whether a tensor has no properties but its shape, strides and dtype."""
    is_special = t.is_nested or t.is_quantized or t.is_conj() or t.is_neg()
    return _torch.is_plain(t) and t.layout == torch.strided and not is_special

"""Where a tensor lies in memory: what tells two of them apart, and how one is put where another was."""

from __future__ import annotations

import torch
from torch import Tensor

from revfx import _torch


ALIGNED = 64  # bytes: matrix products of other addresses may round otherwise


def address(t: Tensor) -> int:
    """Return where a tensor's elements lie; 0 of those without any, and of classes that do not tell."""
    if not _torch.is_plain(t) or t.layout != torch.strided:
        return 0
    # of a fake tensor there is no address: storages tell
    return _torch.storage_key(t) + int(t.storage_offset()) if _torch.is_fake(t) else t.data_ptr()


def same_view(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors at one address are the same elements in the same order."""
    alike = a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    return alike and a.numel() > 0 and a.is_conj() == b.is_conj() and a.is_neg() == b.is_neg()


def placed(t: Tensor, shape: tuple[int, ...], stride: tuple[int, ...], offset: int) -> Tensor:
    """Return `t` with given strides, at `offset` bytes beyond an aligned address: kernels round by it."""
    if t.stride() == stride and t.data_ptr() % ALIGNED == offset:
        return t
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if t.numel() else 0
    room = torch.empty(extent + ALIGNED // t.element_size(), dtype=t.dtype, device=t.device)
    first = (offset - room.data_ptr()) % ALIGNED // t.element_size()
    return room.as_strided(shape, stride, first).copy_(t.reshape(shape))


def restrided(t: Tensor, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Return `t` with given strides, as far as tensors of its class can have them."""
    if t.layout != torch.strided or t.stride() == stride:
        return t
    if not _torch.is_plain(t):
        return t.contiguous() if stride == torch.empty(shape, device="meta").stride() else t
    if 0 in stride or tuple(t.shape) != shape:
        return t.reshape(shape)
    return torch.empty_strided(shape, stride, dtype=t.dtype, device=t.device).copy_(t)


def leaf(t: Tensor, requires_grad: bool) -> Tensor:
    """Return `t` without its history, requiring a gradient as it is said."""
    leaf = t.detach()
    return leaf.requires_grad_() if requires_grad and (leaf.is_floating_point() or leaf.is_complex()) else leaf

"""The place of a tensor in memory: how to tell two of them apart, and to put one in the place of another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from revfx import _torch


ALIGNED, ALIGNED_ELSEWHERE = 64, 256  # bytes, on the CPU and not: kernels round by the address, less a multiple of it


def address(t: Tensor) -> int | None:
    """Return where a tensor's elements lie; 0 of those without any, None of classes and layouts that do not tell."""
    if not _torch.is_fake(t):
        return _torch.data_address(t)
    # of a fake tensor there is no address: storages tell
    return _torch.storage_key(t) + int(t.storage_offset()) if t.layout is torch.strided else None


def span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Return the number of elements from the first to the last one in memory, with the gaps between them."""
    return 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


def is_dense(t: Tensor) -> bool:
    """Return whether the elements of `t` lie beside each other, each once, in any order of the dimensions."""
    if t.is_contiguous():
        return True
    following = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1:
            if stride != following:
                return False
            following *= size
    return True


def flat(t: Tensor) -> Tensor:
    """Return the elements of `t` in one dimension: a view in the order of memory where it is dense."""
    if t.is_contiguous():
        return t.view(-1)
    return t.as_strided((t.numel(),), (1,)) if is_dense(t) else t.reshape(-1)


def offset_of(t: Tensor) -> int:
    """Return by how many bytes the address of `t` lies beyond an aligned one; 0 where there is none."""
    if t.is_cpu and type(t) is Tensor:
        return t.data_ptr() % ALIGNED
    return 0 if _torch.is_fake(t) else t.data_ptr() % ALIGNED_ELSEWHERE


def placed(t: Tensor, shape: tuple[int, ...], stride: tuple[int, ...], offset: int) -> Tensor:
    """Return `t` with given strides, at `offset` bytes beyond an aligned address: kernels round by it."""
    if t.stride() == stride and offset_of(t) == offset:
        return t
    aligned = ALIGNED if t.is_cpu else ALIGNED_ELSEWHERE
    room = t.new_empty(span(shape, stride) + aligned // t.element_size())
    first = (offset - offset_of(room)) % aligned // t.element_size()
    return room.as_strided(shape, stride, first).copy_(t.reshape(shape))


def copied(t: Tensor) -> Tensor:
    """Return a copy of `t`, without its history, that lies in memory as `t` does: kernels round by it."""
    t = t.detach()
    if t.layout != torch.strided or t.is_nested or not _torch.is_plain(t) or (is_dense(t) and not offset_of(t)):
        return t.clone()
    once = t
    for d, (n, s) in enumerate(zip(t.shape, t.stride(), strict=True)):
        if n > 1 and s == 0:
            once = once.narrow(d, 0, 1)
    aligned = ALIGNED if t.is_cpu else ALIGNED_ELSEWHERE
    room = t.new_empty(span(once.shape, once.stride()) + aligned // t.element_size())
    first = (offset_of(t) - offset_of(room)) % aligned // t.element_size()
    return room.as_strided(once.shape, once.stride(), first).copy_(once).expand(t.shape)


def copied_together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of tensors in one memory, as `copied` does; they share theirs where that takes less.

    Slices `x[:, t]` of a batch each span nearly all of it.
    """
    spans: list[tuple[int, int]] = []  # in bytes
    for t in tensors:
        start = int(t.storage_offset()) * t.element_size() if t.layout == torch.strided else 0
        spans.append((start, start + span(t.shape, t.stride()) * t.element_size() if t.layout == torch.strided else 0))
    first, last = min(start for start, _ in spans), max(stop for _, stop in spans)
    apart = sum(stop - start for start, stop in spans)
    if apart <= last - first or any(not _is_bytes(t) for t in tensors):
        return [copied(t) for t in tensors]
    whole = torch.empty(0, dtype=torch.uint8, device=tensors[0].device)
    whole = copied(whole.set_(tensors[0].untyped_storage(), first, (last - first,), (1,)))
    found: list[Tensor] = []
    for t, (start, _) in zip(tensors, spans, strict=True):
        offset = (int(whole.storage_offset()) + start - first) // t.element_size()
        found.append(t.new_empty(0).set_(whole.untyped_storage(), offset, t.shape, t.stride()))
    return found


def _is_bytes(t: Tensor) -> bool:
    """Return whether a tensor is nothing but bytes in a storage."""
    plain = t.layout == torch.strided and _torch.is_plain(t) and not t.is_nested and not _torch.is_fake(t)
    return plain and not t.is_conj() and not t.is_neg()


def leaf(t: Tensor, requires_grad: bool) -> Tensor:
    """Return `t` without its history, requiring a gradient as it is said."""
    leaf = t.detach()
    return leaf.requires_grad_() if requires_grad and (leaf.is_floating_point() or leaf.is_complex()) else leaf

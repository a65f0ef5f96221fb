"""The layout of tensors in their allocations: addresses, strides, and copies that keep both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from revfx import _torch


ALIGNED, ALIGNED_ELSEWHERE = 64, 256  # bytes, on the CPU and not: kernels round by the address, less a multiple of it


def address(t: Tensor) -> int | None:
    """Return the address of a tensor's elements; 0 if it has none; None for classes and layouts without an address."""
    if not _torch.is_fake(t):
        return _torch.data_address(t)
    if t.layout is not torch.strided:
        return None
    return _torch.storage_key(t) + int(t.storage_offset())  # fake tensors have no address, but storages


def span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Return the number of elements from the first to the last one in memory, including gaps."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


def is_dense(t: Tensor) -> bool:
    """Return whether the elements of `t` are adjacent in memory, each once, in any order of the dimensions."""
    if t.is_contiguous():
        return True
    following = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1:
            if stride != following:
                return False
            following *= size
    return True


def flatten_storage(t: Tensor) -> Tensor:
    """Return the elements of `t` in one dimension: a view in the order of memory if it is dense."""
    if t.is_contiguous():
        return t.view(-1)
    return t.as_strided((t.numel(),), (1,)) if is_dense(t) else t.reshape(-1)


def offset_of(t: Tensor) -> int:
    """Return the bytes from an aligned address to that of `t`; 0 if it has no address."""
    if t.is_cpu and type(t) is Tensor:
        return t.data_ptr() % ALIGNED
    return 0 if _torch.is_fake(t) else t.data_ptr() % ALIGNED_ELSEWHERE


def set_layout(t: Tensor, shape: tuple[int, ...], stride: tuple[int, ...], offset: int) -> Tensor:
    """Return `t` with another layout, on which the rounding of kernels depends.

    Args:
        t: a tensor.
        shape, stride: of the result.
        offset: bytes from an aligned address to that of the result.
    """
    if t.stride() == stride and offset_of(t) == offset:
        return t
    return _allocate(t, shape, stride, offset).copy_(t.reshape(shape))


def _allocate(like: Tensor, shape: Sequence[int], stride: Sequence[int], offset: int) -> Tensor:
    """Return an uninitialised tensor, in a new allocation, at `offset` bytes beyond an aligned address."""
    aligned = ALIGNED if like.is_cpu else ALIGNED_ELSEWHERE
    buffer = like.new_empty(span(shape, stride) + aligned // like.element_size())
    first = (offset - offset_of(buffer)) % aligned // like.element_size()
    return buffer.as_strided(shape, stride, first)


def copy_with_layout(t: Tensor) -> Tensor:
    """Return a detached copy of `t` with its layout, on which the rounding of kernels depends."""
    t = t.detach()
    if t.layout != torch.strided or t.is_nested or not _torch.is_plain(t) or (is_dense(t) and not offset_of(t)):
        return t.clone()
    once = t  # one element of each expanded dimension
    for d, (n, s) in enumerate(zip(t.shape, t.stride(), strict=True)):
        if n > 1 and s == 0:
            once = once.narrow(d, 0, 1)
    return _allocate(t, once.shape, once.stride(), offset_of(t)).copy_(once).expand(t.shape)


def copy_views(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy views of one allocation as `copy_with_layout` does; the copies share an allocation if that is smaller.

    For example, slices `x[:, t]` of a batch each span nearly all of it.
    """
    if not all(map(_is_bytes, tensors)):
        return [copy_with_layout(t) for t in tensors]
    spans: list[tuple[int, int]] = []  # in bytes
    for t in tensors:
        start = int(t.storage_offset()) * t.element_size()
        spans.append((start, start + span(t.shape, t.stride()) * t.element_size()))
    first, last = min(start for start, _ in spans), max(stop for _, stop in spans)
    if sum(stop - start for start, stop in spans) <= last - first:
        return [copy_with_layout(t) for t in tensors]
    whole = torch.empty(0, dtype=torch.uint8, device=tensors[0].device)
    whole = copy_with_layout(whole.set_(tensors[0].untyped_storage(), first, (last - first,), (1,)))
    found: list[Tensor] = []
    for t, (start, _) in zip(tensors, spans, strict=True):
        offset = (int(whole.storage_offset()) + start - first) // t.element_size()
        found.append(t.new_empty(0).set_(whole.untyped_storage(), offset, t.shape, t.stride()))
    return found


def _is_bytes(t: Tensor) -> bool:
    """Return whether the bytes in its storage are all the content of a tensor."""
    is_plain = t.layout == torch.strided and _torch.is_plain(t) and not t.is_nested and not _torch.is_fake(t)
    return is_plain and not t.is_conj() and not t.is_neg()


def as_leaf(t: Tensor, requires_grad: bool) -> Tensor:
    """Return `t` without its history; it requires a gradient if `requires_grad` and its dtype allow that."""
    leaf = t.detach()
    if requires_grad and (leaf.is_floating_point() or leaf.is_complex()):
        leaf.requires_grad_()
    return leaf

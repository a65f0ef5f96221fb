# pyright: reportPrivateUsage=false, reportAttributeAccessIssue=false, reportPrivateImportUsage=false
"""Every use of torch's private API for fake tensors, which have shapes but no data. Read in torch 2.13 and 2.15."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)

from revfx._torch import is_dtensor


FAKE_LOGGER = "torch._subclasses.fake_tensor"  # it logs what operators on fake tensors raise
DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)
NO_FAKE = UnsupportedFakeTensorException


class FakeMode(FakeTensorMode):
    """A mode in which operations compute shapes, dtypes and strides but no data, also for real operands.

    It keeps weak references to the fake tensors that were created in it.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.made: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()  # by their ids

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs or {})
        results = out if isinstance(out, (tuple, list)) else (out,)
        for t in results:
            if isinstance(t, FakeTensor):
                self.made[id(t)] = t
        return out

    def alive(self) -> list[torch.Tensor]:
        """Return the fake tensors that are still referenced."""
        return list(self.made.values())


def to_fake(mode: FakeMode, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return a fake tensor like `tensor`.

    Args:
        mode: the mode of the fake tensor.
        tensor: a tensor; a DTensor gives a fake of its global shape.
        dtype: the dtype of a DTensor's fake; default: the DTensor's own.

    Raises:
        NO_FAKE: the tensor is nested.
    """
    if tensor.is_nested:
        raise NO_FAKE("a nested tensor has no fake one")
    if not is_dtensor(tensor):
        fake = mode.from_tensor(tensor)
        mode.made[id(fake)] = fake
        return fake
    with mode:
        whole = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype or tensor.dtype, device=tensor.device)
        return whole.requires_grad_(tensor.requires_grad)

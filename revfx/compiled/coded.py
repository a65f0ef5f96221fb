"""Codes in a graph that eager kernels run: what its forward makes of a value, and its backward takes the value from.

In an eager region a code is an object that a call holds on to. What a compiled forward hands to its backward are
tensors, so here a code is a few of them.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from revfx import codes
from revfx.codes import Code, Codec, decode, pays_for
from revfx.layout import offset_of, placed
from revfx.passes._torch import overflows
from revfx.passes.sizes import as_number


class Coder:
    """The code of one value of a graph: the tensors of a `Code` (or the value itself), its place, and what is lost."""

    def __init__(self) -> None:
        self.codec, self._lock, self._seen = Codec(), threading.Lock(), 0

    def codes(self, x: Tensor) -> bool:
        """Return whether a code of `x` may pay."""
        return pays_for(x, as_number(x.numel()) * x.element_size())

    def may_lose(self, x: Tensor) -> bool:
        """Return whether a code of `x` may find no room."""
        return not codes.is_counted(x)

    def expected(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return fake tensors, about as large as the code of a fake `x`."""
        with torch.no_grad():
            place, lost = torch.empty(x.dim() + 2, dtype=torch.int64, device="cpu"), x.new_empty((), dtype=torch.int64)
            return *_code_tensors(codes.expected(x, as_number(x.numel())), x), place, lost

    def encode(self, x: Tensor, predicted: Tensor, spent: bool) -> tuple[Tensor, ...]:
        """Return the code of `x` next to `predicted`, whose memory may be written to where it is `spent`."""
        with self._lock:
            if self._seen != (now := overflows()):
                self._seen, self.codec.due = now, True
            code = self.codec.encode(x, predicted, spent) if self.codec.asks(x) else None
        code = Code(0, x.clone(), None, None, None, None) if code is None else code
        place = torch.tensor([code.width, offset_of(x), *x.stride()], dtype=torch.int64)
        none = place.new_zeros(()) if x.is_cpu else x.new_zeros((), dtype=torch.int64)
        return *_code_tensors(code, x), place, none if code.lost is None else code.lost

    def decode(self, predicted: Tensor, *code: Tensor) -> Tensor:
        """Return the value of which `encode` made a code, placed as it was."""
        x, where, near, far, values, place, _ = code
        width, offset, *stride = place.tolist()
        if x.dtype != predicted.dtype:
            parts = [None if t.dtype == torch.bool else t for t in (x, where, near, far, values)]
            x = decode(predicted, Code(width, *parts))
        return x if 0 in stride else placed(x, tuple(predicted.shape), tuple(stride), offset)


def _code_tensors(code: Code, x: Tensor) -> tuple[Tensor, ...]:
    none = x.new_empty(0, dtype=torch.bool)
    return tuple(none if t is None else t for t in (code.packed, code.where, code.near, code.far, code.values))

"""Codes in a graph that eager kernels run: its forward encodes values, and its backward decodes them.

In an eager region a code is an object that a call holds on to. What a compiled forward hands to its backward are
tensors, so here a code is a few of them.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from revfx import codes
from revfx.codes import Code, Codec, Prediction
from revfx.codes.codec import expected, is_counted, pays_for
from revfx.layout import offset_of, placed
from revfx.passes._torch import overflows
from revfx.passes.sizes import as_number


class Coder:
    """The code of one value of a graph: the tensors of a `Code` (or the value itself), its place, and lost escapes."""

    def __init__(self) -> None:
        self.codec, self._lock, self._seen = Codec(), threading.Lock(), 0

    def codes(self, x: Tensor) -> bool:
        """Return whether a code of `x` may pay."""
        return pays_for(x, as_number(x.numel()) * x.element_size())

    def may_lose(self, x: Tensor) -> bool:
        """Return whether a code of `x` may find no room."""
        return not is_counted(x)

    def expected(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return fake tensors, about as large as the code of a fake `x`."""
        with torch.no_grad():
            place, lost = torch.empty(x.dim() + 2, dtype=torch.int64, device="cpu"), x.new_empty((), dtype=torch.int64)
            return *expected(x, as_number(x.numel())).tensors, place, lost

    def encode(self, x: Tensor, predicted: Tensor) -> tuple[Tensor, ...]:
        """Return the code of `x` next to `predicted`."""
        with self._lock:
            if self._seen != (now := overflows()):
                self._seen, self.codec.due = now, True
            code = self.codec.encode(x, Prediction((predicted,))) if self.codec.asks(x) else None
        width = 0 if code is None else code.width
        place = torch.tensor([width, offset_of(x), *x.stride()], dtype=torch.int64)
        lost = place.new_zeros(()) if x.is_cpu else x.new_zeros((), dtype=torch.int64)
        if code is None:
            nothing = x.new_empty(0, dtype=torch.bool)
            return x.clone(), nothing, nothing, nothing, nothing, place, lost
        if code.count is not None:
            lost = (code.count - len(code.values)).clamp_(min=0).view(())
        return code.packed, code.spans, code.values, code.places, code.words, place, lost

    def decode(self, predicted: Tensor, *code: Tensor) -> Tensor:
        """Return the value of which `encode` made a code, placed as it was."""
        x, spans, values, places, words, place, _ = code
        width, offset, *stride = place.tolist()
        if x.dtype != predicted.dtype:
            x, _ = codes.decode(Prediction((predicted,)), Code(width, x, spans, values, places, words))
        return x if 0 in stride else placed(x, tuple(predicted.shape), tuple(stride), offset)

"""Codes in a graph that eager kernels run: its forward encodes values, and its backward decodes them.

In an eager region a code is an object that a call keeps. A compiled forward passes only tensors to its backward, so
here a code is a tuple of tensors.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from revfx import codes
from revfx.codes import Code, Codec, Prediction
from revfx.codes.codec import is_counted, pays_for, typical_code
from revfx.layout import offset_of, set_layout
from revfx.passes._torch import count_overflows
from revfx.passes.sizes import as_number


class Coder:
    """The coding of one value of a graph.

    A code consists of the tensors of a `Code`, or the value itself and empty tensors; a tensor with the width and the
    value's layout; and the number of escapes that overflowed the capacity.
    """

    def __init__(self) -> None:
        self._lock, self._overflows = threading.Lock(), 0
        self.codec: Codec = Codec()

    def codes(self, x: Tensor) -> bool:
        """Return whether a code of `x` may be worth its time."""
        return pays_for(x, as_number(x.numel()) * x.element_size())

    def may_lose(self, x: Tensor) -> bool:
        """Return whether the escapes of `x` may overflow the capacity of its code."""
        return not is_counted(x)

    def expected(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return fake tensors, about as large as the code of a fake `x`."""
        with torch.no_grad():
            layout = torch.empty(x.dim() + 2, dtype=torch.int64, device="cpu")
            overflowed = x.new_empty((), dtype=torch.int64)
            return *typical_code(x, as_number(x.numel())).tensors, layout, overflowed

    def encode(self, x: Tensor, predicted: Tensor) -> tuple[Tensor, ...]:
        """Encode `x` relative to its prediction."""
        code: Code | None = None
        with self._lock:
            count = count_overflows()
            if count != self._overflows:
                self._overflows, self.codec.counts_next = count, True
            if self.codec.needs_prediction(x):
                code = self.codec.encode(x, Prediction((predicted,)))
        width = 0 if code is None else code.width
        layout = torch.tensor([width, offset_of(x), *x.stride()], dtype=torch.int64)
        overflowed = torch.zeros((), dtype=torch.int64, device=x.device)
        if code is None:
            empty = x.new_empty(0, dtype=torch.bool)
            return x.clone(), empty, empty, empty, empty, layout, overflowed
        if code.count is not None:
            overflowed = (code.count - len(code.values)).clamp_(min=0).view(())
        return code.packed, code.spans, code.values, code.places, code.words, layout, overflowed

    def decode(self, predicted: Tensor, *code: Tensor) -> Tensor:
        """Return the encoded value, with its layout."""
        x, spans, values, places, words, layout, _ = code
        width, offset, *stride = layout.tolist()
        if x.dtype != predicted.dtype:
            x, _ = codes.decode(Prediction((predicted,)), Code(width, x, spans, values, places, words))
        if 0 in stride:
            return x
        return set_layout(x, tuple(predicted.shape), tuple(stride), offset)

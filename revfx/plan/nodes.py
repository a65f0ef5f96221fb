"""Functions that the graphs of replays call besides operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from revfx import _torch
from revfx.codes import predict
from revfx.engine.call import Decoder
from revfx.layout import placed
from revfx.passes.program import Arc


Layout = tuple[tuple[int, ...], tuple[int, ...], int, torch.dtype, torch.device]


def place(t: Tensor, layout: Layout) -> Tensor:
    """Return `t` laid out in memory as the tensor that it stands for."""
    shape, stride, offset = layout[:3]
    repeated = [d for d, (n, s) in enumerate(zip(shape, stride, strict=True)) if n > 1 and s == 0]
    if not repeated:
        return placed(t, shape, stride, offset)
    for d in repeated:
        t = t.narrow(d, 0, 1)
    return placed(t, tuple(t.shape), stride, offset).expand(shape)


def empty(layout: Layout) -> Tensor:
    """Return uninitialized memory of this layout."""
    shape, stride, _, dtype, device = layout
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def corrected_inverse(arc: Arc) -> Callable[..., Tensor]:
    """Return an inverse that is corrected by its code.

    The first argument decodes it; a tensor in its place was held instead. The second one says whether the memory of the
    last operand may be written to.
    """

    def invert(code: Decoder | Tensor, may_write: bool, *tail: Tensor) -> Tensor:
        if isinstance(code, Tensor):
            return code
        prediction = predict(arc.solve, *tail)
        if prediction.by is not None:
            return code(prediction, tail[-1] if may_write else None)
        predicted = prediction.like
        # the result of a library's inverse may be its own
        is_new = not arc.declared and all(_torch.storage_key(predicted) != _torch.storage_key(t) for t in tail)
        return code(prediction, predicted if is_new else None)

    return invert


def with_state(func: Any) -> Callable[..., Any]:
    """Return an operator that draws random numbers as a function that first takes the generator with its state."""

    def drawn(state: tuple[torch.Generator, Tensor], *args: Any, **kwargs: Any) -> Any:
        generator, then = state
        now = generator.get_state()
        try:
            generator.set_state(then)
            return func(*args, **kwargs)
        finally:
            try:
                generator.set_state(now)
            except BaseException:  # an interrupt
                generator.set_state(now)
                raise

    return drawn


def after_write(t: Tensor) -> Tensor:
    """Return `t`, as it is after writes to its memory by other views."""
    return t

"""One additive coupling `x + h` as the user's functions give h, and a chain of them with ordinary storage."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from revfx.passes.grid import to_grid


Function = Callable[..., Tensor]


def apply(function: Function, x: Tensor, side: Any) -> Tensor:
    """Return what a function of a coupling gives, which takes its side input only where there is one."""
    return function(x) if side is None else function(x, side)


def couple(x: Tensor, h: Any, name: str, layer: int, k: int | None = None, sign: int = 1) -> Tensor:
    """Return `x + h` (`x - h` where sign is -1), for h of the same shape and device whose sum keeps x's dtype; h is
    rounded to the grid 2^-k where k is given.

    Raises:
        TypeError, ValueError: h is none of that; the text names the function and the layer.
    """
    if not isinstance(h, Tensor):
        raise TypeError(f"`{name}` of layer {layer} returned a {type(h).__name__}; it must return one tensor.")
    if h.shape != x.shape:
        raise ValueError(
            f"`{name}` of layer {layer} returned shape {tuple(h.shape)}, but the stream that it is added to has shape"
            f" {tuple(x.shape)}: a coupling must keep the shape."
        )
    if h.device != x.device:
        raise ValueError(f"`{name}` of layer {layer} returned a tensor on {h.device}, but its stream is on {x.device}.")
    if h.dtype != x.dtype and torch.promote_types(h.dtype, x.dtype) != x.dtype:
        raise ValueError(
            f"`{name}` of layer {layer} returned {h.dtype}, which would turn its stream from {x.dtype} into"
            f" {torch.promote_types(h.dtype, x.dtype)}: a coupling must keep the dtype."
        )
    h = h if k is None else to_grid(h, k)
    return x + h if sign > 0 else x - h


def plain(
    x1: Tensor, x2: Tensor, layers: Iterable[tuple[Function, Function]], sides: tuple[Any, Any], k: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return (y1, y2) of the chain."""
    for layer, (f, g) in enumerate(layers):
        x1 = couple(x1, apply(f, x2, sides[0]), "f", layer, k)
        x2 = couple(x2, apply(g, x1, sides[1]), "g", layer, k)
    return x1, x2

"""A chain of additive couplings `x + h` that a user writes out: run as it is, and as a program for the executor."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from revfx import _torch
from revfx.eager.calls import Call, Slot
from revfx.errors import NotReversibleError
from revfx.passes.cuts import SumSearches
from revfx.passes.program import Arc, Op, Program, Value
from revfx.passes.regions import Region, extend


Function = Callable[..., Tensor]
Meta = tuple[tuple[int, ...], torch.dtype, int]
Shapes = tuple[int, Meta, Meta, tuple[int, ...]]


def apply(function: Function, x: Tensor, side: Any) -> Tensor:
    """Return what a function of a coupling gives, which takes its side input only where there is one."""
    return function(x) if side is None else function(x, side)


def couple(x: Tensor, h: Any, name: str, layer: int, sign: int = 1) -> Tensor:
    """Return `x + h` (`x - h` where sign is -1), for h of the same shape and device whose sum keeps x's dtype, else
    raise.
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
    return x + h if sign > 0 else x - h


def plain(
    x1: Tensor, x2: Tensor, layers: Iterable[tuple[Function, Function]], sides: tuple[Any, Any]
) -> tuple[Tensor, Tensor]:
    """Return (y1, y2) of the chain."""
    for layer, (f, g) in enumerate(layers):
        x1 = couple(x1, apply(f, x2, sides[0]), "f", layer)
        x2 = couple(x2, apply(g, x1, sides[1]), "g", layer)
    return x1, x2


def meta(x: Tensor) -> Meta:
    return tuple(x.shape), x.dtype, x.numel() * x.element_size()


def number_sides(sides: tuple[Any, Any]) -> tuple[list[list[Tensor]], list[Any]]:
    """Return per side input its tensors, and the structure with each tensor's value index in its place."""
    tensors: list[list[Tensor]] = []
    slots: list[Any] = []
    numbers = itertools.count(2)  # after both streams
    for side in sides:
        leaves, spec = _torch.flatten(side)
        slots.append(pytree.tree_unflatten([Slot(next(numbers)) if isinstance(t, Tensor) else t for t in leaves], spec))
        tensors.append([t for t in leaves if isinstance(t, Tensor)])
    return tensors, slots


@functools.lru_cache(maxsize=64)
def program(num_layers: int, x1: Meta, x2: Meta, sides: tuple[int, ...]) -> tuple[Program, Region]:
    """Return the program of a whole chain and its only region; they depend on shapes and dtypes alone."""
    values = [Value(n, *m, storage=i, given=True) for i, (n, m) in enumerate((("x1", x1), ("x2", x2)))]
    values += [Value(f"side_{i}", (), torch.float32, 0, storage=2 + i, source=True) for i in range(sum(sides))]
    side = (tuple(range(2, 2 + sides[0])), tuple(range(2 + sides[0], 2 + sum(sides))))
    ops: list[Op] = []
    streams, metas = [0, 1], (x1, x2)
    for layer in range(num_layers):
        barred = None if layer else "the block's input is kept anyway"
        for i, name in enumerate("fg"):
            x, other = streams[i], streams[1 - i]
            h, y = len(values), len(values) + 1
            values.append(Value(f"{name}{layer}", *metas[i], storage=h))
            values.append(Value(f"y{i + 1}_{layer}", *metas[i], storage=y))
            where = f"layer {layer}"
            ops.append(Op(f"{name}[{layer}]", (other, *side[i]), (h,), where=where))
            text = f"x{i + 1} <- y{i + 1} - {name}{layer}"
            arc = Arc(x, (y, h), torch.sub, exact=False, barred=barred, text=text)
            ops.append(Op("add", (x, h), (y,), (arc,), where=where, opaque=False))
            streams[i] = y
    program = Program(tuple(values), tuple(ops), (streams[0], streams[1]))
    steps, _ = extend(program, len(ops), (streams[0], streams[1]), frozenset(), SumSearches())
    steps.reverse()
    saved = tuple(dict.fromkeys(v for s in steps for v in s.saved))
    region = Region(tuple(steps), saved, (), program.nbytes((0, 1, *streams)), 0)
    return program, region


def _leaving_alone(function: Function, name: str, x: Tensor, side: Any) -> Any:
    """Return what a function gives that gets lists and dicts of its own: what it put in them would be lost."""
    leaves, spec = _torch.flatten(side)
    result = function(x, side)
    now, spec_now = _torch.flatten(side)
    if spec_now != spec or any(a is not b for a, b in zip(leaves, now, strict=True)):
        raise NotReversibleError(
            f"{name} writes to a list or dict in its side input; layers get copies of these, so what it puts there"
            " would be lost. Let it write to something that it closes over, or call with `is_training=False`."
        )
    return result


def calls(program: Program, layers: Sequence[tuple[Function, Function]], slots: list[Any]) -> list[Call]:
    """Return how the operations of a chain's program are run."""
    made: list[Call] = []
    functions = ((layer, i, function) for layer, pair in enumerate(layers) for i, function in enumerate(pair))
    for (layer, i, function), op, add in zip(functions, program.ops[::2], program.ops[1::2], strict=True):
        name, x, side = "fg"[i], Slot(op.ins[0]), slots[i]
        several = isinstance(side, (list, tuple, dict))
        fn = functools.partial(_leaving_alone, function, f"`{name}` of layer {layer}") if several else function
        made.append(Call(f"{name} of layer {layer}", fn, (x,) if side is None else (x, side)))
        made.append(Call(f"add of layer {layer}", couple, (*map(Slot, add.ins), name, layer)))
    return made

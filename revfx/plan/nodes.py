"""Parts of the graphs of replays: placeholders, arguments, and functions that they call besides operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from revfx import _torch
from revfx.codes import predict
from revfx.engine.call import Decoder
from revfx.engine.operators import STATISTICS
from revfx.engine.tape import Tape
from revfx.layout import set_layout
from revfx.passes.program import Arc


Layout = tuple[tuple[int, ...], tuple[int, ...], int, torch.dtype, torch.device]


def layout_of(tape: Tape, value: int) -> Layout:
    """Return the layout of a value in memory of its own."""
    known = tape.values[value]
    return known.view.shape, known.view.stride, 0, known.view.dtype, known.device


def add_placeholder(graph: fx.Graph, name: str) -> fx.Node:
    """Add a placeholder behind those that a graph has."""
    others = graph.find_nodes(op="placeholder", sort=False)
    with graph.inserting_after(others[-1]) if others else graph.inserting_before():
        return graph.create_node("placeholder", name, name=name)


def without_statistics(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of an operator, with None for the running statistics that a normalisation would update."""
    if func not in STATISTICS or args[5] is not True:
        return args
    found = [*args]
    for position in STATISTICS[func]:
        found[position] = None
    return tuple(found)


def place(t: Tensor, layout: Layout) -> Tensor:
    """Return `t` with a layout in memory."""
    shape, stride, offset = layout[:3]
    repeated = [d for d, (n, s) in enumerate(zip(shape, stride, strict=True)) if n > 1 and s == 0]
    if not repeated:
        return set_layout(t, shape, stride, offset)
    for d in repeated:
        t = t.narrow(d, 0, 1)
    return set_layout(t, tuple(t.shape), stride, offset).expand(shape)


def empty(layout: Layout) -> Tensor:
    """Return uninitialized memory of this layout."""
    shape, stride, _, dtype, device = layout
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def corrected_inverse(arc: Arc) -> Callable[..., Tensor]:
    """Return an inverse that is corrected by its code.

    `code` decodes the result; a tensor in its place was held instead. If `is_last_use`, the memory of the last operand
    may be written to.
    """

    def invert(code: Decoder | Tensor, is_last_use: bool, *tail: Tensor) -> Tensor:
        if isinstance(code, Tensor):
            return code
        prediction = predict(arc.solve, *tail)
        if prediction.by is not None:
            return code(prediction, tail[-1] if is_last_use else None)
        predicted = prediction.like
        # A library may hold the result of its own inverse.
        is_own = not arc.declared and _torch.storage_key(predicted) not in map(_torch.storage_key, tail)
        return code(prediction, predicted if is_own else None)

    return invert


def with_state(func: Any) -> Callable[..., Any]:
    """Return a random operator as a function of its generator, the state to draw from, and its own arguments."""

    def draw(state: tuple[torch.Generator, Tensor], *args: Any, **kwargs: Any) -> Any:
        generator, recorded_state = state
        current_state = generator.get_state()
        try:
            generator.set_state(recorded_state)
            return func(*args, **kwargs)
        finally:
            try:
                generator.set_state(current_state)
            except BaseException:  # an interrupt
                generator.set_state(current_state)
                raise

    return draw


def after_write(t: Tensor) -> Tensor:
    """Return `t`, as it is after writes to its memory by other views."""
    return t

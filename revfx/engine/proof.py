"""Proofs: a replay runs at once, while the tensors that it stands for are there to compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from revfx import _torch
from revfx.engine import dispatch
from revfx.engine.unit import Replay
from revfx.passes.rounding import MAX_ERROR


def prove(replay: Replay, inputs: list[Any], check: Callable[[int, Tensor], None]) -> None:
    """Run a replay; call `check` with the slot and the tensor of each result as soon as it is there.

    Results are let go as soon as nothing reads them any more, so that the proof of a unit takes less memory than its
    replay.
    """
    slots: dict[fx.Node, list[int]] = {}
    returned: Any = replay.graph.output_node().args[0]
    for slot, node in zip(replay.outputs, returned, strict=True):
        slots.setdefault(node, []).append(slot)
    last: dict[fx.Node, fx.Node] = {}
    for node in replay.graph.nodes:
        if node.op != "output":
            last.update(dict.fromkeys((node, *node.all_input_nodes), node))
    env: dict[fx.Node, Any] = {}
    values = iter(inputs)
    with torch.enable_grad(), dispatch.replaying():
        for node in replay.graph.nodes:
            if node.op == "output":
                break
            if node.op == "placeholder":
                env[node] = next(values)
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = node.target(*args, **kwargs)
            for slot in slots.get(node, ()):
                check(slot, env[node])
            for n in (node, *node.all_input_nodes):
                if last[n] is node:
                    env.pop(n, None)


def same_values(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and elements; zeros of either sign are the same."""
    if a.shape != b.shape or a.dtype != b.dtype or a.layout != b.layout:
        return False
    if a.layout != torch.strided or not _torch.is_plain(a) or not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    return bool(((a == b) | ((a != a) & (b != b))).all())


def is_close(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors differ by rounding, as inverses without codes may."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return same_values(a, b)
    return bool((a - b).norm() <= MAX_ERROR * b.norm())

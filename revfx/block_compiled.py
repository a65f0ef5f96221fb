"""`rev_block` while `torch.compile` traces it.

Saved-tensor hooks can't be traced. A chain whose functions are proven to draw nothing, write nothing and read no tensor
that is not passed becomes one autograd.Function with explicit parameters, whose backward inverts: one for the whole
chain, because the common-subexpression pass merges a recomputed g(y1) with the forward's and then keeps what it needs,
which costs one layer per Function. Layers that may draw random numbers are checkpointed; anything else stays plain.

The proof runs as part of the traced program, so that Dynamo guards everything it depends on; only what depends on a
class alone (`_class_reads`) is a constant to it.
"""

from __future__ import annotations

import builtins
import dis
import functools
import inspect
import math
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vjp
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from revfx import _torch


Function = Callable[..., Tensor]
Pair = tuple[Function, Function]
Plain = Callable[[Tensor, Tensor, Sequence[Pair], tuple[Any, Any]], tuple[Tensor, Tensor]]

PLAIN, CHECKPOINTED, SAVED = 0, 1, 2


def compiled_chain(
    x1: Tensor, x2: Tensor, layers: Sequence[Pair], sides: tuple[Any, Any], plain: Plain
) -> tuple[Tensor, Tensor]:
    """(y1, y2) of the chain, saved, checkpointed or as `plain` computes it, whatever each run of layers allows."""
    if not torch.is_grad_enabled() or torch.compiler.is_exporting() or _torch.in_functorch_transform():
        return plain(x1, x2, layers, sides)
    levels: dict[int, int] = {}
    runs: list[tuple[int, list[Pair]]] = []
    for pair in layers:
        level = min(_level(pair[0], sides[0]), _level(pair[1], sides[1]))
        if not runs or runs[-1][0] != level:
            runs.append((level, []))
        runs[-1][1].append(pair)
    for level, run in runs:
        if level == SAVED:
            x1, x2 = _saved(x1, x2, run, sides, plain)
        elif level == CHECKPOINTED:
            for pair in run:
                x1, x2 = checkpoint(_one(pair, sides, plain), x1, x2, use_reentrant=False)
        else:
            x1, x2 = plain(x1, x2, run, sides)
    return x1, x2


def _one(pair: Pair, sides: tuple[Any, Any], plain: Plain) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return lambda x1, x2: plain(x1, x2, [pair], sides)

"""Couplings that `torch.compile` traces: inductor compiles them as plain operators, and has to free them too."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

from revfx import _torch


@_torch.constant_when_compiled
def free_couplings() -> None:
    """Let inductor free the couplings of the program that is traced now, as the backend "revfx" does."""
    from revfx.compiled import _inductor
    from revfx.compiled.partitioner import ReversiblePartitioner

    def partition(inputs: Sequence[Any]) -> ReversiblePartitioner:
        say_rounding()
        return ReversiblePartitioner().with_facts_of(inputs)

    _inductor.partition_traced(partition)


@functools.cache  # once
def say_rounding() -> None:
    """Log that a whole compiled graph regenerates tensors up to rounding only."""
    logging.getLogger("revfx").info(
        "in a whole graph that inductor compiles, activations of converted models and blocks come back up to rounding: "
        "the kernels of the backward are others. `convert(model, compile=True)`, not compiled again, is lossless"
    )

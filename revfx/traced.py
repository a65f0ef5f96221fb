"""The requests of couplings that `torch.compile` traces: they run as lines there, and are to be freed too."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

from revfx import _torch


@_torch.constant_when_compiled
def free_couplings() -> None:
    """Have inductor free the couplings of the program that is traced now, as the backend "revfx" does."""
    from revfx.compiled import _inductor
    from revfx.compiled.partitioner import ReversiblePartitioner

    def partition(inputs: Sequence[Any]) -> ReversiblePartitioner:
        say_rounding()
        return ReversiblePartitioner().knowing(inputs)

    _inductor.partition_traced(partition)


@functools.cache  # once
def say_rounding() -> None:
    """Log that tensors which a whole compiled graph regenerates are not the forward's to the last bit."""
    logging.getLogger("revfx").info(
        "in a whole graph that inductor compiles, activations of converted models and blocks come back up to rounding: "
        "the kernels of the backward are others. `convert(model, compile=True)`, not compiled again, is lossless"
    )

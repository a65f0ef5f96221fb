"""Measurements of `revfx.testing`."""

from __future__ import annotations

import torch

from revfx.testing import measure_memory


def test_memory_is_measured_at_each_allocation() -> None:
    x = torch.randn(1000, requires_grad=True)
    memory = measure_memory(lambda: x.sin().exp().sum())
    assert memory.kept == 4004  # the exponential, which the backward reads, and the loss
    assert max(memory.live) == memory.peak
    assert memory.kept in memory.live
    assert memory.live[0] == 0 and memory.live[-1] == 4  # the loss is held until the end

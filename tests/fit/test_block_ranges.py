"""Ranges of blocks that are alike are computed once."""

from __future__ import annotations

import torch
from fit_oracle import made_up
from torch import Tensor, nn

from revfx.fit.block_ranges import BlockRanges
from revfx.fit.foresee import foreseen_step
from revfx.fit.needs import Needs
from revfx.fit.simulate import Model


class Recurrent(nn.Module):
    """A cell in a loop over slices of its input, which begin at different places of its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 16)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return h.exp()


def different(steps: int) -> int:
    """Return how many ranges of blocks are different, at so many steps of the cell."""
    tape = foreseen_step(Recurrent(), (torch.randn(8, steps, 16),), {}).step
    needs = Needs(tape)
    ranges = BlockRanges(Model(needs, made_up(needs)), {})
    blocks = len(ranges.blocks)
    for i in range(blocks):
        for j in range(i + 1, min(i + ranges.merged, blocks) + 1):
            ranges[i, j, False]
    return len(ranges.entries)


def test_alike_steps_of_a_loop_share_their_ranges() -> None:
    assert 0 < different(10) == different(14)

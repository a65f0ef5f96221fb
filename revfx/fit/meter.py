"""The measured peak of a step, if an accelerator's allocator counts: later plans correct a budget that was missed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from revfx import _torch


class Meter:
    """Calls `missed` with the bytes by which a step that begins now went over `most`, once its backward has ended; what
    is there before does not count, nor do the gradients that it is the first to make.
    """

    def __init__(self, model: nn.Module, device: torch.device, most: int, missed: Callable[[int], None]) -> None:
        self.before = _torch.allocated(device)
        self.device: torch.device = device
        self.most: int = most
        self.missed: Callable[[int], None] = missed
        if self.before is not None:
            new = sum(p.nbytes for p in model.parameters() if p.requires_grad and p.grad is None)
            self.most += self.before[0] + new

    def check(self) -> None:
        """Compare; a peak that is not above all that were before tells nothing."""
        after = None if self.before is None else _torch.allocated(self.device)
        if after is not None and self.before is not None and after[1] > max(self.before[1], self.most):
            self.missed(after[1] - self.most)
        self.before = None

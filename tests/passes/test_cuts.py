"""What can be computed again is, rather than solved for: what was added to a large stream keeps all its digits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compiled import INNERS, QUIET, fresh as fresh
from helpers import relative_error
from torch import Tensor, nn
from zoo import D

import revfx
from revfx.converted import conversion_of
from revfx.passes.closure import Invert


pytestmark = QUIET
LARGE = 1e4  # in fp32 a sum with it has an absolute error of 5e-4


class Coupled(nn.Module):
    """Couplings whose first streams stay known, as parts of the input are; `kept`: so is one in the middle."""

    def __init__(self, kept: bool, depth: int = 4) -> None:
        super().__init__()
        self.kept, self.layers = kept, nn.ModuleList(nn.Linear(D, D) for _ in range(depth))
        for p in self.parameters():
            nn.init.normal_(p, std=D**-0.5 / LARGE)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a, b = x.chunk(2, -1)
        more: list[Tensor] = []
        for i, f in enumerate(self.layers):
            a, b = b, a + torch.tanh(f(b))
            if self.kept and i == 1:
                more = [a, b]
        return (a, b, *more)


def gradients(model: nn.Module, call: Any, x: Tensor) -> list[Tensor]:
    """Of all parameters, with other weights for each output, in fp64."""
    losses = [(y * torch.linspace(-1, 1 + k, y.numel(), dtype=y.dtype).view_as(y)).sum() for k, y in enumerate(call(x))]
    torch.stack(losses).sum().backward()
    return [p.grad.double() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("way", ["convert", *INNERS])
def test_small_addends_of_large_streams_keep_their_digits(way: str, kept: bool) -> None:
    torch.manual_seed(0)
    model, x = Coupled(kept).float(), LARGE * torch.randn(16, 2 * D, dtype=torch.float32)
    exact = copy.deepcopy(model).double()
    want = gradients(exact, exact, x.double())
    call: Any = revfx.convert(model) if way == "convert" else None
    call = call or torch.compile(model, backend="revfx", options={"inner": way})
    assert relative_error(gradients(model, call, x), want) < 1e-5  # 1e-3 where tanh is the sum less the stream


@pytest.mark.parametrize("kept", [False, True])
def test_no_step_solves_for_what_it_can_compute_again(kept: bool) -> None:
    converted: Any = revfx.convert(Coupled(kept))
    converted(torch.randn(3, 2 * D, requires_grad=True))
    (found,) = conversion_of(converted).couplings
    (region,) = found.regions
    inverses = [(s, d.arc.head) for s in region.steps for d in s.derive if isinstance(d, Invert)]
    assert inverses
    assert all(found.lowered.program.made_at[head] < step.start for step, head in inverses)

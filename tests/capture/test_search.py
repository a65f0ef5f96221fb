"""The search is linear in the program, counted in operations shown to closures; where nothing is found it says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import Couplings, Residual
from torch import Tensor, nn
from zoo import D

import revfx
from revfx.capture.search import make_plan
from revfx.errors import RevfxWarning
from revfx.passes.closure import Closure


@pytest.mark.parametrize("kind", [Couplings, Residual])
def test_visits_grow_linearly_with_depth(kind: type[Couplings], monkeypatch: pytest.MonkeyPatch) -> None:
    visits = [0]
    add = Closure.add

    def counted(self: Closure, index: int) -> list[int]:
        visits[0] += 1
        return add(self, index)

    monkeypatch.setattr(Closure, "add", counted)
    seen: list[int] = []
    for depth in (20, 40):
        visits[0] = 0
        model = kind(depth, 4, 4, inline=True)
        make_plan(model, model.forward, (torch.randn(2, 8 if kind is Couplings else 4),), {})
        seen.append(visits[0])
    assert seen[1] < 2.2 * seen[0]
    assert seen[1] < 60 * 40, "a few visits per operation"


class Bent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * ctx.saved_tensors[0].cos()


class OfData(nn.Module):
    """Couplings straight on the input, whose numbers `use` may tell apart."""

    def __init__(self, use: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.use, self.scales = use, nn.Parameter(torch.randn(6, D))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for scale in self.scales:
            a = a + self.use(b).real * scale
            b = b + self.use(a).real * scale
        return torch.cat([a, b], -1)


def bent(x: Tensor) -> Any:
    return Bent.apply(x)  # looked up in the forward: in torch 2.15 it could not be recorded otherwise


@pytest.mark.parametrize(("use", "name"), [(bent, "Bent"), (torch.round, "round"), (torch.fft.fft, "fft_fft")])
def test_reason_is_given_where_all_streams_have_to_be_kept(use: Callable[[Tensor], Any], name: str) -> None:
    model, x = OfData(use), torch.randn(8, 2 * D, requires_grad=True)
    converted: Any = revfx.convert(model)
    place = rf"{__file__}:\d+"
    with pytest.warns(RevfxWarning, match=rf"{place}: `add`: `add_\d+` has to be kept: `{name}` \({place}\) may tell"):
        converted(x)
    assert not converted.revfx.plans and len(converted.revfx.refusals) == 2  # one for each line
    assert "-> start with a layer that mixes the data" in str(revfx.explain(model, x))

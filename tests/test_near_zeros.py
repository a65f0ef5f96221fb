"""Which sums may lie near zero without being zero, and that those of ordinary models do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compiled import check, fresh as fresh
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from zoo import D, Pairs

from revfx.passes.atoms import atoms
from revfx.passes.near_zeros import near_zeros


Sum = Callable[[Tensor, Tensor], Tensor]  # of a stream and of what a linear layer gives
# What a graph returns, and whether that may be near zero.
SUMS: dict[str, tuple[Sum, bool]] = {
    "data": (lambda x, h: x + h, False),
    "dropped": (lambda x, h: x + F.dropout(h, 0.5), False),
    "relu": (lambda x, h: x + torch.relu(h), False),
    "masked": (lambda x, h: x + h * (x > 0), False),
    "rounded": (lambda x, h: x + (h * 3.3).round() / 3.3, True),
    "rounded, and mixed": (lambda x, h: x + (h * 3.3).round() @ x, False),
    "rounded, to a stem": (lambda x, h: (x @ x) + (h * 3.3).round(), False),
    "straight through": (lambda x, h: x + (h + (h.round() - h).detach()), True),
    "whole numbers": (lambda x, h: x + h.int() / 3.3, True),
    "divided": (lambda x, h: x + torch.div(h, 0.3, rounding_mode="floor"), True),
    "signs times data": (lambda x, h: x + h.sign() * h, False),
    "signs times signs": (lambda x, h: x + h.sign() * x.sign(), True),
    "what is added to such a sum": (lambda x, h: x + h.round() / 3.3 + F.dropout(h, 0.5), True),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_of_numbers_on_grids(name: str) -> None:
    function, expected = SUMS[name]
    x, h, w = (torch.randn(4, 4) for _ in range(3))
    graph = make_fx(lambda x, h, w: function(x, h @ w), tracing_mode="fake")(x, h, w).graph
    found = near_zeros(graph, atoms(graph))
    (output,) = next(n for n in graph.nodes if n.op == "output").all_input_nodes
    assert (output in found) is expected


class Tokens(Pairs):
    """Streams of table rows and positions, as those of language models, with dropout."""

    def __init__(self) -> None:
        super().__init__(4)
        self.table, self.places = nn.Embedding(11, 2 * D), nn.Parameter(torch.randn(5, 2 * D))

    def forward(self, ids: Tensor) -> Tensor:
        a, b = (self.table(ids) * D**0.5 + self.places).chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + F.dropout(f(b), 0.1)
            b = b + F.dropout(g(a), 0.1)
        return torch.cat([a, b], -1)


def test_a_language_models_streams_are_inverted() -> None:
    report = check(Tokens(), "aot_eager", torch.randint(0, 11, (3, 5)))
    assert report.regions

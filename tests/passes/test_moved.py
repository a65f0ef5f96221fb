"""What tells the numbers of a value apart tells those of its parts apart, of which an inverse puts it together."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from revfx.passes.atoms import atoms
from revfx.passes.kinks import told_apart
from revfx.passes.moved import directions_of, joined, moved


Moving = Callable[[Tensor], tuple[Tensor, Tensor]]


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    a, b = x.chunk(2, -1)
    return a, b


def turned(x: Tensor, times: int) -> Tensor:
    return turned(x.flip(-1), times - 1) if times else x


# Of x: what is solved for, something being added to it; what is read; and whether this is put together of the former.
MOVES: dict[str, tuple[Moving, bool]] = {
    "another layout": (lambda x: (x.flip(-1), x), True),
    "many moves": (lambda x: (turned(x, 201), x), True),
    "many moves of a part": (lambda x: (turned(x[:, :2], 201), x[:, 2:]), False),
    "several moves": (lambda x: (x.flip(-1).t().reshape(2, 16), x), True),
    "copies of one": (lambda x: (x.flip(-1), x.t()), True),
    "a slice": (lambda x: (x[:, :2], x), True),
    "another slice": (lambda x: (x[:, :2], x[:, 2:]), False),
    "a slice that overlaps": (lambda x: (x[:, :3], x[:, 2:]), True),
    "a slice along another dimension": (lambda x: (x[:, :2], x[2:]), True),
    "the other half": (halves, False),
    "the other half, split again": (lambda x: (halves(x)[0], halves(x)[1]), True),
    "a half of what is turned": (lambda x: (x.chunk(2, -1)[0], x.flip(-1).chunk(2, -1)[0]), True),
    "a sum": (lambda x: (x + x.sin(), x), False),
    "put behind another": (lambda x: (torch.cat([x.sin(), x], -1), x), True),
    "taken out again": (lambda x: (torch.cat([x.sin(), x], -1)[:, 4:], x), True),
    "what it was put behind": (lambda x: (torch.cat([x.sin(), x], -1)[:, :4], x), False),
    "put behind itself": (lambda x: (torch.cat([x, x], -1)[:, 4:], x), True),
    "turned and taken out": (lambda x: (torch.cat([x.sin(), x], -1).flip(-1)[:, 4:], x), True),
    "stacked": (lambda x: (torch.stack([x.sin(), x])[1], x), True),
    "written over in part": (lambda x: (torch.slice_scatter(x, x[:, :1].sin(), 1, 0, 1), x), True),
}


def traced(function: Callable[[Tensor], object]) -> torch.fx.Graph:
    return make_fx(function, tracing_mode="fake")(torch.randn(8, 4)).graph


@pytest.mark.parametrize("name", MOVES)
def test_parts_of_what_is_told_apart(name: str) -> None:
    moving, expected = MOVES[name]

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        part, read = moving(x)
        return part + 0.5, F.hardtanh(read)

    graph = traced(function)
    (part,) = graph.find_nodes(op="output")[0].args[0][0].all_input_nodes
    assert (part in told_apart(graph, atoms(graph), moved(graph, directions_of))) == expected
    assert part not in told_apart(graph, atoms(graph), [])


def test_places_of_what_is_joined() -> None:
    graph = traced(lambda x: torch.cat([x, x[:2], x[:3]]))
    node = graph.find_nodes(op="output")[0].args[0]
    assert [(dim, place) for _, dim, place in joined(node)] == [(0, range(8)), (0, range(8, 10)), (0, range(10, 13))]
    assert not joined(node.args[0][1])

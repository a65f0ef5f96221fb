"""What inductor fuses in graphs that regenerate keeps its order."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from helpers import TOLERANCE, relative_error
from torch import Tensor, nn
from torch._inductor.virtualized import V

from revfx.compiled import _inductor


class Unfolds(nn.Module):
    """The gradient of `b.unfold` is added to zeros in place, and read after that."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 4, 1)
        self.f = nn.ModuleList([
            nn.Sequential(nn.Conv2d(2, 2, 1), nn.MaxPool2d(3, 1, 1)),
            nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh()),
            nn.Conv2d(2, 2, 1),
            nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1)),
            nn.Conv2d(2, 2, 3, padding=1),
        ])  # fmt: skip
        self.register_buffer("mask", (torch.arange(2) % 2 == 0).view(2, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = (F.relu(self.stem(x)) * 0.5).chunk(2, 1)
        mask = ~self.get_buffer("mask")
        still = torch.where(mask, a, 0.0)
        a = torch.where(mask, a, a * torch.exp(0.5 * torch.tanh(self.f[0](still))) + self.f[1](still))
        windows = b.unfold(-1, 1, 1)
        still = torch.where(mask, a, 0.0)
        a = torch.where(mask, still, (a - self.f[2](still)) / torch.exp(0.5 * torch.tanh(self.f[4](still))))
        part = mask.double()
        still = part * b
        return a, still + (1 - part) * (b + self.f[3](still)), windows


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """By a backward that runs on a thread of its own, as on a GPU: that compiles it."""
    loss = torch.stack([t.square().sum() for t in model(x)]).sum()
    with ThreadPoolExecutor(1) as pool:
        return list(pool.submit(torch.autograd.grad, loss, [x, *model.parameters()]).result())


@pytest.mark.usefixtures("fp64")
@pytest.mark.deep
def test_nothing_is_read_before_it_is_written() -> None:
    """pytorch/pytorch#185509: gradients of the stem were off by half, without a word."""
    model, x = Unfolds(), torch.randn(3, 4, 2, 2, requires_grad=True)
    compiled = copy.deepcopy(model)
    compiled.compile(backend="revfx", options={"cpp.simdlen": 1})
    assert relative_error(gradients(compiled, x), gradients(model, x)) < TOLERANCE


class Node:
    """Of inductor's scheduler, that computes nodes of a graph with these numbers."""

    def __init__(self, *numbers: int) -> None:
        self.node, self.group, self.read_writes = self, 0, SimpleNamespace(reads=())
        self.origins = [SimpleNamespace(meta={"n": n}) for n in numbers] or [SimpleNamespace(meta={})]

    def get_nodes(self) -> list[Node]:
        return [self]

    def get_origins(self) -> list[Any]:
        return self.origins


def test_neighbours_are_fused_on_any_thread_and_in_other_graphs_all(monkeypatch: pytest.MonkeyPatch) -> None:
    kind: Any = type(V.choices)
    monkeypatch.setattr(kind, "can_fuse", staticmethod(lambda *nodes: True))
    _inductor.fuse_neighbours_only("n")
    patched = kind.can_fuse
    _inductor.fuse_neighbours_only("n")
    assert kind.can_fuse is patched
    numbered, other = (SimpleNamespace(nodes=nodes, mutation_renames={}) for nodes in ([Node(1)], [Node()]))

    def fused(scheduler: Any, a: Node, b: Node) -> bool:
        return V.choices.can_fuse(scheduler, cast(Any, a), cast(Any, b), 0)

    with ThreadPoolExecutor(1) as pool:
        for run in (lambda *args: fused(*args), lambda *args: pool.submit(fused, *args).result()):
            assert run(numbered, Node(1), Node(2)) and run(numbered, Node(), Node(7))
            assert not run(numbered, Node(1), Node(3)) and run(other, Node(1), Node(3))

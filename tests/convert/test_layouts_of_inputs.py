"""Inputs in other layouts than the strided one: gradients are plain training's, whether or not anything is found."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import kept_cuts
from torch import Tensor, nn

import revfx


pytestmark = pytest.mark.filterwarnings("ignore:.*(beta state|prototype stage):UserWarning")


class Couplings(nn.Module):
    """Three couplings behind a layer; what is nested is padded for them, what is not strided becomes so."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.f, self.g = nn.Linear(8, 8), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_nested and x.layout != torch.strided:
            x = x.to_dense()
        x = self.first(x)
        if x.is_nested:
            x = torch.nested.to_padded_tensor(x, 0.0)
        a, b = x.chunk(2, -1)
        for _ in range(3):
            a = a + torch.tanh(self.f(b))
            b = b + torch.tanh(self.g(a))
        return torch.cat([a, b], -1)


def dense() -> Tensor:
    return torch.randn(4, 8).relu()


def nested(layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=layout)


INPUTS: dict[str, tuple[Callable[[], Tensor], int]] = {  # and how many cuts are kept
    "coo": (lambda: dense().to_sparse(), 2),
    "csr": (lambda: dense().to_sparse_csr(), 2),
    "bsr": (lambda: dense().to_sparse_bsr((2, 2)), 2),
    "mkldnn": (lambda: dense().to_mkldnn(), 0),
    "jagged": (lambda: nested(torch.jagged), 2),
    "nested": (lambda: nested(torch.strided), 2),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.filterwarnings("ignore::revfx.errors.RevfxWarning")
def test_gradients_are_those_of_plain_training(kind: str) -> None:
    torch.manual_seed(0)
    make, kept = INPUTS[kind]
    plain, inputs = Couplings(), [make() for _ in range(4)]
    model: Any = revfx.convert(copy.deepcopy(plain))
    for x in inputs:  # later ones take the plan of the first one
        plain(x).sin().sum().backward()
        model(x).sin().sum().backward()
        for expected, found in zip(plain.parameters(), model.parameters(), strict=True):
            assert found.grad is not None and expected.grad is not None
            assert torch.equal(found.grad, expected.grad)
    assert kept_cuts(model) == kept
    assert len(model.revfx.plans) == (kept > 0)


def test_calls_in_other_layouts_are_other_calls() -> None:
    torch.manual_seed(0)
    plain, x = Couplings(), dense()
    model: Any = revfx.convert(copy.deepcopy(plain))
    for other in (x.to_sparse(), x.to_sparse_csr(), x):
        assert torch.equal(model(other), plain(other))
    assert len(model.revfx.plans) == 3


@pytest.mark.parametrize("kind", ["coo", "csr", "bsr"])
def test_sparse_inputs_are_explained_as_dense_ones(kind: str) -> None:
    revfx.explain(Couplings(), dense())  # the first one of a process counts eight bytes more
    torch.manual_seed(0)
    found = revfx.explain(Couplings(), INPUTS[kind][0]())
    torch.manual_seed(0)  # what codes take goes by the numbers
    expected = revfx.explain(Couplings(), dense())
    made_dense = 4 * 8 * 4
    assert [r.freed_bytes - made_dense for r in found.regions] == [r.freed_bytes for r in expected.regions] != []
    plain, ours = (u.kept for u in found.ways)
    assert [plain, ours] == [(expected.ways[0].kept or 0) + made_dense, expected.ways[1].kept]


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_what_is_nested_is_explained_as_what_cannot_be_counted(layout: torch.layout) -> None:
    text = str(revfx.explain(Couplings(), nested(layout)))
    assert "Couplings(f32[?,?,?]): nothing reversible was found" in text
    assert "a nested tensor has no fake one" in text and "no prediction" in text


@pytest.mark.parametrize("kind", ["coo", "nested", "jagged"])
def test_blocks_name_the_stream_that_is_not_dense(kind: str) -> None:
    with pytest.raises(TypeError, match=r"`x2` is (a nested tensor|torch.sparse_coo); a reversible block needs dense"):
        revfx.rev_block(torch.randn(4, 8), INPUTS[kind][0](), nn.Linear(8, 8), nn.Linear(8, 8), num_layers=2)

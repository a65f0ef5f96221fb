"""The search is linear in the program, counted in operations shown to closures; where nothing is found it says why."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import pytest
import torch
from measure import Couplings, Residual

import revfx
from revfx.passes.closure import Closure


@pytest.mark.parametrize("kind", [Couplings, Residual])
def test_visits_grow_linearly_with_depth(kind: type[Couplings], monkeypatch: pytest.MonkeyPatch) -> None:
    visits = [0]
    add = Closure.add

    def counted(self: Closure, indices: Iterable[int]) -> list[int]:
        visits[0] += 1
        return add(self, indices)

    monkeypatch.setattr(Closure, "add", counted)
    seen: list[int] = []
    for depth in (20, 40):
        visits[0] = 0
        model = kind(depth, 4, 4, inline=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            revfx.convert(model)(torch.randn(2, 8 if kind is Couplings else 4))
        seen.append(visits[0])
    assert seen[1] < 2.2 * seen[0]
    assert seen[1] < 60 * 40, "a few visits per operation"

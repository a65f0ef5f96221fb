"""State in objects of many kinds: what a step finds there is what plain training finds, and it is left alike."""

from __future__ import annotations

import argparse
import collections
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from helpers import mlp
from torch import Tensor, nn

import revfx


pytestmark = pytest.mark.usefixtures("fp64")


class Meter:
    """A number, and a method that gives it."""

    def __init__(self) -> None:
        self.n = 1.0

    def get(self) -> float:
        """The number."""
        return self.n


def local() -> Any:
    made = threading.local()
    made.n = 1.0
    return made


def by_object() -> Any:
    made: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()
    made[Meter] = 1.0
    return made


def set_item(holder: Any, key: Any, n: float) -> None:
    holder[key] = n


def set_n(holder: Any, n: float) -> None:
    holder.n = n


Kind = tuple[Callable[[], Any], Callable[[Any], float], Callable[[Any, float], None]]
KINDS: dict[str, Kind] = {  # how it is made, read and written
    "SimpleNamespace": (lambda: types.SimpleNamespace(n=1.0), lambda h: h.n, set_n),
    "Namespace": (lambda: argparse.Namespace(n=1.0), lambda h: h.n, set_n),
    "UserDict": (lambda: collections.UserDict(n=1.0), lambda h: h["n"], lambda h, n: set_item(h, "n", n)),
    "threading.local": (local, lambda h: h.n, set_n),
    "WeakKeyDictionary": (by_object, lambda h: h[Meter], lambda h, n: set_item(h, Meter, n)),
    "ndarray": (lambda: numpy.ones(1), lambda h: float(h[0]), lambda h, n: set_item(h, 0, n)),
}  # fmt: skip

WRITTEN = ("SimpleNamespace", "Namespace", "UserDict", "threading.local")


class Couplings(nn.Module):
    """Three couplings, of which each adds as many times as much as the `holder` says."""

    def __init__(self, kind: str, writes: bool) -> None:
        super().__init__()
        make, self.read, self.write = KINDS[kind]
        self.fs, self.writes = nn.ModuleList(mlp(4) for _ in range(3)), writes
        self.holder = make()

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f in self.fs:
            a, b = b + self.read(self.holder) * f(a), a
        if self.writes:
            self.write(self.holder, self.read(self.holder) + 1.0)
        return torch.cat([a, b], -1)


def trained(model: Any, change: Callable[[int], None]) -> list[Tensor]:
    found = list[Tensor]()
    torch.manual_seed(1)
    for k in range(4):
        change(k)
        model.zero_grad()
        y = model(torch.randn(5, 8))
        y.sin().sum().backward()
        found += [y.detach(), *(p.grad.clone() for p in model.parameters())]
    return found


def both(kind: str, writes: bool, change: Callable[[Couplings, int], None]) -> tuple[Couplings, Couplings]:
    """A model trained plainly and one converted, after the same steps with the same gradients."""
    torch.manual_seed(0)
    plain = Couplings(kind, writes)
    torch.manual_seed(0)
    other = Couplings(kind, writes)
    expected = trained(plain, lambda k: change(plain, k))
    for found, e in zip(trained(revfx.convert(other), lambda k: change(other, k)), expected, strict=True):
        assert torch.equal(found, e)
    return plain, other


@pytest.mark.parametrize("kind", KINDS)
def test_what_changes_between_steps_is_seen(kind: str) -> None:
    both(kind, False, lambda model, k: model.write(model.holder, 1.0 + k))


@pytest.mark.parametrize("kind", WRITTEN)
def test_what_the_forward_writes_is_written_once_per_step(kind: str) -> None:
    plain, other = both(kind, True, lambda model, k: None)
    assert plain.read(plain.holder) == other.read(other.holder) == 5.0

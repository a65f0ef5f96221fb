"""State in objects of many kinds: what a step finds there is what plain training finds, and it is left alike."""

from __future__ import annotations

import argparse
import collections
import contextvars
import copy
import dataclasses
import functools
import threading
import types
import weakref
from array import array
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from helpers import deep_but, mlp
from torch import Tensor, nn

import revfx


pytestmark = [pytest.mark.usefixtures("fp64"), pytest.mark.filterwarnings("ignore::revfx.errors.RevfxWarning")]


@dataclasses.dataclass(slots=True)
class Slots:
    """A number in a slot."""

    n: float = 1.0


class Private:
    """A number in a slot whose name is mangled."""

    __slots__ = ("__n",)

    def __init__(self) -> None:
        self.__n = 1.0

    @property
    def n(self) -> float:
        """The number."""
        return self.__n

    @n.setter
    def n(self, n: float) -> None:
        self.__n = n


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


def function() -> Any:
    def made(n: float = 1.0) -> float:
        return n

    return made


def attributed() -> Any:
    def made() -> float:
        return vars(made)["n"]

    vars(made)["n"] = 1.0
    return made


def set_item(holder: Any, key: Any, n: float) -> None:
    holder[key] = n


def set_n(holder: Any, n: float) -> None:
    holder.n = n


def set_default(holder: Any, n: float) -> None:
    holder.__defaults__ = (n,)


Kind = tuple[Callable[[], Any], Callable[[Any], float], Callable[[Any, float], None]]
KINDS: dict[str, Kind] = {  # how it is made, read and written
    "SimpleNamespace": (lambda: types.SimpleNamespace(n=1.0), lambda h: h.n, set_n),
    "Namespace": (lambda: argparse.Namespace(n=1.0), lambda h: h.n, set_n),
    "slots": (Slots, lambda h: h.n, set_n),
    "private slots": (Private, lambda h: h.n, set_n),
    "UserDict": (lambda: collections.UserDict(n=1.0), lambda h: h["n"], lambda h, n: set_item(h, "n", n)),
    "ChainMap": (lambda: collections.ChainMap({"n": 1.0}), lambda h: h["n"], lambda h, n: set_item(h, "n", n)),
    "threading.local": (local, lambda h: h.n, set_n),
    "WeakKeyDictionary": (by_object, lambda h: h[Meter], lambda h, n: set_item(h, Meter, n)),
    "ndarray": (lambda: numpy.ones(1), lambda h: float(h[0]), lambda h, n: set_item(h, 0, n)),
    "array": (lambda: array("d", [1.0]), lambda h: h[0], lambda h, n: set_item(h, 0, n)),
    "bytearray": (lambda: bytearray(b"\1"), lambda h: float(h[0]), lambda h, n: set_item(h, 0, int(n))),
    "method": (lambda: Meter().get, lambda h: h(), lambda h, n: set_n(h.__self__, n)),
    "partial": (
        lambda: functools.partial(lambda n: n, n=1.0), lambda h: h(), lambda h, n: set_item(h.keywords, "n", n)
    ),
    "function's attribute": (attributed, lambda h: h(), set_n),
    "default": (function, lambda h: h(), set_default),
    "class": (lambda: type("Config", (), {"n": 1.0}), lambda h: h.n, set_n),
    "class of an object": (
        lambda: type("Config", (), {"n": 1.0})(), lambda h: h.n, lambda h, n: set_n(type(h), n)
    ),
    "ContextVar": (lambda: contextvars.ContextVar("n", default=1.0), lambda h: h.get(), lambda h, n: h.set(n)),
}  # fmt: skip

WRITTEN = sorted(KINDS.keys() - {"class", "class of an object", "default"})
OF_EACH_SORT = ("slots", "UserDict", "threading.local", "ndarray", "method", "partial", "ContextVar")


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
    for k in range(3):
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
        torch.testing.assert_close(found, e)
    return plain, other


@pytest.mark.parametrize("kind", KINDS)
def test_what_changes_between_steps_is_seen(kind: str) -> None:
    both(kind, False, lambda model, k: model.write(model.holder, 1.0 + k))


@pytest.mark.parametrize("kind", deep_but(OF_EACH_SORT, WRITTEN))
def test_what_the_forward_writes_is_written_once_per_step(kind: str) -> None:
    plain, other = both(kind, True, lambda model, k: None)
    assert plain.read(plain.holder) == other.read(other.holder) == 4.0


class Counts(nn.Module):
    """A function of a coupling that counts its calls, and adds as much as it has counted."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        make, self.read, self.write = KINDS[kind]
        self.linear, self.holder = nn.Linear(4, 4), make()

    def forward(self, x: Tensor) -> Tensor:
        self.write(self.holder, self.read(self.holder) + 1.0)
        return torch.tanh(self.linear(x)) * self.read(self.holder)


@pytest.mark.parametrize("kind", ["SimpleNamespace", "slots", "UserDict", "ndarray", "array", "bytearray", "method"])
def test_functions_of_couplings_find_their_state_again_in_the_backward(kind: str) -> None:
    torch.manual_seed(0)
    fs, gs = nn.ModuleList(Counts(kind) for _ in range(3)), nn.ModuleList(mlp(4) for _ in range(3))
    plain = copy.deepcopy((fs, gs))
    x1, x2 = torch.randn(5, 4), torch.randn(5, 4)
    for _ in range(2):
        for stored, (f, g) in ((False, (fs, gs)), (True, plain)):
            y1, y2 = revfx.rev_block(x1, x2, f, g, num_layers=3, is_training=not stored)
            (y1.sin() + y2).sum().backward()
    for p, q in zip([*fs.parameters(), *gs.parameters()], [p for m in plain for p in m.parameters()], strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    counted: list[Any] = [*fs]
    assert [f.read(f.holder) for f in counted] == [3.0] * 3

"""What gives something else each time it is asked is not recorded: steps draw from it as in plain training."""

from __future__ import annotations

import functools
import io
import itertools
import queue
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from helpers import deep_but, mlp
from torch import Tensor, nn

import revfx


pytestmark = [pytest.mark.usefixtures("fp64"), pytest.mark.filterwarnings("ignore::revfx.errors.RevfxWarning")]


def counting() -> Iterator[float]:
    yield from itertools.count(1.0)


def filled() -> queue.Queue[float]:
    made: queue.Queue[float] = queue.Queue()
    for k in range(9):
        made.put(float(k))
    return made


SOURCES: dict[str, tuple[Callable[[], Any], Callable[[Any], float]]] = {
    "generator": (counting, next),
    "iterator of a list": (lambda: iter([1.0, 2.0, 3.0, 4.0]), next),
    "count": (itertools.count, next),
    "cycle": (lambda: itertools.cycle([1.0, 2.0, 3.0]), next),
    "its method": (lambda: itertools.count().__next__, lambda ask: ask()),
    "partial": (lambda: functools.partial(next, itertools.count()), lambda ask: ask()),
    "file": (lambda: io.StringIO("1\n2\n3\n4\n"), lambda file: float(file.readline())),
    "queue": (filled, lambda made: made.get()),
    "random.Random": (lambda: random.Random(0), lambda draws: draws.random()),
    "RandomState": (lambda: numpy.random.RandomState(0), lambda draws: float(draws.normal())),
    "default_rng": (lambda: numpy.random.default_rng(0), lambda draws: float(draws.normal())),
}


class Couplings(nn.Module):
    """Three couplings, of which the first adds `by` times as much."""

    def __init__(self) -> None:
        super().__init__()
        self.fs = nn.ModuleList(mlp(4) for _ in range(3))

    def couple(self, x: Tensor, by: float) -> Tensor:
        a, b = x.chunk(2, -1)
        for f in self.fs:
            a, b = b + by * f(a), a
        return torch.cat([a, b], -1)


def model_of(place: str, source: Any, ask: Callable[[Any], float]) -> tuple[nn.Module, tuple[Any, ...]]:
    """A model that asks a source in one `place` or another, and its further arguments."""
    torch.manual_seed(0)
    if place == "argument":
        return type("M", (Couplings,), {"forward": lambda self, x, s: self.couple(x, ask(s))})(), (source,)
    if place == "list":
        return type("M", (Couplings,), {"forward": lambda self, x, s: self.couple(x, ask(s[0]))})(), ([source],)
    if place == "closure":
        return type("M", (Couplings,), {"forward": lambda self, x: self.couple(x, ask(source))})(), ()
    if place == "global":
        names = {"ask": ask, "source": source, "__name__": __name__}
        exec("def forward(self, x): return self.couple(x, ask(source))", names)
        return type("M", (Couplings,), {"forward": names["forward"]})(), ()
    if place == "object":
        model: Any = type("M", (Couplings,), {"forward": lambda self, x: self.couple(x, ask(self.own.source))})()
        model.own = SimpleNamespace(source=source)
        return model, ()
    model = type("M", (Couplings,), {"forward": lambda self, x: self.couple(x, ask(self.source))})()
    model.source = source
    return model, ()


def trained(convert: Callable[[nn.Module], Any], place: str, kind: str) -> list[Tensor]:
    make, ask = SOURCES[kind]
    plain, further = model_of(place, make(), ask)
    model, found = convert(plain), list[Tensor]()
    torch.manual_seed(1)
    for _ in range(3):
        model.zero_grad()
        y = model(torch.randn(5, 8), *further)
        y.sin().sum().backward()
        found += [y.detach(), *(p.grad.clone() for p in model.parameters())]
    return found


PLACES = ("argument", "attribute", "list", "closure", "global", "object")
CASES = [(k, p) for k in SOURCES for p in PLACES if p == "attribute" or k in ("generator", "its method")]


@pytest.mark.parametrize("kind, place", deep_but([c for c in CASES if c[1] == "attribute"], CASES))
def test_steps_draw_what_plain_training_draws(kind: str, place: str) -> None:
    expected = trained(lambda model: model, place, kind)
    for found, e in zip(trained(revfx.convert, place, kind), expected, strict=True):
        torch.testing.assert_close(found, e)


def test_the_refusal_names_the_attribute() -> None:
    model, _ = model_of("attribute", itertools.count(), next)
    converted: Any = revfx.convert(model, capture="fx")
    converted(torch.randn(5, 8))
    assert "its forward reads `source`: a count, which gives something else every time" in str(converted.revfx.refusals)


def test_a_global_generator_that_is_not_asked_is_no_reason() -> None:
    names: dict[str, Any] = {"source": itertools.count(), "__name__": __name__}
    exec("def forward(self, x): return self.couple(x, 1.0 if self.training else next(source))", names)
    converted: Any = revfx.convert(type("M", (Couplings,), {"forward": names["forward"]})())
    converted(torch.randn(5, 8))
    assert converted.revfx.kept_cuts == 2
    assert next(names["source"]) == 0

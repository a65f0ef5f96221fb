"""A thousand steps, however they end, leave nothing behind: tensors, Python objects and the process's memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import deep_but, fp64 as fp64, leaf, loss_of, mlps, unseen
from torch import Tensor, nn
from ways import BUILD

from revfx.conversion import MOST_PLANS
from revfx.convert import convert
from revfx.testing import store_activations


WAYS = ("convert", "rev_block")  # a `RevBlock` calls `rev_block`
ways = pytest.mark.parametrize("way", WAYS)
convert_alone = pytest.mark.parametrize("way", deep_but(("convert",), WAYS))
MIB = 2**20


@contextmanager
def uncollected() -> Generator[None]:
    """A context in which only reference counts free anything."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def there_now() -> tuple[int, int, int]:
    """How many tensors and Python objects there are, and the bytes of memory that this process holds."""
    objects: list[Any] = gc.get_objects()
    tensors = sum(issubclass(type(o), Tensor) for o in objects)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return tensors, len(objects), pages * 4096


def assert_flat(step: Callable[[int], object], first: int, then: int) -> None:
    """After `first` steps, `then` more leave nothing, without the garbage collector."""
    for k in range(first):
        step(k)
    with uncollected():
        tensors, objects, memory = there_now()
        for k in range(first, first + then):
            step(k)
        now = there_now()
    assert now[0] <= tensors
    assert now[1] <= objects + 20  # pytest's own
    assert now[2] <= memory + 4 * MIB


class Fails(nn.Module):
    """Raises its error while it is armed, which a plan does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.armed = nn.Linear(4, 4), unseen()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.linear(x))
        if self.armed.values:
            raise KeyError(self.armed.values[0])
        return h


class Steps:
    """One way to train a chain, and steps of it that end in all kinds of ways."""

    def __init__(self, way: str) -> None:
        self.fails = Fails()
        self.model, self.x = BUILD[way]([self.fails, *mlps(1)], mlps(2)), leaf(6, 8)

    def __call__(self, k: int) -> None:
        kinds = (self.train, self.forget, self.fail, self.fail_again, self.twice, self.again, self.evaluate, self.store)
        kinds[k % len(kinds)]()
        self.model.zero_grad()
        self.x.grad = None

    def train(self) -> None:
        loss_of(self.model(self.x)).backward()

    def forget(self) -> None:
        self.model(self.x)

    def _fail(self, function: Callable[[], object]) -> None:
        self.fails.armed.values.append("armed")
        try:
            function()
        except KeyError:
            self.fails.armed.values.clear()

    def fail(self) -> None:
        self._fail(lambda: self.model(self.x))

    def fail_again(self) -> None:
        self._fail(loss_of(self.model(self.x)).backward)

    def twice(self) -> None:
        (g,) = torch.autograd.grad(loss_of(self.model(self.x)), self.x, create_graph=True)
        loss_of(g).backward()

    def again(self) -> None:
        loss = loss_of(self.model(self.x))
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)

    def evaluate(self) -> None:
        self.model.eval()
        with torch.no_grad():
            self.model(self.x)
        self.forget()
        self.model.train()

    def store(self) -> None:
        with store_activations():
            self.train()


@convert_alone
def test_a_thousand_steps_however_they_end_leave_nothing(way: str) -> None:
    assert_flat(Steps(way), first=80, then=920)


@convert_alone
@pytest.mark.filterwarnings("ignore:.*is recorded again and again")
def test_new_shapes_at_every_step_make_a_bounded_number_of_plans(way: str) -> None:
    model: Any = BUILD[way](mlps(2), mlps(2))

    def step(k: int) -> None:
        loss_of(model(leaf(3 + k, 8))).backward()
        model.zero_grad()

    for k in range(2 * MOST_PLANS):
        step(k)
    gc.collect()
    tensors, objects, memory = there_now()
    for k in range(2 * MOST_PLANS, 3 * MOST_PLANS):
        step(k)
    gc.collect()
    now = there_now()
    assert now[0] <= tensors
    assert now[1] <= objects + 4 * MOST_PLANS  # a longer plan in the place of a shorter one
    assert now[2] <= memory + 8 * MIB
    if way == "convert":
        assert len(model.revfx.plans) == MOST_PLANS


@ways
def test_model_that_is_let_go_is_freed_at_once(way: str) -> None:
    refs: list[Any] = []

    def use(ends: str) -> None:
        model, x = BUILD[way](mlps(2), mlps(2)), leaf(6, 8)
        y = model(x)
        if ends == "trained":
            loss_of(y).backward()
        elif ends == "differentiated twice":
            loss_of(torch.autograd.grad(loss_of(y), x, create_graph=True)).backward()
        refs.extend(weakref.ref(item) for item in (model, x, y, *model.modules(), *model.parameters()))

    with uncollected():
        for ends in ("trained", "called", "differentiated twice"):
            use(ends)
        alive = [ref() for ref in refs]
    assert not any(item is not None for item in alive)


@convert_alone
def test_models_that_are_converted_and_dropped_leave_nothing(way: str) -> None:
    """What a forward was recorded on was once held by its own history, where no collector looks."""

    def use(count: int) -> tuple[int, int, int]:
        for _ in range(count):
            loss_of(BUILD[way](mlps(2), mlps(2))(leaf(6, 8))).backward()
        gc.collect()
        return there_now()

    tensors, objects, memory = use(10)
    now = use(40)
    assert now[0] <= tensors
    assert now[1] <= objects + 20
    assert now[2] <= memory + 4 * MIB


class Batch:
    """A batch that is an object."""

    def __init__(self) -> None:
        self.x = torch.randn(4, 8)


class OfBatch(nn.Module):
    """Couplings of what is in such a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fs = mlps(3)

    def forward(self, batch: Batch) -> Tensor:
        a, b = batch.x.chunk(2, -1)
        for f in self.fs:
            a, b = b + f(a), a
        return a * b


@pytest.mark.filterwarnings("ignore::revfx.errors.RevfxWarning")
def test_batches_that_are_objects_are_let_go() -> None:
    model, batches = convert(OfBatch()), list[weakref.ref[Tensor]]()
    batch = Batch()
    for _ in range(2 * MOST_PLANS):
        batch = Batch()
        model(batch).sum().backward()
        batches.append(weakref.ref(batch.x))
    del batch
    gc.collect()
    assert not any(there() is not None for there in batches)

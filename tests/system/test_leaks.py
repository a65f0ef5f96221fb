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
from helpers import deep_but, fp64 as fp64, leaf, loss_of, mlps
from torch import Tensor, nn
from ways import BUILD

from revfx.converting import convert
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
    """Raises its error in the forward, or in the backward, while it is armed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.armed = nn.Linear(4, 4), ""
        self.linear.weight.register_hook(lambda g: self.fail("backward"))

    def fail(self, where: str) -> None:
        if self.armed == where:
            raise KeyError(where)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.linear(x))
        self.fail("forward")
        return h


class Steps:
    """One way to train a chain, and steps of it that end in all kinds of ways."""

    def __init__(self, way: str) -> None:
        self.fails = Fails()
        self.model, self.x = BUILD[way]([self.fails, *mlps(1)], mlps(2)), leaf(6, 8)

    def __call__(self, k: int) -> None:
        kinds = (
            self.train,
            self.forget,
            self.fail,
            self.fail_in_the_backward,
            self.twice,
            self.again,
            self.evaluate,
            self.store,
        )
        kinds[k % len(kinds)]()
        self.model.zero_grad()
        self.x.grad = None

    def train(self) -> None:
        loss_of(self.model(self.x)).backward()

    def forget(self) -> None:
        self.model(self.x)

    def _fail(self, where: str, function: Callable[[], object]) -> None:
        self.fails.armed = where
        try:
            function()
        except KeyError as e:
            assert e.args == (where,)
        finally:
            self.fails.armed = ""

    def fail(self) -> None:
        self._fail("forward", lambda: self.model(self.x))

    def fail_in_the_backward(self) -> None:
        self._fail("backward", loss_of(self.model(self.x)).backward)

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


KINDS = 96  # of calls


@convert_alone
@pytest.mark.parametrize("vary", ["numbers of rows", "numbers of dimensions"])
def test_new_shapes_at_every_step_make_a_bounded_number_of_plans(way: str, vary: str) -> None:
    model: Any = BUILD[way](mlps(2), mlps(2))

    def step(k: int) -> None:
        shape = (3 + k, 8) if vary == "numbers of rows" else (*(1,) * (1 + k % 48), 8)
        loss_of(model(leaf(*shape))).backward()
        model.zero_grad()

    for k in range(2 * KINDS):
        step(k)
    gc.collect()
    tensors, objects, memory = there_now()
    for k in range(2 * KINDS, 3 * KINDS):
        step(k)
    gc.collect()
    now = there_now()
    assert now[0] <= tensors
    assert now[1] <= objects + 4 * KINDS
    assert now[2] <= memory + 8 * MIB
    if way == "convert":
        assert len(model.revfx.plans) == (1 if vary == "numbers of rows" else 48)


@ways
@pytest.mark.parametrize("calls", [1, 2, 3])
def test_model_that_is_let_go_is_freed_at_once(way: str, calls: int) -> None:
    refs: list[Any] = []

    def use(ends: str) -> None:
        model, x = BUILD[way](mlps(2), mlps(2)), leaf(6, 8)
        for _ in range(calls - 1):
            loss_of(model(x)).backward()
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
    def use(count: int) -> tuple[int, int, int]:
        for _ in range(count):
            model = BUILD[way](mlps(2), mlps(2))
            for _ in range(3):
                loss_of(model(leaf(6, 8))).backward()
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


@pytest.mark.filterwarnings("ignore::revfx.errors.RevfxWarning")  # tensors in objects count as constants
def test_batches_that_are_objects_are_let_go() -> None:
    model, batches = convert(OfBatch()), list[weakref.ref[Tensor]]()
    batch = Batch()
    for _ in range(20):
        batch = Batch()
        model(batch).sum().backward()
        batches.append(weakref.ref(batch.x))
    del batch
    gc.collect()
    assert not any(there() is not None for there in batches)

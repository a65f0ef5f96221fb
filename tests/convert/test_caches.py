"""Caches that user code fills for the first time while it runs: on fake tensors none may keep one."""

from __future__ import annotations

import collections
import copy
import functools
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import deep_but, fp64 as fp64, kept_cuts, mlp
from tables import (
    HIDDEN,
    TABLES,
    Table,
    bounded,
    class_attribute,
    clear,
    closure,
    computed_property,
    default,
    global_deep,
    global_list,
    global_name,
    global_object,
    hidden_deque,
    hidden_dict,
    hidden_object,
    in_a_pair,
    make,
    unbounded,
)
from torch import Tensor, nn
from training import State, assert_same_state, assert_same_steps, take_step, twins

import revfx
from revfx.world import left


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    clear()
    yield
    clear()


class Uses(nn.Module):
    def __init__(self, table: Table) -> None:
        super().__init__()
        self.inner, self.table = mlp(4), table

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.table(x.shape[-1])


class InF(nn.Module):
    """The table is used in f, which is called whole."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.f, self.g = nn.ModuleList(Uses(table) for _ in range(3)), nn.ModuleList(mlp(4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            b = b + g(a)
        return torch.cat([a, b], -1)


class InRoot(InF):
    """The table is used in the code that is recorded."""

    def __init__(self, table: Table) -> None:
        super().__init__(table)
        self.f, self.table = nn.ModuleList(mlp(4) for _ in range(3)), table

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b) * self.table(4)
            b = b + g(a)
        return torch.cat([a, b], -1)


def assert_real(model: nn.Module) -> None:
    """Raise unless a model, which `explain` ran on fake tensors, computes with real ones."""
    assert type(model(torch.randn(3, 8))) is Tensor


LIKE_OTHERS = [global_list, hidden_deque, in_a_pair, global_deep, computed_property, global_object]
ALL = [(kind, table) for kind in (InF, InRoot) for table in TABLES]
SOME = [*((InF, t) for t in TABLES if t not in LIKE_OTHERS), (InRoot, global_name)]


@pytest.mark.parametrize("kind, table", deep_but(SOME, ALL))
def test_a_converted_model_fills_caches_as_the_plain_one_does(kind: type[InF], table: Table) -> None:
    converted, plain = twins(kind(table))
    x = torch.randn(3, 8, requires_grad=True)
    for seed in range(4):
        got = take_step(converted, [x], seed=seed)
        kept = table(4)
        assert type(kept) is Tensor and torch.equal(kept, table(4))
        if seed == 0:
            clear()
        assert_same_state(got, take_step(plain, [x], seed=seed))
    assert kept_cuts(converted) == 2


@pytest.mark.parametrize("kind, table", deep_but(SOME[::2], ALL))
def test_explain_leaves_no_fake_tensor(kind: type[InF], table: Table) -> None:
    model, x = kind(table), torch.randn(3, 8)
    revfx.explain(model, x)
    assert_real(model)
    assert type(table(4)) is Tensor


class Loop:
    """An object that only the collector can free."""

    itself: Loop


@pytest.mark.parametrize("frozen", [True, False])
def test_what_the_collector_was_told_to_leave_alone_is_found(frozen: bool) -> None:
    before = gc.get_freeze_count()
    gc.unfreeze()
    try:
        bounded.cache_clear()
        if frozen:
            gc.freeze()
        gc.disable()
        garbage = Loop()
        garbage.itself = garbage
        alive = weakref.ref(garbage)
        del garbage
        model = InF(bounded)
        revfx.explain(model, torch.randn(3, 8))
        assert_real(model)
        assert (gc.get_freeze_count() > 0) == frozen
        gc.collect()
        assert alive() is None
    finally:
        gc.enable()
        gc.unfreeze()
        if before:
            gc.freeze()


@pytest.mark.parametrize("table", [t for t in TABLES[::2] if t not in (global_object, global_name, class_attribute)])
def test_a_table_that_f_caches_costs_no_region(table: Table) -> None:
    assert revfx.explain(InF(table), torch.randn(3, 8)).regions


@pytest.mark.parametrize("kind", [InF, InRoot])
def test_variable_of_a_closure(kind: type[InF]) -> None:
    model = kind(closure())
    revfx.explain(model, torch.randn(3, 8))
    assert_real(model)
    converted, plain = twins(model)
    assert_same_steps(converted, plain, [torch.randn(3, 8, requires_grad=True)])
    assert kept_cuts(converted) == 2


def test_attribute_that_is_filled_at_the_first_call_is_no_fake_tensor() -> None:
    model = InF(hidden_object)
    assert revfx.explain(model, torch.randn(3, 8)).regions
    assert_real(model)
    clear()
    assert_same_steps(revfx.convert(copy.deepcopy(model)), model, [torch.randn(3, 8, requires_grad=True)])


def test_hook_that_collects_the_results_of_a_module() -> None:
    seen: list[Tensor] = []
    model: Any = InF(make)
    model.f[1].inner[0].register_forward_hook(lambda m, args, out: seen.append(out.detach()))
    converted, x = revfx.convert(model), torch.randn(3, 8, requires_grad=True)
    for step in range(1, 4):
        converted(x).sin().sum().backward()
        assert [type(t) for t in seen] == [Tensor] * step


class Appends(nn.Module):
    """Collects what its own code makes, behind a name that is looked up at run time."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = mlp(4), mlp(4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        a = a + self.f(b)
        globals()["HIDDEN"]["deque"].append(a.detach())
        b = b + self.g(a)
        return torch.cat([a, b], -1)


def test_a_list_that_the_forward_appends_to_has_one_entry_per_call() -> None:
    model, x = Appends(), torch.randn(3, 8, requires_grad=True)
    assert revfx.explain(model, x).regions and not HIDDEN["deque"]
    converted, plain = twins(model)
    for seed in range(3):
        states: list[State] = []
        for m in (converted, plain):
            HIDDEN["deque"].clear()
            states.append(take_step(m, [x], seed=seed) | {f"entry {i}": t for i, t in enumerate(HIDDEN["deque"])})
        assert_same_state(*states)
        assert "entry 0" in states[0] and "entry 1" not in states[0]


def test_forward_that_raises_leaves_none_either() -> None:
    class Raises(InF):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x) * hidden_dict(8)
            return y * y.sum().item()

    model, x = Raises(default), torch.randn(3, 8, requires_grad=True)
    revfx.explain(model, x)  # says that there is no prediction
    assert_real(model)
    clear()
    assert_same_steps(revfx.convert(model), model, [x])


def test_interrupt_leaves_none_either() -> None:
    class Interrupted(InF):
        stop = True

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x) * hidden_dict(8)
            if self.stop:
                raise KeyboardInterrupt
            return y

    model, x = Interrupted(unbounded), torch.randn(3, 8, requires_grad=True)
    converted = revfx.convert(copy.deepcopy(model))
    with pytest.raises(KeyboardInterrupt):
        revfx.explain(model, x)
    with pytest.raises(KeyboardInterrupt):
        converted(x)
    Interrupted.stop = False
    assert_real(model)
    assert_same_steps(converted, model, [x])
    assert kept_cuts(converted) == 2


def test_nothing_is_searched_where_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Any:
        raise AssertionError("the heap was searched")

    monkeypatch.setattr(left, "_take_out", fails)
    x = torch.randn(3, 8, requires_grad=True)
    revfx.explain(InF(make), x)
    with torch.autocast("cpu", torch.bfloat16):  # its cache would hold casts of fake parameters
        model = InF(functools.partial(torch.ones, dtype=torch.float32)).float()
        assert revfx.explain(model, x.float()).regions


class Deque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.latest = mlp(4), collections.deque[Tensor](maxlen=4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        self.latest.append(y.detach().mean(0))
        return y


def test_deque_of_a_module_holds_one_entry_per_step() -> None:
    model = InF(make)
    model.f = nn.ModuleList(Deque() for _ in range(3))
    converted, plain = twins(model)
    x = torch.randn(3, 8, requires_grad=True)
    for step in range(1, 7):
        assert_same_steps(converted, plain, [x], steps=(step,))
        for f, other in zip(converted.f, plain.f, strict=True):
            assert len(f.latest) == min(step, 4) and f.latest.maxlen == 4
            assert all(type(t) is Tensor and torch.equal(t, u) for t, u in zip(f.latest, other.latest, strict=True))

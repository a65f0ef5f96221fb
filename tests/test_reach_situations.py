"""Functions that set something up in their first call, keep graphs, reach much, or have stubs beside them."""

from __future__ import annotations

import copy
import ctypes
import functools
import gc
import importlib
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from helpers import TOLERANCE, deep_but, fp64 as fp64, leaf, loss_of, mlp, relative_error
from torch import Tensor, nn
from ways import BUILD, Plain

import revfx
from revfx.executor import RegionRun
from revfx.reach import COPIED, MOST, reads_of


pytestmark = [pytest.mark.usefixtures("fp64"), pytest.mark.filterwarnings("ignore::revfx.errors.RevfxWarning")]
ways = pytest.mark.parametrize("way", ["convert", "rev_block"])


class Of(nn.Module):
    """`use(self, mlp(x))`."""

    kept: Any = None

    def __init__(self, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.m, self.use, self.norm = mlp(), use, nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, self.norm(self.m(x)))


def trained(way: str, use: Callable[[Any, Tensor], Tensor], between: Callable[[Any], object], calls: int) -> list[Any]:
    """The gradients of several steps, and what buffers then are."""
    torch.manual_seed(0)
    fs, gs = [Of(use) for _ in range(2)], [mlp() for _ in range(2)]
    model = BUILD[way](fs, gs) if way in BUILD else Plain(fs, gs)
    found: list[Any] = []
    for _ in range(calls):
        loss = loss_of(model(leaf(5, 8)))
        between(fs)
        found += torch.autograd.grad(loss, [*nn.ModuleList([*fs, *gs]).parameters()])
    return [*found, *(b.clone() for f in fs for b in f.buffers())]


# --- set up once
REGISTRY: dict[str, Any] = {}
LISTED: list[float] = []


class Table:
    made: Any


@functools.lru_cache
def _set_up() -> None:
    REGISTRY["op"], Table.made = torch.tanh, 1.5


def _by_cache(f: Any, h: Tensor) -> Tensor:
    _set_up()
    return REGISTRY["op"](h) * Table.made


def _by_import(f: Any, h: Tensor) -> Tensor:
    importlib.import_module("operations_of_a_test")
    return REGISTRY["op"](h) * Table.made * len(LISTED)


@pytest.fixture
def nothing_set_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    names = f"from {__name__} import LISTED, REGISTRY, Table, torch"
    lines = f"{names}\nREGISTRY['op'] = torch.tanh\nTable.made = 1.5\nLISTED.append(2.0)\n"
    (tmp_path / "operations_of_a_test.py").write_text(lines)
    monkeypatch.syspath_prepend(tmp_path)

    def forget() -> None:
        sys.modules.pop("operations_of_a_test", None)
        REGISTRY.clear()
        LISTED.clear()
        _set_up.cache_clear()
        if "made" in vars(Table):
            del Table.made

    yield forget
    forget()


@ways
@pytest.mark.parametrize("use", [_by_cache, _by_import])
def test_what_is_set_up_once_is_there_when_f_runs_again(way: str, use: Any, nothing_set_up: Callable[[], None]) -> None:
    nothing_set_up()
    want = trained("plain", use, lambda fs: None, 1)
    nothing_set_up()
    assert relative_error(trained(way, use, lambda fs: None, 1), want) < TOLERANCE


def test_an_error_of_what_is_not_set_up_again_says_so() -> None:
    flag = threading.Event()

    def f(x: Tensor) -> Tensor:
        if not flag.is_set():
            REGISTRY["late"] = 2.0
            flag.set()
        return torch.tanh(x) * REGISTRY["late"]

    loss_of(revfx.rev_block(leaf(5, 4), leaf(5, 4), torch.tanh, torch.sin, 1)).backward()  # torch imports something
    REGISTRY.pop("late", None)
    y = revfx.rev_block(leaf(5, 4), leaf(5, 4), f, torch.sin, 1)
    with pytest.raises(KeyError) as error:
        loss_of(y).backward()
    notes = getattr(error.value, "__notes__", [])  # errors take them from Python 3.11 on
    assert ["was run again for the backward, with all that it reads put back" in n for n in notes] == (
        [True] if sys.version_info >= (3, 11) else []
    )


# --- beside stubs
@ways
@pytest.mark.parametrize("stub", [MagicMock(), object(), Table()], ids=["mock", "object", "settings"])
def test_what_f_reads_is_seen_where_something_stands_for_a_module(
    way: str, stub: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def use(f: Any, h: Tensor) -> Tensor:
        if f.kept == "never":
            h = f.missing_package(h)
        return h * scale[0]

    def change(fs: Any) -> None:
        scale[0] *= 1.001

    scale = [1.0]
    want = trained("plain", use, change, 3)
    monkeypatch.setitem(sys.modules, "missing_package", stub)
    scale[0] = 1.0
    assert relative_error(trained(way, use, change, 3), want) < TOLERANCE


# --- behind functions of libraries
class InContext(nn.Module):
    """Of which a part with state is called inside a context, and so behind a function of the plan's."""

    def __init__(self, context: Callable[[], Any]) -> None:
        super().__init__()
        self.context, self.stem = context, nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
        self.f = nn.ModuleList([mlp() for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        with self.context():
            h = self.stem(a)
        b = b + h
        for f in self.f:
            a, b = b, a + f(b)
        return torch.cat([a, b], -1)


@pytest.mark.parametrize("context", [lambda: torch.autocast("cpu", torch.bfloat16), torch.enable_grad])
def test_statistics_of_a_part_inside_a_context_are_counted_once(context: Callable[[], Any]) -> None:
    model, x = InContext(context), leaf(6, 8)
    converted: Any = revfx.convert(copy.deepcopy(model))
    for _ in range(2):
        for m in (model, converted):
            m(x).square().sum().backward()
    assert converted.revfx.plans[0].regions
    for ours, plain in zip(converted.buffers(), model.buffers(), strict=True):
        assert torch.equal(ours, plain)


def test_statistics_behind_a_librarys_decorator_are_counted_once() -> None:
    norm = nn.BatchNorm1d(4)
    f: Any = torch.enable_grad()(norm.forward)
    loss_of(revfx.rev_block(leaf(5, 4), leaf(5, 4), f, torch.sin, 3)).backward()
    assert norm.num_batches_tracked == 3


# --- graphs that f keeps
def _in_a_list(f: Any, h: Tensor) -> Tensor:
    KEPT.append(h.square().mean())
    return h


def _in_a_dict(f: Any, h: Tensor) -> Tensor:
    f.kept = f.kept or {}
    f.kept["map"] = h * 2.0
    return h


def _in_a_tuple(f: Any, h: Tensor) -> Tensor:
    f.kept = (h, [1], (h * 2.0,))
    return h


KEPT: list[Tensor] = []


@ways
@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("use", deep_but((_in_a_list,), (_in_a_list, _in_a_dict, _in_a_tuple)))
def test_graphs_that_f_keeps_are_let_go_with_what_holds_them(
    way: str, use: Any, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noted(run: RegionRun, *args: Any) -> None:
        alive.add(run)
        forward(run, *args)

    forward, alive = RegionRun.forward, weakref.WeakSet[RegionRun]()
    monkeypatch.setattr(RegionRun, "forward", noted)
    torch.manual_seed(0)
    fs, gs = [Of(use) for _ in range(2)], [mlp() for _ in range(2)]
    model = BUILD[way](fs, gs)
    for _ in range(5):
        loss = loss_of(model(leaf(5, 8)))
        if backward:
            loss.backward()
        del loss
        KEPT.clear()
    gc.collect()
    assert len(alive) <= 1


# --- what f reaches is noted within bounds
def test_tensors_in_containers_are_copied_up_to_so_many_bytes() -> None:
    many = [torch.zeros(COPIED // 80) for _ in range(40)]
    held = reads_of((torch.sin, many)).tensors
    assert len(held) == 40 and COPIED // 2 < sum(h.clone.nbytes for h in held if h.clone is not None) <= COPIED


def test_arrays_count_by_their_size() -> None:
    images: list[Any] = [np.zeros((150, 1024), dtype=np.uint8) for _ in range(100)]
    noted = [c for c, _ in reads_of((torch.sin, images)).contents if isinstance(c, np.ndarray)]
    assert 1 <= len(noted) <= MOST // 150


class Counted(ctypes.Structure):
    calls = 0


def test_classes_whose_own_class_is_in_c_are_put_back() -> None:
    def f(x: Tensor) -> Tensor:
        Counted.calls += 1
        return x * Counted.calls

    def run(training: bool) -> list[Tensor]:
        torch.manual_seed(0)
        Counted.calls, x = 0, leaf(5, 4)
        return list(torch.autograd.grad(loss_of(revfx.rev_block(x, x * 2, f, torch.sin, 3, is_training=training)), [x]))

    assert relative_error(run(True), run(False)) < TOLERANCE and Counted.calls == 3


def test_a_cache_that_is_taken_away_before_the_backward_stays_away() -> None:
    def f(x: Tensor) -> Tensor:
        if not hasattr(Table, "made"):
            Table.made = 2.0
        return x * Table.made

    y = revfx.rev_block(leaf(5, 4), leaf(5, 4), f, torch.sin, 2)
    del Table.made
    loss_of(y).backward()
    assert not hasattr(Table, "made")

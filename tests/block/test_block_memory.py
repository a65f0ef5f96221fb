"""Calls of `rev_block` and `RevBlock` hold no activations, and nothing after they are let go."""

# pyright: reportUnknownLambdaType=false
from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    WAYS,
    Pair,
    block,
    deep_but,
    fp64 as fp64,
    leaf,
    loss_of,
    mlp,
    mlps,
)
from steps import STEPS
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from revfx.engine.native import CHOICE
from revfx.modes import store_activations


ways = pytest.mark.parametrize("way", WAYS)


class Watched(nn.Module):
    """Notes the memory of its results."""

    def __init__(self, made: list[StorageWeakRef]) -> None:
        super().__init__()
        self.inner, self.made = mlp(), made

    def forward(self, x: Tensor) -> Tensor:
        for m in self.inner:
            x = m(x)
            self.made.append(StorageWeakRef(x.untyped_storage()))
        return x


@ways
@pytest.mark.parametrize("layers", [4, 16])
def test_the_graph_keeps_no_activation_of_any_layer_alive(way: str, layers: int) -> None:
    made, during = list[StorageWeakRef](), list[int]()

    def alive() -> int:
        return sum(not ref.expired() for ref in made)

    fs, gs = ([Watched(made) for _ in range(layers)] for _ in range(2))
    call, x1, x2 = block(way, fs, gs), leaf(3, 4), leaf(3, 4)
    for m in (*fs, *gs):
        next(m.inner.parameters()).register_hook(lambda g: during.append(alive()))
    for number in range(STEPS + 1):
        made.clear()
        during.clear()
        y = call(x1, x2)
        assert len(made) == 6 * layers and (alive() == 0 or number == 0)  # the first call learns
        loss_of(y).backward()
        assert len(during) == 2 * layers and (max(during) == 0 or number == 0)
        del y
        assert alive() == 0
    with store_activations():
        y = call(x1, x2)
    assert alive() >= 2 * layers
    del y


@ways
def test_streams_between_layers_are_freed_too(way: str) -> None:
    seen: list[StorageWeakRef] = []

    def f(x: Tensor) -> Tensor:
        seen.append(StorageWeakRef(x.untyped_storage()))
        return torch.tanh(x)

    for number in range(STEPS):
        seen.clear()
        y = block(way, [f] * 8, [f] * 8)(leaf(3, 4), leaf(3, 4))
        assert len(seen) == 16
        alive = sum(not ref.expired() for ref in seen)
        assert alive <= 3 or number == 0  # x2, and y1 of the last layer; the first call learns
        loss_of(y).backward()


class Remembers(nn.Module):
    """Leaves its last output as an attribute, as many models do for inspection."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.last: Tensor | None = None

    def forward(self, x: Tensor, side: Any) -> Tensor:
        last = self.last = self.inner(x)
        return last


class Token:
    pass


def kept_by(call: Callable[..., Pair], backward: bool) -> list[Any]:
    """Weak references to what one call keeps: its state, by a token among its arguments, and its outputs."""
    token = Token()
    y = call(leaf(3, 4), leaf(3, 4), [token])
    refs = [weakref.ref(token), *(StorageWeakRef(t.untyped_storage()) for t in y)]
    if backward:
        loss_of(y).backward()
    return refs


def is_gone(ref: Any) -> bool:
    return ref.expired() if isinstance(ref, StorageWeakRef) else ref() is None


@ways
@pytest.mark.parametrize("backward", [True, False])
def test_state_is_freed_without_the_garbage_collector(way: str, backward: bool) -> None:
    modules = mlps(3)
    f = [lambda x, side, m=m: m(x) for m in modules]
    call = block(way, f, list(mlps(3)))
    gc.collect()
    gc.disable()
    try:
        for _ in range(STEPS):
            assert all(is_gone(ref) for ref in kept_by(call, backward))
    finally:
        gc.enable()


@ways
@pytest.mark.parametrize("backward", deep_but((False,), (True, False)))
@pytest.mark.parametrize("shared", [True, False])
def test_a_module_that_remembers_its_output_does_not_keep_the_state_of_older_calls(
    way: str, backward: bool, shared: bool
) -> None:
    f = [Remembers()] * 3 if shared else [Remembers() for _ in range(3)]
    call = block(way, f, [torch.sin] * 3)
    refs = [kept_by(call, backward) for _ in range(3)]
    gc.collect()
    assert all(is_gone(ref) for older in refs[:2] for ref in older)
    for m in f:
        m.last = None
    gc.collect()
    assert all(is_gone(ref) for ref in refs[2])


def tensors_now() -> int:
    """Return the number of tensors."""
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


@pytest.mark.parametrize("way", deep_but(["rev_block"], WAYS))  # the same replays
def test_replayed_tensors_are_freed_with_the_backward_that_asked_for_them(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CHOICE, "python")  # the native one makes objects of Python when they are asked for
    fs, gs = mlps(4), mlps(4)
    call, x = block(way, fs, gs), [leaf(3, 4), leaf(3, 4)]
    for _ in range(STEPS):
        loss = loss_of(call(*x))
        before = tensors_now()
        for wanted in ([x[0]], [*fs[2].parameters()], x):
            torch.autograd.grad(loss, wanted, retain_graph=True)
            assert tensors_now() == before

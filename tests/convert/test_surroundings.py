"""State around calls of f: it may change before the backward, and f changes it once per call."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import fp64 as fp64, leaf, loss_of, mlp
from steps import STEPS, assert_same_bits, same
from torch import Tensor, nn
from ways import BUILD, Plain

import revfx


pytestmark = pytest.mark.usefixtures("fp64")
WAYS = ("convert", "rev_block", "RevBlock")
ways = pytest.mark.parametrize("way", WAYS)
Train = Callable[[Any, nn.Module], None]
SCALE = 1.0


class Number:
    value = 1.0


class On(nn.Module):
    """`use(self, mlp(x))`; `held` is a plain attribute."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor], held: Any = None) -> None:
        super().__init__()
        self.m, self.use, self.held = mlp(), use, held

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, self.m(x))


def gradients_of(way: str, make: Callable[[], nn.Module], train: Train) -> tuple[list[Tensor | None], nn.Module]:
    """The gradients of all parameters after `train(call, f)`, and f, the first of three functions."""
    torch.manual_seed(0)
    fs, gs = [make(), mlp(), mlp()], [mlp() for _ in range(3)]
    model = BUILD[way](fs, gs) if way in BUILD else Plain(fs, gs)
    torch.manual_seed(1)
    train(model, fs[0])
    return [p.grad for p in nn.ModuleList([*fs, *gs]).parameters()], fs[0]


def check(way: str, make: Callable[[], nn.Module], train: Train, state: Callable[[Any], Any] | None = None) -> None:
    """Gradients, and what f holds, are those of plain autograd."""
    want, plain = gradients_of("plain", make, train)
    got, mine = gradients_of(way, make, train)
    assert_same_bits(got, want)
    assert state is None or same(state(mine), state(plain))


def two_forwards(change: Callable[[Any], None]) -> Train:
    """Backwards for two forwards each, between which something changes."""

    def train(call: Any, f: nn.Module) -> None:
        for _ in range(STEPS):
            first = loss_of(call(leaf(5, 8)))
            change(f)
            (first + loss_of(call(leaf(5, 8)))).backward()

    return train


def some_steps(call: Any, f: nn.Module) -> None:
    for _ in range(STEPS):
        loss_of(call(leaf(5, 8))).backward()


# --- what changes between forward and backward
CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Tensor], Callable[[Any], None]]] = {
    "list": (lambda: [1.0], lambda f, h: h * f.held[0], lambda f: f.held.insert(0, 2.0)),
    "dict": (lambda: {"a": 1.0}, lambda f, h: h * f.held["a"], lambda f: f.held.update(a=2.0)),
    "another object": (Number, lambda f, h: h * f.held.value, lambda f: setattr(f, "held", _with(3.0))),
    "deque": (lambda: deque([1.0], 1), lambda f, h: h * f.held[0], lambda f: f.held.append(2.0)),
    "tensor in a list": (
        lambda: [torch.ones(4)], lambda f, h: h * f.held[0], lambda f: f.held.insert(0, torch.zeros(4)),
    ),
    "frozen": (lambda: None, lambda f, h: h.tanh(), lambda f: f.requires_grad_(False)),
}  # fmt: skip


def _with(value: float) -> Number:
    made = Number()
    made.value = value
    return made


@ways
@pytest.mark.parametrize("name", CHANGES)
def test_what_f_holds_changes_between_two_forwards(way: str, name: str) -> None:
    held, use, change = CHANGES[name]
    check(way, lambda: On(use, held()), two_forwards(change))


def test_functions_that_close_over_the_variable_of_a_loop() -> None:
    f, g, condition = mlp(), mlp(), torch.randn(3, 5, 4)

    def run(training: bool) -> list[Tensor | None]:
        a, b = leaf(5, 4), leaf(5, 4)
        x = (a, b)
        for i in range(3):
            h = condition[i]
            a, b = revfx.rev_block(
                a, b, lambda x: (f(x) * h).tanh(), g, 1, is_training=training  # noqa: B023
            )  # fmt: skip
        return list(torch.autograd.grad(loss_of((a, b)), (*x, *f.parameters(), *g.parameters())))

    for _ in range(STEPS):
        torch.manual_seed(0)
        got = run(True)
        torch.manual_seed(0)
        assert_same_bits(got, run(False))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.r = nn.GRU(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.r(x)[0]


@ways
def test_a_weight_that_is_held_in_a_list_as_well_is_replaced(way: str) -> None:
    def replace(f: Any) -> None:
        f.r.weight_hh_l0 = nn.Parameter(f.r.weight_hh_l0.detach() * 0.5)

    check(way, Recurrent, two_forwards(replace))


@ways
def test_parameters_are_frozen_in_the_forward_and_trained_again_before_the_backward(way: str) -> None:
    found: list[Tensor | None] = []

    def train(call: Any, f: nn.Module) -> None:
        for _ in range(STEPS):
            x = leaf(5, 8)
            call.requires_grad_(False)
            loss = loss_of(call(x))
            call.requires_grad_(True)
            loss.backward()
            assert all(p.requires_grad and p.grad is None for p in f.parameters())
            found.append(x.grad)

    check(way, mlp, train)
    assert_same_bits(found[STEPS:], found[:STEPS])


# --- what f changes itself
def _append(f: Any, h: Tensor) -> Tensor:
    f.held.append(h.detach().mean())
    return h * (1 + torch.stack(list(f.held)[-4:]).mean())


def _increment(f: Any, h: Tensor) -> Tensor:
    f.held["a"] += 1
    return h * f.held["a"]


def _add(f: Any, h: Tensor) -> Tensor:
    f.held[0].add_(torch.ones(4))
    return h * f.held[0]


def _normalise(f: Any, h: Tensor) -> Tensor:
    result: Tensor = f.held[0](h)
    return result


STATES: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Tensor], Callable[[Any], Any]]] = {
    "list": (list, _append, lambda f: len(f.held)),
    "deque": (lambda: deque(maxlen=3), _append, lambda f: len(f.held)),
    "dict": (lambda: {"a": 0}, _increment, lambda f: f.held["a"]),
    "tensor in a tuple": (lambda: (torch.zeros(4),), _add, lambda f: f.held[0]),
    "normalisation in a list": (
        lambda: [nn.BatchNorm1d(4)], _normalise,
        lambda f: (f.held[0].num_batches_tracked.item(), f.held[0].running_mean.abs().sum().item() > 0),
    ),
}  # fmt: skip


@ways
@pytest.mark.parametrize("name", STATES)
def test_what_f_counts_is_counted_once(way: str, name: str) -> None:
    held, use, state = STATES[name]
    check(way, lambda: On(use, held()), some_steps, state)


@ways
def test_a_hooks_log_has_one_line_per_call(way: str) -> None:
    def make() -> nn.Module:
        f, log = mlp(), list[int]()
        f.register_forward_hook(lambda *_: log.append(1))
        f.log = log  # pyright: ignore[reportArgumentType]
        return f

    check(way, make, some_steps, lambda f: len(f.log))


class Codebook(nn.Module):
    """Vectors that are averaged over what is near to them, past autograd."""

    def __init__(self, codes: int) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.codes = nn.Buffer(torch.randn(codes, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x).tanh()
        nearest = torch.cdist(h.detach(), self.codes).argmin(-1)
        q = self.codes[nearest]
        if self.training:
            hot = nn.functional.one_hot(nearest, len(self.codes)).to(h.dtype)
            self.codes.data.mul_(0.9).add_(hot.T @ h.detach(), alpha=0.1)
        return (h + (q - h).detach()) * h


@ways
@pytest.mark.parametrize("codes", [8, 1500])
def test_codebooks_that_are_written_by_data(way: str, codes: int) -> None:
    check(way, lambda: Codebook(codes), some_steps, lambda f: f.codes.sum().item())


# --- side inputs and lazy modules
@pytest.mark.parametrize("layers", [1, 3])
def test_values_that_f_appends_to_a_side_input(layers: int) -> None:
    scale, x = leaf(), (leaf(3, 4), leaf(3, 4))

    def f(x: Tensor, side: Any) -> Tensor:
        side["more"].append(x.mean())
        return x * side["scale"] * len(side["more"])

    def step(training: bool) -> list[Tensor]:
        side: Any = {"scale": scale, "more": []}
        y = revfx.rev_block(*x, f, torch.tanh, layers, side, is_training=training)
        assert len(side["more"]) == layers
        return [*torch.autograd.grad(loss_of((*y, *side["more"])), (*x, scale)), *side["more"]]

    for _ in range(STEPS):
        assert_same_bits(step(True), step(False))


@ways
def test_lazy_modules_get_their_weights_in_the_first_call(way: str) -> None:
    check(way, lambda: nn.LazyLinear(4), some_steps, lambda f: [p.detach() for p in f.parameters()])

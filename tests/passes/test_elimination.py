"""Sums that are solved together: reversible Heun, rotations and mixtures; and sums that do not tell them apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled import compiled
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import D

import revfx
from revfx.passes.elimination import ONE, Elimination
from revfx.passes.program import Arc, Operation, Program, Value
from revfx.testing import assert_same_grads, measure_memory


pytestmark = pytest.mark.usefixtures("fp64")
Step = Callable[[nn.Module, list[Tensor]], list[Tensor]]


class Net(nn.Module):
    """A vector field with state and randomness of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, 2 * D), nn.BatchNorm1d(2 * D), nn.Tanh(), nn.Dropout(0.1))
        self.last = nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.net(x))


class Integrator(nn.Module):
    """Some steps from a start that `begin` makes of the input."""

    def __init__(self, step: Step, states: int, steps: int, net: nn.Module) -> None:
        super().__init__()
        self.net, self.step, self.states, self.steps = net, step, states, steps

    def forward(self, x: Tensor) -> Tensor:
        state = [x * (k + 1) for k in range(self.states)]
        if self.states == 3:
            state = [x, x, self.net(x)]
        for _ in range(self.steps):
            state = self.step(self.net, state)
        return torch.cat(state[:2], -1)


DT = 0.1


def heun(net: nn.Module, state: list[Tensor]) -> list[Tensor]:
    y, z, f0 = state
    z = 2 * y - z + f0 * DT
    f1 = net(z)
    return [y + (f0 + f1) * DT / 2, z, f1]


def rotated(net: nn.Module, state: list[Tensor]) -> list[Tensor]:
    a, b = state
    u, v = 0.6 * a - 0.8 * b + 1, 0.8 * a + 0.6 * b
    return [u + net(v), v]


def mixed(net: nn.Module, state: list[Tensor]) -> list[Tensor]:
    a, b = state
    s, d = (a + b) / 2, a - b
    return [s + 0.1 * net(d), d]


STEPS: dict[str, tuple[Step, int]] = {"heun": (heun, 3), "rotated": (rotated, 2), "mixed": (mixed, 2)}


def growth(step: Step, states: int, wrap: Callable[[nn.Module], Any]) -> float:
    """What of plain's activations is kept per step, where all gradients are plain's, bit for bit."""
    kept: list[tuple[int, int]] = []
    for steps in (4, 12):
        torch.manual_seed(0)
        model, x = Integrator(step, states, steps, Net()), torch.randn(128, D, requires_grad=True)
        wrapped = wrap(model)
        for _ in range(2):
            assert_same_grads(wrapped, model, [x])
        ours, plain = (measure_memory(lambda m=m, x=x: m(x).sum()).kept for m in (wrapped, model))
        kept.append((ours, plain))
    return (kept[1][0] - kept[0][0]) / (kept[1][1] - kept[0][1])


@pytest.mark.parametrize("name", STEPS)
def test_values_that_several_sums_tie_are_solved_together(name: str) -> None:
    assert growth(*STEPS[name], revfx.convert) < 0.15


def test_compiled_graphs_too() -> None:
    torch.compiler.reset()
    model, x = Integrator(heun, 3, 8, nn.Sequential(nn.Linear(D, D), nn.Tanh())), torch.randn(64, D, requires_grad=True)
    call = compiled(model, "aot_eager")
    assert_same_grads(call, model, [x], rtol=1e-12)
    assert measure_memory(lambda: call(x).sum()).kept < 0.5 * measure_memory(lambda: model(x).sum()).kept


A, B, U, V = range(4)


@pytest.mark.parametrize(
    ("u", "v", "solved"),
    [
        ({A: 0.6, B: -0.8}, {A: 0.8, B: 0.6}, {A, B}),
        ({A: 1.0, B: 1.0}, {A: 2.0, B: 2.0}, set()),
        ({A: 0.1 * 3, B: 0.3}, {A: 1.0, B: 1.0}, set()),  # alike but for rounding
    ],
)
def test_two_sums_of_two_unknowns(u: dict[int, float], v: dict[int, float], solved: set[int]) -> None:
    values = tuple(Value(name, (3,), torch.float64, 24, i) for i, name in enumerate("abuv"))
    ops = [Operation("sum", (A, B), (out,), terms=tuple(terms.items())) for out, terms in ((U, u), (V, v))]
    known = {U, V}
    sums = Elimination(Program(values, ops, (U, V)), known)
    found: dict[int, Arc] = {}
    for arc in (*sums.add(0), *sums.add(1)):
        found[arc.head] = arc
        known.add(arc.head)
        found.update({more.head: more for more in sums.learn(arc.head)})
    a, b = torch.randn(2, 3)
    value = {A: a, B: b, U: u[A] * a + u[B] * b, V: v[A] * a + v[B] * b}
    assert found.keys() == solved
    for head, arc in found.items():
        torch.testing.assert_close(arc.solve(*(value[t] for t in arc.tail)), value[head])


def test_a_difference_that_is_a_constant_is_not_solved() -> None:
    """`v = a + 3; u = v - a` does not depend on anything that is known."""
    values = tuple(Value(name, (3,), torch.float64, 24, i) for i, name in enumerate("abuv"))
    ops = [
        Operation("add", (A,), (V,), terms=((A, 1.0), (ONE, 3.0))),
        Operation("sub", (V, A), (U,), terms=((V, 1.0), (A, -1.0))),
    ]
    sums = Elimination(Program(values, ops, (U,)), set[int]())
    assert [*sums.add(0), *sums.add(1)] == []


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "addmm" in str(func)
        return func(*args, **(kwargs or {}))


def test_a_function_above_the_cut_runs_once_in_the_backward() -> None:
    model, x = Integrator(heun, 3, 8, Net()), torch.randn(128, D, requires_grad=True)
    converted = revfx.convert(model)
    converted(x).sum().backward()
    with Products() as forward:
        loss = converted(x).sum()
    with Products() as backward:
        loss.backward(retain_graph=True)
    with Products() as again:
        loss.backward()
    assert backward.count == again.count <= forward.count

"""Threads, and models within models: gradients are those of plain code, whoever runs what at the same time."""

# pyright: reportUnknownLambdaType=false
from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers import deep_but, fp64 as fp64, leaf, loss_of, mlp, mlps
from steps import STEPS, assert_same_bits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint
from ways import BUILD

from revfx.converted import Reversible


WAYS = ("convert", "rev_block", "RevBlock")
ways = pytest.mark.parametrize("way", WAYS)
DEPTH, THREADS = 3, 4
Gradients = Sequence[Tensor | None]


def normed() -> nn.ModuleList:
    return nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()) for _ in range(DEPTH))


def step(model: nn.Module, x: Tensor) -> Gradients:
    """The gradients of one step, which leaves `.grad` alone."""
    return torch.autograd.grad(loss_of(model(x)), [x, *model.parameters()])


def at_once(*functions: Callable[[], Any]) -> list[Any]:
    """What the functions return that start at the same moment, each in a thread of its own."""
    ready = threading.Barrier(len(functions))

    def run(function: Callable[[], Any]) -> Any:
        ready.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return [f.result(timeout=60) for f in [pool.submit(run, function) for function in functions]]


# --- threads
@ways
def test_threads_train_copies(way: str) -> None:
    model = BUILD[way](normed(), mlps(DEPTH))
    models = [copy.deepcopy(model) for _ in range(THREADS)]
    plain, xs = BUILD["plain"](normed(), mlps(DEPTH)), [leaf(6, 8) for _ in range(THREADS)]
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        a.data = b.data
    start = copy.deepcopy(plain.state_dict())

    def train(m: nn.Module, x: Tensor) -> list[Any]:
        found = [g for _ in range(5) for g in step(m, x)]
        return [*found, *(b.clone() for b in m.buffers())]

    got = at_once(*(lambda m=m, x=x: train(m, x) for m, x in zip(models, xs, strict=True)))
    for found, x in zip(got, xs, strict=True):
        plain.load_state_dict(start)
        assert_same_bits(found, train(plain, x))


@ways
@pytest.mark.parametrize("make", [lambda: mlps(DEPTH), normed], ids=["mlp", "norm"])
def test_threads_run_one_model_whose_first_call_they_all_make(way: str, make: Callable[[], nn.ModuleList]) -> None:
    fs, gs = make(), mlps(DEPTH)
    model, xs = BUILD[way](fs, gs), [leaf(6, 8) for _ in range(THREADS)]
    got = at_once(*(lambda x=x: [step(model, x) for _ in range(8)] for x in xs))
    counted = [int(b) for name, b in model.named_buffers() if "tracked" in name]
    assert counted in ([], [8 * THREADS] * DEPTH)
    for found, x in zip(got, xs, strict=True):
        expected = step(BUILD["plain"](fs, gs), x)
        for g in found:
            assert_same_bits(g, expected)
    if isinstance(model, Reversible):
        assert len(model.revfx.plans) == 1


@ways
def test_backward_runs_in_another_thread_than_the_forward(way: str) -> None:
    fs, gs = normed(), mlps(DEPTH)
    model, x = BUILD[way](fs, gs), leaf(6, 8)
    wanted = [x, *model.parameters()]
    for _ in range(STEPS):
        loss = loss_of(model(x))
        (got,) = at_once(lambda loss=loss: torch.autograd.grad(loss, wanted))
        assert_same_bits(got, step(BUILD["plain"](fs, gs), x))


@ways
@pytest.mark.parametrize("graphs", [1, 2])
def test_two_backwards_run_at_once_on_graphs_of_one_model(way: str, graphs: int) -> None:
    fs, gs = normed(), mlps(DEPTH)
    model, xs = BUILD[way](fs, gs), [leaf(6, 8) for _ in range(graphs)]
    parameters = list(model.parameters())
    expected = [step(BUILD["plain"](fs, gs), x) for x in xs]
    for _ in range(5):
        losses = [loss_of(model(x)) for x in xs]
        jobs = [(x, loss, e) for x, loss, e in zip(xs, losses, expected, strict=True)] * (2 // graphs)
        got = at_once(
            *(
                lambda x=x, loss=loss: torch.autograd.grad(loss, [x, *parameters], retain_graph=True)
                for x, loss, _ in jobs
            )
        )
        for g, (_, _, e) in zip(got, jobs, strict=True):
            assert_same_bits(g, e)


@ways
def test_forwards_go_on_while_backwards_of_the_same_model_run(way: str) -> None:
    fs, gs = normed(), normed()
    model, x = BUILD[way](fs, gs), leaf(6, 8)
    (expected,) = torch.autograd.grad(loss_of(BUILD["plain"](fs, gs)(x)), x)
    for m in (*fs, *gs):
        m.get_submodule("1").reset_running_stats()  # type: ignore[operator]
    steps, y = 30, model(x)
    for _ in range(STEPS - 1):
        y = model(x)

    def backwards() -> None:
        for _ in range(steps):
            (got,) = torch.autograd.grad(loss_of(y), x, retain_graph=True)
            assert torch.equal(got, expected)

    def forwards() -> None:
        for _ in range(steps):
            model(x)

    at_once(backwards, forwards)
    assert {int(b) for name, b in model.named_buffers() if "tracked" in name} == {STEPS + steps}


# --- models within models
class Around(nn.Module):
    """f is another model, as it is given, or under a checkpoint."""

    def __init__(self, inner: nn.Module, reentrant: bool | None = None) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return torch.tanh(self.inner(x))
        return torch.tanh(checkpoint(self.inner, x, use_reentrant=self.reentrant))


class Force(nn.Module):
    """The negative gradient of an energy."""

    def __init__(self, energy: nn.Module) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            at = x if x.requires_grad else x.detach().requires_grad_()
            return -torch.autograd.grad(self.energy(at).square().sum(), at, create_graph=True)[0]


class Mapped(nn.Module):
    """Applies its function to each row by `vmap`, with the gradient of its energy by `torch.func.grad`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x)) + vmap(grad(lambda row: self.inner(row).square().sum()))(x)


INSIDE: dict[str, Callable[[str], nn.Module]] = {
    "a chain": lambda way: Around(BUILD[way](mlps(2, 2), mlps(2, 2))),
    "a chain in a chain": lambda way: Around(
        BUILD[way]([Around(BUILD[way](mlps(2, 1), mlps(2, 1))) for _ in range(2)], mlps(2, 2))
    ),
    "a checkpoint": lambda way: Around(mlp(), False),
    "a re-entrant checkpoint": lambda way: Around(mlp(), True),
    "a chain in a checkpoint": lambda way: Around(BUILD[way](mlps(2, 2), mlps(2, 2)), False),
    "a chain in a re-entrant checkpoint": lambda way: Around(BUILD[way](mlps(2, 2), mlps(2, 2)), True),
    "a force": lambda way: Force(mlp(4, 1)),
    "the force of a chain": lambda way: Force(BUILD[way](mlps(2, 2), mlps(2, 2))),
}
AROUND = ("nothing", "a checkpoint", "a re-entrant checkpoint")
TOGETHER = [
    (inside, around)
    for inside in INSIDE
    for around in AROUND
    if not ("force" in inside and "re-entrant" in around)  # plain code raises: there is no graph within the first run
]


@pytest.mark.parametrize("way", deep_but(("convert",), ("convert", "rev_block")))
@pytest.mark.parametrize(("inside", "around"), TOGETHER)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # checkpoints in checkpoints say so
def test_models_within_models_have_the_gradients_of_plain_ones(way: str, inside: str, around: str) -> None:
    made: dict[str, nn.Module] = {}
    for name in (way, "plain"):
        torch.manual_seed(0)
        model = BUILD[name]([INSIDE[inside](name) for _ in range(2)], mlps(2))
        made[name] = model if around == "nothing" else Around(model, around == "a re-entrant checkpoint")
    x = leaf(6, 8)
    assert_trained_alike(made[way], made["plain"], x)


def assert_trained_alike(model: nn.Module, plain: nn.Module, x: Tensor) -> None:
    for _ in range(STEPS):
        assert_same_bits(_trained(model, x), _trained(plain, x))


def _trained(model: nn.Module, x: Tensor) -> Gradients:
    x.grad = None
    model.zero_grad()
    loss_of(model(x)).backward()
    return [x.grad, *(p.grad for p in model.parameters())]


@ways
def test_f_that_asks_torch_func_for_gradients(way: str) -> None:
    fs, gs = nn.ModuleList(Mapped() for _ in range(2)), mlps(2)
    assert_trained_alike(BUILD[way](fs, gs), BUILD["plain"](fs, gs), leaf(6, 8))


@ways
def test_gradient_penalty_through_a_model(way: str) -> None:
    fs, gs = mlps(DEPTH), mlps(DEPTH)

    def penalised(model: nn.Module, x: Tensor) -> Gradients:
        y = model(x)
        (g,) = torch.autograd.grad(loss_of(y.sin()), x, create_graph=True)
        return torch.autograd.grad(loss_of(y) + (g.norm(dim=-1) - 1).square().sum(), [x, *model.parameters()])

    model, plain, x = BUILD[way](fs, gs), BUILD["plain"](fs, gs), leaf(6, 8)
    for _ in range(STEPS):
        assert_same_bits(penalised(model, x), penalised(plain, x))


@ways
def test_per_sample_gradients_of_a_model_with_forces_inside(way: str) -> None:
    parts = [Mapped() for _ in range(2)], list(mlps(2))
    got: list[Gradients] = []
    for model in (BUILD[way](*parts), BUILD["plain"](*parts)):
        torch.manual_seed(1)
        x, weights = torch.randn(5, 1, 8), {k: p.detach() for k, p in model.named_parameters()}
        loss = lambda w, row, m=model: functional_call(m, w, (row,)).sin().sum()  # noqa: E731
        for _ in range(STEPS):
            got.append([*vmap(grad(loss), (None, 0))(weights, x).values()])
    for found in got:
        assert_same_bits(found, got[-1])

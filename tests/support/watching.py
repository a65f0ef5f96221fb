"""Models for watchers of forwards, and their plans."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from revfx.engine.learn import Learning
from revfx.engine.native import learner
from revfx.engine.plan import Plan
from revfx.engine.tape import Tape
from revfx.engine.unit import Unit
from revfx.plan.couplings import find_couplings
from revfx.plan.replays import Unreplayable
from revfx.plan.units import Span, UnitBuilder, find_spans


WIDTH, ROWS = 8, 16


# --- models
class Coupling(nn.Module):
    """A coupling whose function has BatchNorm, dropout and an operator in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm, self.drop = nn.BatchNorm1d(2 * WIDTH), nn.Dropout(0.3)
        self.activation: Callable[[Tensor], Tensor] = F.gelu

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return b, a + self.second(self.drop(self.activation(self.norm(self.first(b))))).mul_(0.5)


class Couplings(nn.Module):
    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Coupling() for _ in range(depth))
        self.head = nn.Linear(2 * WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for block in self.blocks:
            a, b = block(a, b)
        return self.head(torch.cat([a, b], -1))


class Layer(nn.Module):
    """Two linear layers and a function of both and their input."""

    def __init__(self, function: Callable[[Layer, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def random(m: Layer, x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    mask = torch.bernoulli(torch.full((ROWS, WIDTH), 0.5))
    noise = torch.rand_like(x) + torch.randn(WIDTH, generator=generator)
    return F.dropout(m.first(x), 0.3) * noise * mask + F.rrelu(m.second(x), training=True)


def in_place(m: Layer, x: Tensor) -> Tensor:
    y = m.second(m.first(x).relu_())
    y += 1
    return (y * 2).sigmoid_().tanh()


def written_later(m: Layer, x: Tensor) -> Tensor:
    y = m.first(x)
    z = y.tanh()
    y.mul_(2)
    w = m.second(z) + y.sigmoid()
    v = w.exp()
    w.zero_()
    return (v.cos() * w.add_(y).sigmoid()).tanh().add(1).mul_(0.5)


def several(m: Layer, x: Tensor) -> Tensor:
    a, b = m.first(x).split(WIDTH // 2, -1)
    rows = torch.cat([b.tanh(), a.exp()], -1).unbind(0)
    return m.second(torch.stack(rows)[list(range(ROWS))[::-1]])


def types(m: Layer, x: Tensor) -> Tensor:
    y = m.first(x).to(torch.float64, memory_format=torch.contiguous_format)
    z = torch.empty_like(y, dtype=torch.float32, device="cpu").fill_(2)
    return m.second((y * torch.tensor(0.5) * z + True).float().clamp(min=-1)).reshape(-1).exp()


def attention(m: Layer, x: Tensor) -> Tensor:
    q = m.first(x).view(2, ROWS // 2, 2, WIDTH // 2).transpose(1, 2)
    return m.second(F.scaled_dot_product_attention(q, q, q.tanh(), dropout_p=0.1).transpose(1, 2).reshape(ROWS, WIDTH))


def forces(m: Layer, x: Tensor) -> Tensor:
    y = m.first(x).tanh()
    (force,) = torch.autograd.grad(m.second(y).sin().sum(), y, create_graph=True)
    return (y * force).tanh()


def checkpointed(m: Layer, x: Tensor) -> Tensor:
    def function(y: Tensor) -> Tensor:
        return m.first(y).tanh().exp()

    return m.second(checkpoint(function, m.first(x), use_reentrant=False)).tanh()


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad_outputs[0]


def own_function(m: Layer, x: Tensor) -> Tensor:
    return m.second(Square.apply(m.first(x)).tanh())


class OwnTensor(Tensor):
    """A subclass of tensors without a dispatch of its own."""


def subclasses(m: Layer, x: Tensor) -> Tensor:
    p = nn.Parameter(m.first.weight.detach() * 2)
    return m.second(F.linear(x, p).as_subclass(OwnTensor).as_subclass(Tensor).tanh())


def transforms(m: Layer, x: Tensor) -> Tensor:
    return m.second(x).tanh() + torch.vmap(torch.sin)(m.first(x).detach())


FUNCTIONS = [
    random, in_place, written_later, several, types, attention, forces, checkpointed, own_function, transforms,
    subclasses,
]  # fmt: skip


# --- plans
def learn(model: nn.Module, x: Tensor, python: bool, size: int = 0) -> Plan:
    """Return the plan of a model: of its couplings, or of units with `size` operators each."""
    tape = record(model, x, python)
    last = len(tape.ops) - 1
    if size:
        found = spans([(a, min(a + size - 1, last)) for a in range(0, last + 1, size)])
    else:
        found = find_spans(find_couplings(tape))
    units = units_of(tape, found)
    plan = Plan()
    plan.learn(units, list(range(len(units))))
    return plan


def add_path(plan: Plan, model: nn.Module, x: Tensor, python: bool, ranges: Sequence[tuple[int, int]]) -> None:
    """Add the path that a model takes now to its plan, with units from operators to operators of it."""
    units = units_of(record(model, x, python), spans(ranges))
    plan.others = [path for path in (plan.path, *plan.others) if path.sequence]
    plan.learn(units, [0] * len(units))
    plan.path.firsts = [first for first, _ in ranges]


def record(model: nn.Module, x: Tensor, python: bool) -> Tape:
    learning: Any = learner(Learning, python)(model)
    before = copy.deepcopy(model.state_dict())
    with learning:
        out = model(x)
    model.load_state_dict(before)
    learning.tape.returned = [learning.number(t) for t in pytree.tree_leaves(out)]
    return learning.tape


def spans(ranges: Sequence[tuple[int, int]]) -> list[Span]:
    none = frozenset[int]()
    return [Span(first, last, (), (), (), none, none, none) for first, last in ranges]


def units_of(tape: Tape, found: Sequence[Span]) -> list[Unit]:
    units: list[Unit] = []
    for span in found:
        with contextlib.suppress(Unreplayable):
            units.append(UnitBuilder(tape, span).run())
    return units


@dataclass
class Step:
    """A step: how many units matched, the output and the gradients."""

    count: int
    out: Tensor
    grads: list[Tensor | None]


def step(model: nn.Module, x: Tensor, watching: Any = None, seed: int = 1) -> Step:
    torch.manual_seed(seed)
    model.zero_grad()
    if watching is None:
        out = model(x)
    else:
        with watching:
            out = model(x)
    out.square().mean().backward()
    return Step(0 if watching is None else watching.forward.count, out, [p.grad for p in model.parameters()])


def assert_same(a: Step, b: Step) -> None:
    assert torch.equal(a.out, b.out)
    for g, h in zip(a.grads, b.grads, strict=True):
        assert (g is None) == (h is None)
        assert g is None or (h is not None and torch.equal(g, h))

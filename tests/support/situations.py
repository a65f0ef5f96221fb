"""Situations of training, up to modes and `requires_grad`: what a step gives and leaves, as a `Report`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import TOLERANCE, leaf, loss_of, mlps, relative_error
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from ways import Build


DEPTH = 3
ROUNDED = "the last bits of gradients"


@dataclass
class Report:
    """What a situation gives and leaves, which is compared to the last bit."""

    outputs: list[Tensor] = field(default_factory=list[Tensor])
    gradients: list[Tensor | None] = field(default_factory=list[Tensor | None])
    buffers: list[Tensor] = field(default_factory=list[Tensor])
    random: list[Tensor] = field(default_factory=list[Tensor])
    seen: Any = None

    def add(self, outputs: Tensor | Iterable[Tensor] = (), module: nn.Module | None = None, *leaves: Tensor) -> Report:
        """Itself, with the state of now: outputs, gradients of leaves and parameters, buffers, randomness."""
        self.outputs += [y.detach().clone() for y in ((outputs,) if isinstance(outputs, Tensor) else outputs)]
        self.gradients += [_copy(x.grad) for x in leaves]
        self.random.append(torch.get_rng_state())
        if module is not None:
            self.gradients += [_copy(p.grad) for p in module.parameters()]
            self.buffers += [b.clone() for b in module.buffers()]
        return self

    def differs_in(self, other: Report) -> set[str]:
        """The names of the fields that are not what they are in `other`."""
        names = ("outputs", "gradients", "buffers", "random")
        found = {name for name in names if not equal(getattr(self, name), getattr(other, name))}
        if "gradients" in found and relative_error(self.gradients, other.gradients) < TOLERANCE:
            found = found - {"gradients"} | {ROUNDED}
        return found | ({"seen"} if self.seen != other.seen else set[str]())


def _copy(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().clone()


def equal(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> bool:
    return len(a) == len(b) and all(map(_alike, a, b))


def _alike(s: Tensor | None, t: Tensor | None) -> bool:
    return s is t if s is None or t is None else s.dtype == t.dtype and torch.equal(s, t)


Situation = Callable[[Build], Report]
SITUATIONS: dict[str, Situation] = {}


def situation(run: Situation) -> Situation:
    SITUATIONS[run.__name__.replace("_", " ")] = run
    return run


def step(model: nn.Module, report: Report | None = None, rows: int = 6, needs_grad: bool = True) -> Report:
    """One forward and backward, reported."""
    x = leaf(rows, 8).requires_grad_(needs_grad)
    y = model(x)
    (report := report or Report()).add(y)
    torch.rand(3)  # the backward must not depend on where the generator is then
    loss_of(y).backward()
    return report.add(y, model, x)


def noisy(count: int = DEPTH) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 4)) for _ in range(count)]


def normed(count: int = DEPTH) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4)) for _ in range(count)]


# --- what f draws, writes and computes in
@situation
def a_step(build: Build) -> Report:
    return step(build(mlps(DEPTH), mlps(DEPTH)))


@situation
def dropout(build: Build) -> Report:
    return step(build(noisy(), noisy()))


@situation
def batch_norm(build: Build) -> Report:
    return step(build(normed(), normed()))


@situation
def batch_norm_without_momentum_over_two_steps(build: Build) -> Report:
    fs, gs = normed(), mlps(DEPTH)
    for m in nn.ModuleList(fs).modules():
        if isinstance(m, nn.BatchNorm1d):
            m.momentum = None
    model = build(fs, gs)
    return step(model, step(model))


@situation
def spectral_norm(build: Build) -> Report:
    fs = [nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Tanh()) for _ in range(DEPTH)]
    return step(build(fs, mlps(DEPTH)))


@situation
def weight_norm(build: Build) -> Report:
    fs = [nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Tanh()) for _ in range(DEPTH)]
    return step(build(fs, mlps(DEPTH)))


class Casts(nn.Module):
    """Computes in single precision, or what autocast makes of it, and notes in what it did."""

    def __init__(self, seen: set[Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.float32)
        self.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x.float())
        self.seen.add((x.dtype, h.dtype, torch.is_autocast_enabled("cpu")))
        return h.tanh()


def _autocast(build: Build, forward: bool, backward: bool) -> Report:
    seen: set[Any] = set()
    model = build([Casts(seen) for _ in range(DEPTH)], [Casts(seen) for _ in range(DEPTH)])
    x = leaf(6, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=forward):
        y = model(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=backward):
        loss_of(y).backward()
    report = Report(seen=seen).add(y, model, x)
    assert all(enabled == forward and h.itemsize == (2 if forward else 4) for _, h, enabled in seen)
    return report


@situation
def autocast_around_the_forward(build: Build) -> Report:
    return _autocast(build, forward=True, backward=False)


@situation
def autocast_around_the_backward(build: Build) -> Report:
    return _autocast(build, forward=False, backward=True)


@situation
def autocast_around_both(build: Build) -> Report:
    return _autocast(build, forward=True, backward=True)


# --- ways to ask for gradients
@situation
def double_backward(build: Build) -> Report:
    model, x = build(noisy(), normed()), leaf(6, 8)
    y = model(x)
    wanted = [x, *model.parameters()]
    first = torch.autograd.grad(loss_of(y), wanted, create_graph=True)
    (loss_of(first) + torch.stack([g.square().sum() for g in first]).sum()).backward()
    report = Report(gradients=[g.detach().clone() for g in first])
    return report.add(y, model, x)


@situation
def autograd_grad(build: Build) -> Report:
    model, x = build(mlps(DEPTH), mlps(DEPTH)), leaf(6, 8)
    y = model(x)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss_of(y), [x, *parameters])
    return Report(gradients=list(gradients), seen=[p.grad is None for p in (x, *parameters)]).add(y)


@situation
def autograd_grad_of_some(build: Build) -> Report:
    fs, gs, x = mlps(DEPTH), mlps(DEPTH), leaf(6, 8)
    y = build(fs, gs)(x)
    wanted = [*fs[1].parameters(), *gs[2].parameters()]
    first = torch.autograd.grad(loss_of(y), wanted, retain_graph=True)
    return Report(gradients=[*first, *torch.autograd.grad(y.square().sum(), [x, *gs[0].parameters()])]).add(y)


@situation
def retain_graph_and_two_backwards(build: Build) -> Report:
    model, x = build(noisy(), normed()), leaf(6, 8)
    y = model(x)
    loss_of(y).backward(retain_graph=True)
    report = Report().add(y, model, x)
    loss_of(y.square()).backward()
    report.add(y, model, x)
    with pytest.raises(RuntimeError, match="second time"):
        loss_of(y).backward()
    return report.add(y, model, x)


@situation
def anomaly_mode(build: Build) -> Report:
    with torch.autograd.set_detect_anomaly(True):
        return step(build(noisy(), normed()))


@situation
def grad_of_functional_call(build: Build) -> Report:
    model, x = build(mlps(DEPTH), mlps(DEPTH)), torch.randn(6, 8)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss_of(functional_call(model, parameters, (x,)))

    parameters = {name: p.detach() * 1.5 for name, p in model.named_parameters()}
    by_name, of_x = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
    return Report(gradients=[*by_name.values(), of_x]).add()


@situation
def vmap_of_grad_of_functional_call(build: Build) -> Report:
    model, x = build(mlps(DEPTH), mlps(DEPTH)), torch.randn(6, 8)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x,)).sin().sum()

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return Report(gradients=list(torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x).values())).add()


@situation
def functional_call_and_a_backward_after_it(build: Build) -> Report:
    model, x = build(normed(), mlps(DEPTH)), leaf(6, 8)
    others = {name: (p.detach() * 1.5).requires_grad_() for name, p in model.named_parameters()}
    y = functional_call(model, others, (x,))
    loss_of(y).backward()
    assert all(p.grad is None for p in model.parameters())
    return Report(gradients=[p.grad for p in others.values()]).add(y, None, x)


@situation
def no_grad(build: Build) -> Report:
    model, x = build(noisy(), normed()), leaf(6, 8)
    with torch.no_grad():
        y = model(x)
    assert not y.requires_grad
    report = Report().add(y, model, x)
    with torch.inference_mode():
        report.add(model(torch.randn(6, 8)))
    return step(model, report)


# --- modes and requires_grad
@situation
def a_backward_in_eval(build: Build) -> Report:
    model, x = build(noisy(), normed()), leaf(6, 8)
    y = model(x)
    model.eval()
    loss_of(y).backward()
    return Report(seen={m.training for m in model.modules()}).add(y, model, x)


@situation
def a_forward_in_eval_and_a_backward_in_train(build: Build) -> Report:
    model, x = build(noisy(), normed()).eval(), leaf(6, 8)
    y = model(x)
    model.train()
    loss_of(y).backward()
    return Report(seen={m.training for m in model.modules()}).add(y, model, x)


@situation
def train_and_eval_in_turn(build: Build) -> Report:
    model, report = build(noisy(), normed()), Report()
    for mode in (True, False, True, False):
        step(model.train(mode), report)
    return report


class Scales(nn.Module):
    """Reads and counts in attributes that are mere numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale, self.calls = 2.0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.linear(x) * self.scale + self.calls)


@situation
def numbers_that_f_reads_change_before_the_backward(build: Build) -> Report:
    fs, gs = [Scales() for _ in range(DEPTH)], [Scales() for _ in range(DEPTH)]
    model, x = build(fs, gs), leaf(6, 8)
    y = model(x)
    for m in (*fs, *gs):
        m.scale = 3.0
    loss_of(y).backward()
    return Report(seen=[(m.scale, m.calls) for m in (*fs, *gs)]).add(y, model, x)


class Remembers(nn.Module):
    """Leaves its last result as an attribute, and computes something once."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.randn(4))
        self.last: Tensor | None = None
        self.once: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.once is None:
            self.once = self.weight.exp().sin()
        self.last = torch.tanh(self.linear(x) * self.once)
        return self.last


@situation
def f_leaves_its_result_as_an_attribute(build: Build) -> Report:
    modules = [Remembers() for _ in range(2 * DEPTH)]
    model, x = build(modules[:DEPTH], modules[DEPTH:]), leaf(6, 8)
    y = model(x)
    before = [(m.last, m.once) for m in modules]
    (loss_of(y) + sum(m.last.square().sum() for m in modules if m.last is not None)).backward()
    same = [m.last is last and m.once is once for m, (last, once) in zip(modules, before, strict=True)]
    return Report(seen=same).add([y, *(m.last for m in modules if m.last is not None)], model, x)


@situation
def a_part_in_eval(build: Build) -> Report:
    fs, gs = normed(), noisy()
    model = build(fs, gs)
    fs[1].eval()
    gs[2].eval()
    return step(model)


@situation
def inputs_without_gradient(build: Build) -> Report:
    return step(build(noisy(), normed()), needs_grad=False)


@situation
def frozen_parameters(build: Build) -> Report:
    return step(build(mlps(DEPTH).requires_grad_(False), mlps(DEPTH).requires_grad_(False)))


def _frozen_in_part(needs_grad: bool) -> Situation:
    def run(build: Build) -> Report:
        fs, gs = mlps(DEPTH), mlps(DEPTH)
        frozen = [*fs[0].parameters(), *list(gs[1].parameters())[:1], *list(fs[2].parameters())[1:3]]
        for p in frozen:
            p.requires_grad_(False)
        return step(build(fs, gs), needs_grad=needs_grad)

    return run


SITUATIONS["partly frozen parameters"] = _frozen_in_part(needs_grad=True)
SITUATIONS["partly frozen parameters, inputs without gradient"] = _frozen_in_part(needs_grad=False)


@situation
def all_but_the_last_layer_frozen(build: Build) -> Report:
    fs, gs = mlps(DEPTH), mlps(DEPTH)
    for m in (*fs[:-1], *gs[:-1]):
        m.requires_grad_(False)
    return step(build(fs, gs), needs_grad=False)


@situation
def parameters_frozen_between_steps(build: Build) -> Report:
    fs, gs = mlps(DEPTH), mlps(DEPTH)
    model = build(fs, gs)
    report = step(model)
    fs[1].requires_grad_(False)
    report = step(model, report)
    fs[1].requires_grad_(True)
    gs.requires_grad_(False)
    return step(model, report)

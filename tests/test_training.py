"""The table of training situations: what each way of running a chain of couplings does in each.

Plain autograd is the oracle; `torch.utils.checkpoint`, per layer, runs along as the yardstick. Where a way does
something other than plain code does, `OTHERWISE` says so, and the test fails when that no longer holds.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import TOLERANCE, leaf, loss_of, mlps, relative_error
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import CheckpointError
from ways import BUILD, WAYS, Build

from revfx import NotReversibleError, block, planning
from revfx.calls import Call
from revfx.convert import Reversible
from revfx.errors import RevfxWarning
from revfx.executor import RegionPlan, RegionRun, run_region


DEPTH = 3


@dataclass
class Report:
    """What a situation gives and leaves: `gradients` are compared up to rounding, all else exactly."""

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
        exact = ("outputs", "buffers", "random")
        found = {name for name in exact if not _equal(getattr(self, name), getattr(other, name))}
        missing = [t is None for t in self.gradients] != [t is None for t in other.gradients]
        if missing or not relative_error(self.gradients, other.gradients) < TOLERANCE:
            found.add("gradients")
        return found | ({"seen"} if self.seen != other.seen else set[str]())


def _copy(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().clone()


def _equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(s.dtype == t.dtype and torch.equal(s, t) for s, t in zip(a, b, strict=True))


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


# --- what f draws, writes and computes in ---------------------------------------------------------
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


# --- ways to ask for gradients --------------------------------------------------------------------
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


# --- modes and requires_grad ----------------------------------------------------------------------
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


# --- what f is ------------------------------------------------------------------------------------
class Applies(nn.Module):
    """A module around a function, which may close over tensors."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _closures(wrap: Callable[[Callable[[Tensor], Tensor]], Any]) -> Situation:
    def run(build: Build) -> Report:
        w, x = leaf(4, 4), leaf(6, 8)
        z = w.exp()  # not a leaf
        fs = [wrap(lambda x, k=k: torch.tanh(x @ w) * z[k]) for k in range(DEPTH)]
        model = build(fs, [wrap(lambda x: torch.sin(x) * z.mean())] * DEPTH)
        y = model(x)
        (loss_of(y) + z.sum()).backward()
        return Report().add(y, None, x, w)

    return run


SITUATIONS["closures"] = _closures(lambda function: function)
SITUATIONS["closures in modules"] = _closures(Applies)


@situation
def a_closure_written_before_the_backward(build: Build) -> Report:
    w, x = leaf(4, 4), leaf(6, 8)
    inner = [nn.Sequential(Applies(lambda x: torch.tanh(x @ w))) for _ in range(DEPTH)]
    y = build(inner, inner)(x)
    with torch.no_grad():
        w.mul_(2)
    try:
        loss_of(y).backward()
    except RuntimeError as e:
        return Report(seen="modified" in str(e)).add(y)
    return Report(seen="nothing").add(y)


class Reads(nn.Module):
    """Reads tensors that are mere attributes: a leaf, and one that is computed anew for each call."""

    def __init__(self, own: Tensor) -> None:
        super().__init__()
        self.own = own
        self.given = own

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.own) * self.given


@situation
def tensor_attributes(build: Build) -> Report:
    w, x = leaf(4, 4), leaf(6, 8)
    fs, gs = [Reads(w) for _ in range(DEPTH)], [Reads(leaf(4, 4)) for _ in range(DEPTH)]
    model, report = build(fs, gs), Report()
    for scale in (1.0, 2.0):
        z = (w * scale).cos()
        for k, m in enumerate((*fs, *gs)):
            m.given = z[k % 4]
        y = model(x)
        loss_of(y).backward()
        report.add(y, None, x, w, *(m.own for m in gs))
    return report


class OnTemporaries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x).tanh_()
        h = h * 2
        h[:, 0] = x[:, 1]
        h += x
        h = h * 0.5
        return h.sigmoid_()


@situation
def in_place_on_temporaries(build: Build) -> Report:
    gs = [nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5, inplace=True), nn.ReLU(inplace=True)) for _ in range(DEPTH)]
    return step(build([OnTemporaries() for _ in range(DEPTH)], gs))


class OnItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mul_(0.5)).tanh()


@situation
def in_place_on_the_input_of_f(build: Build) -> Report:
    return step(build([*mlps(DEPTH), OnItsInput(), *mlps(DEPTH)], mlps(2 * DEPTH + 1)))


@situation
def in_place_on_the_input_of_every_f(build: Build) -> Report:
    return step(
        build(
            [*mlps(1), *(OnItsInput() for _ in range(DEPTH))],
            [*mlps(1), *(OnItsInput() for _ in range(DEPTH))],
        )
    )


@situation
def hooks_on_f(build: Build) -> Report:
    fs, gs = mlps(DEPTH), mlps(DEPTH)
    seen: dict[str, Any] = {"forward": set[int](), "backward": list[int]()}
    report = Report(seen=seen)

    def before(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0] * 0.5,)

    def after(m: Any, _: Any, out: Tensor) -> Tensor:
        seen["forward"].add(number[m])
        return out * 2

    def backward(m: Any, of_inputs: Any, of_outputs: Any) -> tuple[Tensor]:
        seen["backward"].append(number[m])
        report.gradients += [*of_inputs, *of_outputs]
        return (of_inputs[0] * 1.5,)

    number = {m: k for k, m in enumerate((*fs, *gs))}
    for m in number:
        m.register_forward_pre_hook(before)
        m.register_forward_hook(after)
        m.register_full_backward_hook(backward)
        m.register_full_backward_pre_hook(lambda m, of_outputs: seen["backward"].append(-number[m]))
    return step(build(fs, gs), report)


@situation
def hooks_inside_f(build: Build) -> Report:
    fs, gs = mlps(DEPTH), mlps(DEPTH)
    count = [0]
    for m in (*fs, *gs):
        m[1].register_forward_hook(lambda m, args, out: out * 2)  # type: ignore[index]
        m[1].register_full_backward_hook(lambda *_: count.__setitem__(0, count[0] + 1))  # type: ignore[index]
    return step(build(fs, gs), Report(seen=count))


@situation
def hooks_on_the_model(build: Build) -> Report:
    model, seen = build(mlps(DEPTH), mlps(DEPTH)), list[str]()
    model.register_forward_pre_hook(lambda m, args: seen.append("before") or (args[0] * 2,))
    model.register_forward_hook(lambda m, args, out: seen.append("after") or out.sin())
    model.register_full_backward_hook(lambda m, of_inputs, of_outputs: seen.append("backward"))
    return step(model, Report(seen=seen))


@situation
def hooks_on_tensors(build: Build) -> Report:
    model, x, seen = build(mlps(DEPTH), mlps(DEPTH)), leaf(6, 8), list[str]()

    def noted(name: str) -> Callable[[Tensor], Tensor]:
        def hook(grad: Tensor) -> Tensor:
            seen.append(name)
            return grad * 2

        return hook

    def accumulated(_: Tensor) -> None:
        seen.append("accumulated")

    h = x.tanh()
    h.register_hook(noted("input"))
    for p in model.parameters():
        p.register_hook(noted("parameter"))
        p.register_post_accumulate_grad_hook(accumulated)
    h.retain_grad()
    y = model(h)
    y.register_hook(noted("output"))
    loss_of(y).backward()
    return Report(seen=sorted(seen), gradients=[h.grad]).add(y, model, x)


class Raises(nn.Module):
    """Draws, writes a buffer and then raises, while it is armed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.armed = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        if self.armed:
            raise KeyError("armed")
        return h


@situation
def f_raises_in_the_forward(build: Build) -> Report:
    fs, gs = [*noisy(1), Raises(), *normed(1)], normed()
    model = build(fs, gs)
    report = step(model)
    fs[1].armed = True  # type: ignore[assignment]
    with pytest.raises(KeyError, match="armed"):
        model(leaf(6, 8))
    report.add((), model)
    fs[1].armed = False  # type: ignore[assignment]
    return step(model, report)


# --- where the model stands in a program ----------------------------------------------------------
@situation
def one_module_in_all_layers(build: Build) -> Report:
    return step(build(normed(1) * DEPTH, noisy(1) * DEPTH))


@situation
def one_module_for_f_and_g(build: Build) -> Report:
    modules = mlps(1)[0]
    return step(build([modules] * DEPTH, [modules] * DEPTH))


@situation
def called_twice_before_one_backward(build: Build) -> Report:
    model, x = build(noisy(), normed()), leaf(6, 8)
    y, z = model(x), model(x.flip(0) * 0.5)
    loss_of([y, z, y * z]).backward()
    return Report().add([y, z], model, x)


@situation
def called_on_its_own_result(build: Build) -> Report:
    model, x = build(noisy(), normed()), leaf(6, 8)
    y = model(x)
    z = model(y)
    loss_of(z).backward()
    return Report().add([y, z], model, x)


@situation
def backwards_in_either_order(build: Build) -> Report:
    model, x = build(noisy(), normed()), leaf(6, 8)
    y, z, u = model(x), model(x.flip(0)), model(x * 2)
    for out in (z, y, u):
        loss_of(out).backward()
    return Report().add([y, z, u], model, x)


@situation
def the_input_is_used_again(build: Build) -> Report:
    model, x = build(mlps(DEPTH), mlps(DEPTH)), leaf(6, 8)
    h = x.tanh()
    y = model(h)
    z = y * h + h + x.sin()
    loss_of(z).backward()
    return Report().add([y, z, h], model, x)


@situation
def the_input_is_a_view_of_a_leaf(build: Build) -> Report:
    model, x = build(mlps(DEPTH), mlps(DEPTH)), leaf(8, 7)
    y = model(x.t()[:6])
    loss_of(y).backward()
    return Report().add([y, x], model, x)


@situation
def outputs_and_inputs_after_the_backward(build: Build) -> Report:
    model, x = build(mlps(DEPTH), mlps(DEPTH)), leaf(6, 8)
    y = model(x)
    z = y * y
    before = [t.detach().clone() for t in (x, y, z)]
    z.sum().backward()
    assert _equal(before, [t.detach() for t in (x, y, z)])
    return Report().add([x, y, z], model, x)


@situation
def only_a_part_of_the_output_is_used(build: Build) -> Report:
    model, x = build(mlps(DEPTH), mlps(DEPTH)), leaf(6, 8)
    y = model(x)
    loss_of(y[:, :3]).backward()
    return Report().add(y, model, x)


@situation
def accumulation_over_micro_batches(build: Build) -> Report:
    model, report = build(noisy(), normed()), Report()
    for rows in (6, 4, 6):
        step(model, report, rows)
    return report


@situation
def steps_of_an_optimizer(build: Build) -> Report:
    model, report = build(mlps(DEPTH), mlps(DEPTH)), Report()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(torch.randn(6, 8)).square().mean()
        loss.backward()
        optimizer.step()
        report.gradients.append(loss.detach())
    report.gradients += [p.detach() for p in model.parameters()]
    return report.add()


# --- copies ---------------------------------------------------------------------------------------
def _saved(model: nn.Module) -> nn.Module:
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


def _copied(how: Callable[[nn.Module], nn.Module]) -> Situation:
    def run(build: Build) -> Report:
        model = build(noisy(), normed())
        early = how(model)
        report = step(model)
        for copied in (early, how(model)):
            assert type(copied) is type(model) and not {*map(id, copied.parameters())} & {*map(id, model.parameters())}
            step(copied, report)
        return step(model, report)

    return run


SITUATIONS["copies by deepcopy"] = _copied(copy.deepcopy)
SITUATIONS["copies by pickle"] = _copied(lambda model: pickle.loads(pickle.dumps(model)))
SITUATIONS["copies by torch.save"] = _copied(_saved)


@situation
def a_state_dict_loaded(build: Build) -> Report:
    model, other = build(normed(), normed()), BUILD["plain"](normed(), normed())
    theirs = dict(zip(model.state_dict(), other.state_dict().values(), strict=True))
    model.load_state_dict(theirs)
    return step(model)


# --- the table ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Raised:
    """An exception of this type, whose text has this in it."""

    type: type[Exception]
    text: str


WRITES = Raised(NotReversibleError, "writes to its input in place")
RECOMPUTES_OTHERWISE = Raised(CheckpointError, "recomput")
HAS_NO_HOOKS = Raised(RuntimeError, "don't yet support saved tensor hooks")
OTHERWISE: dict[tuple[str, str], set[str] | Raised] = {
    # What f does there can't be undone, and the forward says so. `convert` leaves such a layer as it is.
    ("in place on the input of f", "rev_block"): WRITES,
    ("in place on the input of f", "RevBlock"): WRITES,
    ("in place on the input of every f", "rev_block"): WRITES,
    ("in place on the input of every f", "RevBlock"): WRITES,
    # Checkpointing updates what f writes a second time ...
    ("batch norm", "checkpoint"): {"buffers"},
    ("batch norm without momentum over two steps", "checkpoint"): {"buffers"},
    ("double backward", "checkpoint"): {"buffers"},
    ("retain graph and two backwards", "checkpoint"): {"buffers"},
    ("anomaly mode", "checkpoint"): {"buffers"},
    ("no grad", "checkpoint"): {"buffers"},
    ("train and eval in turn", "checkpoint"): {"outputs", "gradients", "buffers"},
    ("a part in eval", "checkpoint"): {"buffers"},
    ("inputs without gradient", "checkpoint"): {"buffers"},
    ("f raises in the forward", "checkpoint"): {"buffers"},
    ("one module in all layers", "checkpoint"): {"buffers"},
    ("called twice before one backward", "checkpoint"): {"buffers"},
    ("called on its own result", "checkpoint"): {"buffers"},
    ("backwards in either order", "checkpoint"): {"buffers"},
    ("accumulation over micro batches", "checkpoint"): {"buffers"},
    ("copies by deepcopy", "checkpoint"): {"buffers"},
    ("copies by pickle", "checkpoint"): {"buffers"},
    ("copies by torch.save", "checkpoint"): {"buffers"},
    ("a state dict loaded", "checkpoint"): {"buffers"},
    # ... runs f on what it holds in the backward, silently where the shapes agree ...
    ("spectral norm", "checkpoint"): {"gradients", "buffers"},
    ("functional call and a backward after it", "checkpoint"): {"gradients"},
    ("numbers that f reads change before the backward", "checkpoint"): {"gradients", "seen"},
    ("a closure written before the backward", "checkpoint"): {"seen"},
    ("a backward in eval", "checkpoint"): RECOMPUTES_OTHERWISE,
    ("a forward in eval and a backward in train", "checkpoint"): RECOMPUTES_OTHERWISE,
    ("f leaves its result as an attribute", "checkpoint"): RECOMPUTES_OTHERWISE,
    ("in place on the input of f", "checkpoint"): Raised(RuntimeError, "modified by an inplace operation"),
    ("in place on the input of every f", "checkpoint"): Raised(RuntimeError, "modified by an inplace operation"),
    # ... and needs hooks that torch.func does not have.
    ("grad of functional call", "checkpoint"): HAS_NO_HOOKS,
    ("vmap of grad of functional call", "checkpoint"): HAS_NO_HOOKS,
}

# `convert` finds no region and says why.
REFUSED = {
    "closures": "neither an argument nor a parameter",
    "batch norm without momentum over two steps": "depends on the values of a tensor",
}
# Nothing is kept for a backward there, or hooks on saved tensors are not supported.
RUN_PLAINLY = {"grad of functional call", "vmap of grad of functional call"}


pytestmark = pytest.mark.usefixtures("fp64")


def report_of(name: str, build: Build) -> Report:
    torch.manual_seed(0)
    return SITUATIONS[name](build)


def test_every_row_of_the_tables_is_a_situation() -> None:
    assert {name for name, _ in OTHERWISE} | {*REFUSED} | RUN_PLAINLY <= {*SITUATIONS}
    assert {way for _, way in OTHERWISE} <= {*WAYS}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SITUATIONS)
def test_a_way_does_what_plain_code_does_or_what_the_table_says(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = report_of(name, BUILD["plain"])
    runs: list[RegionRun] = []
    built: list[nn.Module] = []

    def noted(plan: RegionPlan, calls: Sequence[Call], env: dict[int, Tensor]) -> None:
        runs.append(run_region(plan, calls, env))

    for module in (block, planning):
        monkeypatch.setattr(module, "run_region", noted)

    def build(f: Any, g: Any) -> nn.Module:
        built.append(BUILD[way](f, g))
        return built[-1]

    refused = REFUSED.get(name) if way == "convert" else None
    otherwise = OTHERWISE.get((name, way), set[str]())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if isinstance(otherwise, Raised):
            with pytest.raises(otherwise.type, match=otherwise.text):
                report_of(name, build)
        else:
            assert report_of(name, build).differs_in(expected) == otherwise
    texts = [str(w.message) for w in caught]
    assert all(issubclass(w.category, RevfxWarning) for w in caught)
    assert not texts if refused is None else any(refused in text for text in texts), texts
    regions = [plan.regions for m in built if isinstance(m, Reversible) for plan in m.revfx.plans]
    saves = way != "checkpoint" and refused is None and name not in RUN_PLAINLY and not isinstance(otherwise, Raised)
    assert bool(runs) == saves
    assert all(regions) and bool(regions) == (saves and way == "convert")

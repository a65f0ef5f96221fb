"""Situations of training: what f is, where the model stands in a program, and copies of it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import leaf, loss_of, mlps
from situations import DEPTH, SITUATIONS, Report, Situation, equal, noisy, normed, situation, step
from torch import Tensor, nn
from ways import BUILD, Build


# --- what f is
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


# --- where the model stands in a program
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
    assert equal(before, [t.detach() for t in (x, y, z)])
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


# --- copies
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

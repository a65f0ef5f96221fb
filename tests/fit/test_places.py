"""Arguments, parameters and buffers lie elsewhere from call to call: slices of a data set, flat parameters, strides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fit_models import Residual, branch, equal, fit_of, quick_search as quick_search
from helpers import deep_but
from torch import Tensor, nn

import revfx


STEPS, LAYERS = 6, 4


class Tokens(nn.Module):
    """Embedded tokens, added positions, and residual layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(50, 64), Residual(*(branch() for _ in range(LAYERS)))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(self.embed(tokens))


class Inner(nn.Module):
    """The argument is read again in the middle, through views: a transposed part and other strides."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(branch() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for layer in self.layers:
            h = h + layer(h * x[:, :1].sin()).tanh() * x.view(-1, 2, 32).transpose(1, 2).reshape(x.shape).cos()
        return h


class Asking(Residual):
    """A forward that asks for numbers is recorded on real tensors."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x.sin()) * float(x.detach().numpy().std())
        return x


class Two(nn.Module):
    """Two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(branch() for _ in range(LAYERS))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = x
        for layer in self.layers:
            h = h + layer(h * y.sin()).tanh() * x.cos()
        return h


class Writing(Two):
    """The first argument is written to after it was read: in the second one, if they overlap."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = super().forward(x.clone(), y.exp())
        with torch.no_grad():
            x.mul_(0.5)
        return h + super().forward(x.clone(), y.exp())


Calls = Callable[[int], tuple[Tensor, ...]]


def trained(model: nn.Module, run: Callable[..., Tensor], calls: Calls, change: Callable[[int], None]) -> list[Tensor]:
    """The losses and gradients of six steps with SGD in between; `change` happens before each."""
    found: list[Tensor] = []
    for step in range(STEPS):
        change(step)
        model.zero_grad()
        torch.manual_seed(step)
        loss = run(*calls(step)).square().mean()
        loss.backward()
        found += [loss.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        torch.optim.SGD(model.parameters(), 0.1).step()
    return found


def check(
    make: Callable[[], nn.Module],
    calls: Callable[[], Calls],
    share: float = 0.6,
    change: Callable[[nn.Module, int], None] = lambda model, step: None,
) -> Any:
    """Training under a budget is that of the plain model; return what is known of the model."""
    found: list[list[Tensor]] = []
    fit: Any = None
    for budget in (None, share):
        torch.manual_seed(0)
        model: Any = make().train()
        run: Any = model if budget is None else revfx.convert(model, memory=budget)
        torch.manual_seed(1)
        found.append(trained(model, run, calls(), lambda step, model=model: change(model, step)))
        fit = fit if budget is None else fit_of(run)
    assert equal(*found)
    assert all(f.chosen.plan.dropped for f in fit.plans)
    return fit


def mlp() -> nn.Module:
    return Residual(*(branch() for _ in range(LAYERS)))


def slices() -> Calls:
    data = torch.randn(STEPS * 256, 64)
    return lambda i: (data[256 * i : 256 * (i + 1)],)


def sparse_slices() -> Calls:
    """Most rows are zero, so that a sample sees little of it."""
    data = torch.zeros(STEPS * 256, 64)
    data[::37] = torch.randn(len(data[::37]), 64)
    return lambda i: (data[256 * i : 256 * (i + 1)],)


def chunks() -> Calls:
    data = torch.randn(STEPS * 256, 64)
    return lambda i: (data.chunk(STEPS)[i],)


def columns() -> Calls:
    data = torch.randn(256, STEPS * 64)
    return lambda i: (data[:, 64 * i : 64 * (i + 1)],)


def expanded() -> Calls:
    data = torch.randn(STEPS, 64)
    return lambda i: (data[i].expand(256, 64),)


def asking() -> nn.Module:
    return Asking(*(branch() for _ in range(LAYERS)))


SLICES = (slices, sparse_slices, chunks, columns, expanded)
# `Inner` has a `view`, which takes no columns.
CASES = [(make, calls) for make in (mlp, Inner, asking) for calls in SLICES if (make, calls) != (Inner, columns)]


# How they lie is of no matter to how the argument is read, or recorded.
OFTEN = [case for case in CASES if case[0] is mlp or case[1] in (slices, sparse_slices)]


@pytest.mark.parametrize(("make", "calls"), deep_but(OFTEN, CASES))
def test_batches_are_slices_of_a_data_set(make: Callable[[], nn.Module], calls: Callable[[], Calls]) -> None:
    assert len(check(make, calls).plans) == 1


@pytest.mark.parametrize("along", ["rows", "columns"])
def test_batches_are_slices_of_tokens(along: str) -> None:
    def calls() -> Calls:
        data = torch.randint(0, 50, (STEPS * 16, 16) if along == "rows" else (16, STEPS * 16))
        return lambda i: (data[16 * i : 16 * (i + 1)] if along == "rows" else data[:, 16 * i : 16 * (i + 1)],)

    assert len(check(Tokens, calls).plans) == 1


@pytest.mark.parametrize("shift", [0, 64, 256], ids=["equal", "overlapping", "beside"])
@pytest.mark.parametrize("make", [Two, Writing])
def test_two_arguments_may_be_views_of_one_tensor(make: Callable[[], nn.Module], shift: int) -> None:
    def calls() -> Calls:
        data = torch.randn((STEPS + 1) * 256, 64)
        return lambda i: (data[256 * i : 256 * (i + 1)], data[256 * i + shift : 256 * (i + 1) + shift])

    assert len(check(make, calls, 0.75).plans) == 1


def test_arguments_that_share_a_storage_may_overlap_later() -> None:
    def calls() -> Calls:
        data = torch.randn(4 * 256, 64)
        return lambda i: (data[:256], data[512:768] if i < 3 else data[64:320])

    assert len(check(Writing, calls, 0.75).plans) == 1


def test_an_argument_of_a_larger_data_set_is_planned_as_if_it_were_alone() -> None:
    def peak(data: Tensor) -> int:
        torch.manual_seed(0)
        fitted: Any = revfx.convert(mlp(), memory=0.6)
        fitted(data[512:768]).sum().backward()
        return fit_of(fitted).budget_plans[0].plain

    assert peak(torch.randn(768, 64)) == peak(torch.randn(512 * 64, 64))


def flatten(model: nn.Module, tensors: Callable[[nn.Module], Any] = nn.Module.parameters) -> None:
    flat = torch.cat([torch.zeros(7), *(p.detach().flatten() for p in tensors(model))])
    at = 7
    for p in tensors(model):
        p.data = flat[at : at + p.numel()].view_as(p)
        at += p.numel()


def transpose(model: nn.Module) -> None:
    for p in model.parameters():
        if p.dim() == 2:
            p.data = p.data.t().contiguous().t()


def separate(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data.clone()


@pytest.mark.parametrize("when", [0, 3])
@pytest.mark.parametrize("how", [flatten, transpose])
@pytest.mark.parametrize("make", [mlp, lambda: Asking(*(branch() for _ in range(LAYERS)))])
def test_parameters_may_move(
    make: Callable[[], nn.Module], how: Callable[[nn.Module], None], when: int, recwarn: pytest.WarningsRecorder
) -> None:
    def change(model: nn.Module, step: int) -> None:
        if step == when:
            how(model)
        if when == 0 and step == 3:
            separate(model)

    fit = check(make, slices, change=change)
    assert len(fit.plans) == 1
    assert not recwarn.list


def test_buffers_may_move() -> None:
    class Scaled(Residual):
        def __init__(self, *layers: nn.Module) -> None:
            super().__init__(*layers)
            for i in range(len(layers)):
                self.register_buffer(f"scale{i}", torch.rand(64))

        def forward(self, x: Tensor) -> Tensor:
            for i, layer in enumerate(self.layers):
                x = x + (layer(x) * self.get_buffer(f"scale{i}")).sin()
            return x

    def change(model: nn.Module, step: int) -> None:
        if step == 3:
            flatten(model, nn.Module.buffers)

    assert len(check(lambda: Scaled(*(branch() for _ in range(LAYERS))), slices, change=change).plans) == 1


def test_a_parameter_may_be_a_slice_of_another() -> None:
    def tied() -> nn.Module:
        model: Any = mlp()
        for a, b in zip(model.layers[:2], model.layers[2:], strict=True):
            b[1].weight = nn.Parameter(a[4].weight.detach().view(256, 64))
            b[1].bias = nn.Parameter(a[1].bias.detach()[0:256])
            b[4].bias = nn.Parameter(a[1].bias.detach()[64:128])
        return model

    assert len(check(tied, slices).plans) == 1

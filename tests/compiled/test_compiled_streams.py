"""Compiled couplings that write streams and inputs in place, return aliases, and call operators of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled import INNERS, QUIET, ROWS, WIDTH, check, compiled, fresh as fresh, inverted
from helpers import TOLERANCE, deep_but, leaf, loss_of, mlps, relative_error
from torch import Tensor, nn
from ways import Plain


DEPTH = 3

pytestmark = QUIET


# --- streams, inputs and outputs
class Adds(Plain):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x[:, :WIDTH] * 1, x[:, WIDTH:] * 1
        for f, g in zip(self.f, self.g, strict=True):
            a += f(b.clone())
            b.mul_(0.5).add_(g(a.clone()))
        return torch.cat([a, b], -1)


class Copies(Plain):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x[:, :WIDTH] * 1, x[:, WIDTH:] * 1
        for f, g in zip(self.f, self.g, strict=True):
            a.copy_(a + f(b.clone()))
            b.sub_(g(a.clone()))
        return torch.cat([a, b], -1)


class AssignsSlices(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        for f, g in zip(self.f, self.g, strict=True):
            x[:, :WIDTH] += f(x[:, WIDTH:].clone())
            x[:, WIDTH:] = x[:, WIDTH:] * 0.8 + g(x[:, :WIDTH].clone())
        return x


class Around(nn.Module):
    """Something around a chain of couplings."""

    def __init__(self, f: nn.ModuleList, g: nn.ModuleList) -> None:
        super().__init__()
        self.chain = Plain(f, g)


class WritesItsInput(Around):
    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        x = self.chain(x + state)
        state.mul_(0.9).add_(x.detach())
        return x * state.sin()


class ReturnsAliases(Around):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.chain(x)
        a, b = y.chunk(2, -1)
        return y, a, y, b.t(), x, a + 1, y.view(-1)


class ReadsItsInputAgain(Around):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.chain(x) * x.sin(), x[:, 1:]


STREAMS = [Adds, Copies, AssignsSlices, ReturnsAliases, ReadsItsInputAgain]


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("kind", STREAMS)
def test_writes_to_streams_and_aliases(kind: Callable[..., nn.Module], inner: str) -> None:
    report = check(kind(mlps(DEPTH), mlps(DEPTH)), inner)
    assert inverted(report) >= 2 * DEPTH - 2, report.refusals


@pytest.mark.parametrize("inner", INNERS)
def test_an_input_that_is_written_and_read_by_the_backward(inner: str) -> None:
    model = WritesItsInput(mlps(DEPTH), mlps(DEPTH))
    report = check(model, inner, torch.rand(ROWS, 2 * WIDTH), leaf(ROWS, 2 * WIDTH))
    assert report.regions


class ScalesInPlace(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return super().forward(x)


@pytest.mark.parametrize("inner", INNERS)
def test_an_input_with_gradient_that_is_written(inner: str) -> None:
    model = ScalesInPlace(mlps(DEPTH), mlps(DEPTH))
    grads: list[list[Any]] = []
    x = torch.randn(ROWS, 2 * WIDTH)
    for call in (model, compiled(model, inner)):
        start = x.clone().requires_grad_()
        h = start * 1
        loss = loss_of(call(h).sin() * h)
        grads.append([*torch.autograd.grad(loss, [start, *model.parameters()]), h.detach(), loss.detach()])
    assert relative_error(grads[1], grads[0]) < TOLERANCE


# --- operators that revfx knows nothing of
@torch.library.custom_op("revfx_tests::soft", mutates_args=())
def soft(x: Tensor) -> Tensor:
    return x.sin() * 0.5


@soft.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _pull(ctx: Any, grad: Tensor) -> Tensor:
    return grad * ctx.saved_tensors[0].cos() * 0.5


soft.register_autograd(_pull, setup_context=_keep)


@torch.library.custom_op("revfx_tests::tally", mutates_args=("total",))
def tally(total: Tensor, x: Tensor) -> None:
    total.add_(x.sum(0))


class Applies(nn.Module):
    """`function(self, x)`, where `self` has a layer and a buffer."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.linear = function, nn.Linear(WIDTH, WIDTH)
        self.register_buffer("buffer", torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def calls_an_operator(m: Any, x: Tensor) -> Tensor:
    return soft(m.linear(x))


def calls_one_that_writes(m: Any, x: Tensor) -> Tensor:
    h = m.linear(x).tanh()
    tally(m.buffer, h.detach())
    return h * m.buffer.sin()


def asserts(m: Any, x: Tensor) -> Tensor:
    torch.ops.aten._assert_async.msg((x < 1e9).all(), "too large")
    return m.linear(x).tanh()


def branches(m: Any, x: Tensor) -> Tensor:
    result: Any = torch.cond(x.sum() > 0, lambda x: x.sin() * 2, lambda x: x.cos() * 3, (m.linear(x),))
    return result


OPAQUE = {"calls_an_operator": calls_an_operator, "calls_one_that_writes": calls_one_that_writes, "cond": branches}


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("kind", deep_but(("calls_one_that_writes", "cond"), OPAQUE))
def test_operators_of_others_are_run_once_and_said(kind: str, inner: str) -> None:
    function = OPAQUE[kind]
    opaque = [Applies(function), *mlps(DEPTH), Applies(function)]
    report = check(Plain([*mlps(1), *opaque, *mlps(1)], mlps(len(opaque) + 2)), inner)
    assert report.regions, "the couplings between them are reversible"
    assert any("custom operator" in str(r) or "higher-order" in str(r) for r in report.refusals), report.refusals


@pytest.mark.parametrize("inner", INNERS)
def test_assertions_inside_f(inner: str) -> None:
    report = check(Plain([Applies(asserts) for _ in range(DEPTH)], mlps(DEPTH)), inner)
    assert inverted(report) >= 2 * DEPTH - 2, report.refusals

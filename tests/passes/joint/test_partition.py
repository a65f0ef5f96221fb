"""The rewrite of the joint graph, seen from the graph: what is left behind, what is checked, what is put where."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import TOLERANCE, fp64, leaf, loss_of, mlps, relative_error
from torch import Tensor, fx, nn
from torch.nn import functional

from revfx import rules
from revfx.compiled.partitioner import reports
from revfx.rules import Inverse, aten, register_inverse
from revfx.testing import assert_same_grads


__all__ = ["fp64"]
Options = dict[str, str | int | bool | Callable[..., object]]
DEPTH, ROWS = 4, 16


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class ThenCubed(nn.Module):
    """Couplings with dropout whose streams are cubed on the way, which has an inverse that nobody told revfx."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = mlps(2 * DEPTH), mlps(2 * DEPTH)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for i, (f, g) in enumerate(zip(self.f, self.g, strict=True)):
            a = a + nn.functional.dropout(f(b), 0.2)
            b = b + g(a)
            if i >= DEPTH:
                a, b = a.erf(), b.erf()
        return torch.cat([a, b], -1)


@pytest.fixture
def unwritable() -> Iterator[None]:
    """A rule whose inverse holds a tensor of its own, which can't be written into a graph."""
    one = torch.ones(())

    @register_inverse(aten.erf.default)
    def _(node: fx.Node) -> Iterator[Inverse]:
        yield Inverse(node.args[0], lambda y: y.erfinv() * one)

    yield
    rules.unregister_inverse(aten.erf.default)


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.deep)])
def test_a_region_that_cannot_be_written_leaves_nothing_behind(unwritable: None, inner: str) -> None:
    model, x = ThenCubed(), leaf(ROWS, 8)
    with reports() as found:
        options: Options = {"inner": inner}
        if inner == "inductor":
            options["fallback_random"] = True
        compiled = torch.compile(model, backend="revfx", options=options)
        got = _gradients(compiled, model, x)
    assert relative_error(got, _gradients(model, model, x)) < TOLERANCE
    (report,) = found
    assert any("is not at hand" in refusal.detail for refusal in report.refusals)


def _gradients(function: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor | None]:
    torch.manual_seed(1)
    return list(torch.autograd.grad(loss_of(function(x)), [x, *module.parameters()]))


class Divided(nn.Module):
    """A stream is divided by a parameter that is read before the others, of which one follows a pattern."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.rand(1) + 0.5)
        self.f, self.g = (nn.ModuleList(nn.Linear(3, 3, bias=False) for _ in range(4)) for _ in range(2))
        nn.init.constant_(self.f[1].get_parameter("weight"), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        b = functional.dropout(b, 0.5)
        for f, g in zip(self.f, self.g, strict=True):
            b = b + f(self.by * a.tanh())
            a = a + g(torch.relu(g(b)))
        a = a / self.by
        return torch.cat([a, b + self.f[0](a)], -1)


def test_inputs_stay_in_the_order_of_the_arguments(fp64: None) -> None:
    """Where a check of a parameter stood before other inputs, these came in the order in which they were checked."""
    model, x = Divided(), torch.randn(5, 6, requires_grad=True)
    compiled: Any = torch.compile(model, backend="revfx", options={"inner": "aot_eager"})
    with reports() as found:
        assert_same_grads(compiled, model, [x])
    assert found[0].regions

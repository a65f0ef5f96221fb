"""What was selected from a stream (its maximum, its k-th largest) is found in it again after the stream came back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled import compiled
from helpers import TOLERANCE, deep_but, fp64 as fp64, relative_error
from torch import Tensor, nn
from zoo import D, Pairs, mlp

import revfx
from revfx.compiled.partitioner import reports


class Selects(Pairs):
    """Each f reads the stream, and something selected from it, which is returned or read one layer on."""

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor], select: Callable[[Tensor], Tensor], on: bool) -> None:
        super().__init__(4)
        self.read, self.select, self.on = read, select, on
        self.stem = nn.Linear(2 * D, 2 * D)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a, b = self.stem(x).chunk(2, -1)
        found: list[Tensor] = []
        for f, g in zip(self.f, self.g, strict=True):
            found.append(self.select(b))
            earlier = found[-2] if self.on and len(found) > 1 else found[-1]
            a = a + f(self.read(b, found[-1]) + 0 * earlier)
            b = b + g(a)
        return (a, b) if self.on else (a, b, torch.stack(found))


SELECT: dict[str, Callable[[Tensor], Tensor]] = {
    "amax": lambda b: b.amax(-1, keepdim=True),
    "absmax": lambda b: b.abs().amax(-1, keepdim=True),
    "max": lambda b: b.max(-1, keepdim=True)[0],
    "max of all": lambda b: b.max(),
    "topk": lambda b: b.topk(4, -1)[0][..., -1:],
    "sort": lambda b: b.sort(-1)[0][..., 3:4],
    "norm": lambda b: torch.linalg.vector_norm(b, float("inf"), -1, keepdim=True),
}
READ: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "divides": lambda b, m: b / (m.abs() + 1),
    "compares": lambda b, m: torch.where(b >= m, 2 * b, b),
}
BY_CONVERT = [(select, "convert") for select in SELECT]
CASES = [*BY_CONVERT, *((select, "aot_eager") for select in ("amax", "topk", "max of all"))]


@pytest.mark.parametrize("on", deep_but((True,), (False, True)), ids=["returned", "read one layer on"])
@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("select, way", deep_but([*BY_CONVERT, ("amax", "aot_eager")], CASES))
def test_gradients_are_plain_autograds(select: str, way: str, read: str, on: bool) -> None:
    model, x = Selects(READ[read], SELECT[select], on), torch.randn(6, 2 * D, requires_grad=True)
    torch.compiler.reset()
    with reports() as found:
        call: Any = revfx.convert(model) if way == "convert" else compiled(model, way)
        got = gradients(call, model, x)
    assert relative_error(got, gradients(model, model, x)) < TOLERANCE
    regions = [r for p in call.revfx.plans for r in p.regions] if way == "convert" else found[0].regions
    assert regions


def gradients(call: Callable[..., Any], model: nn.Module, x: Tensor) -> list[Tensor | None]:
    loss = sum((y.sin().sum() for y in call(x)), torch.zeros(()))
    return list(torch.autograd.grad(loss, [x, *model.parameters()]))


def test_a_module_that_returns_what_it_selects() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, b: Tensor) -> tuple[Tensor, Tensor]:
            scale = b.abs().amax(-1, keepdim=True)
            return self.net(b / scale), scale

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = nn.ModuleList(Scaled() for _ in range(4)), nn.ModuleList(mlp() for _ in range(4))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            (a, b), scales = x.chunk(2, -1), list[Tensor]()
            for f, g in zip(self.f, self.g, strict=True):
                h, scale = f(b)
                a, scales = a + h, [*scales, scale]
                b = b + g(a)
            return a, b, torch.stack(scales)

    model, x = Model(), torch.randn(6, 2 * D, requires_grad=True)
    converted: Any = revfx.convert(model)
    assert relative_error(gradients(converted, model, x), gradients(model, model, x)) < TOLERANCE
    assert converted.revfx.plans

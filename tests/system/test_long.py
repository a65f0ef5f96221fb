"""Very deep models: gradients are right, memory stays flat, and neither recursion nor time gets out of hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled import compiled, fresh as fresh, inverted
from helpers import deep_but, fp64 as fp64, regions_of, relative_error
from torch import Tensor, nn
from ways import Blocked, Plain

from revfx import convert
from revfx.compiled.partitioner import reports
from revfx.testing import measure_memory, store_activations


WIDTH, ROWS = 4, 16
STREAM = ROWS * WIDTH * 8  # bytes


class Small(nn.Module):
    """tanh(W x + b) / 10."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) / 10


def functions(layers: int) -> tuple[nn.ModuleList, nn.ModuleList]:
    """f and g of so many layers."""
    return nn.ModuleList(Small() for _ in range(layers)), nn.ModuleList(Small() for _ in range(layers))


def gradients(call: Any, model: nn.Module, x: Tensor) -> list[Tensor | None]:
    """Of the mean square of `call(x)`, for `x` and all parameters."""
    return list(torch.autograd.grad(call(x).square().mean(), [x, *model.parameters()]))


def assert_flat(call: Any, model: nn.Module, layers: int) -> None:
    """Raise unless gradients are plain autograd's, and memory does not grow with the layers from the second call on."""
    x = torch.randn(ROWS, 2 * WIDTH, requires_grad=True)
    gradients(call, model, x)  # which learns, or compiles
    with store_activations():
        want = gradients(model, model, x)
    for t in [x, *model.parameters()]:
        t.grad = torch.zeros_like(t)  # so that it is not counted
    for _ in range(3):
        memory = measure_memory(lambda: call(x).square().mean(), warm_up=False)
        assert relative_error([t.grad for t in [x, *model.parameters()]], want) < 1e-9
        plain = 4 * STREAM * layers  # f reads its input, tanh its output; so does g
        assert memory.peak < 0.03 * plain + 512 * STREAM, memory
        for t in [x, *model.parameters()]:
            t.grad = torch.zeros_like(t)


@pytest.mark.parametrize("layers", deep_but((1_000,), (2_000, 5_000)))
def test_a_block_of_many_couplings(layers: int) -> None:
    model = Blocked(*functions(layers))
    model.block.exact = False
    assert_flat(model, model, layers)


@pytest.mark.parametrize("layers", deep_but((400,), (400, 1_000)))
def test_a_converted_model_of_many_couplings(layers: int) -> None:
    model = Plain(*functions(layers))
    call: Any = convert(model, exact=False)
    assert_flat(call, model, layers)
    assert sum(step.is_inverted for region in regions_of(call) for step in region.steps) > 2 * layers - 10


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("layers", deep_but((40,), (40, 100)))
def test_a_compiled_model_of_many_couplings(layers: int) -> None:
    model = Plain(*functions(layers))
    with reports() as found:
        assert_flat(compiled(model, "aot_eager"), model, layers)
    assert sum(map(inverted, found)) > 2 * layers - 10

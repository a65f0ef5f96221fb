"""Compiled graphs in which numbers are sizes that change, or integers that do: only the run knows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled import fresh as fresh
from helpers import deep_but, fp64 as fp64, mlp, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

from revfx.compiled.partitioner import reports


pytestmark = pytest.mark.usefixtures("fp64", "fresh")
Step = Callable[[Tensor, int], Tensor]  # of a stream (rows, n, 4) and a number

OF_SIZES: dict[str, Step] = {
    "divided": lambda a, k: a / a.shape[1],
    "multiplied": lambda a, k: a * a.shape[1],
    "added": lambda a, k: a + a.shape[1],
    "taken off": lambda a, k: a.shape[1] - a,
    "rolled": lambda a, k: a.roll(a.shape[1] // 2, 1),
    "halves": lambda a, k: torch.cat([a[:, a.shape[1] // 2 :], a[:, : a.shape[1] // 2]], 1),
}
OF_NUMBERS: dict[str, Step] = {
    "divided": lambda a, k: a / k,
    "added": lambda a, k: a + k,
    "rolled": lambda a, k: a.roll(k, 1),
    "sliced": lambda a, k: torch.cat([a[:, k:], a[:, :k]], 1),
    "narrowed": lambda a, k: torch.cat([a.narrow(1, k, a.shape[1] - k), a.narrow(1, 0, k)], 1),
}


class Numbers(nn.Module):
    """Couplings between which a stream goes through `step`, in all layers or only `before` them."""

    def __init__(self, step: Step, before: bool) -> None:
        super().__init__()
        self.f, self.step, self.before = nn.ModuleList(mlp(4) for _ in range(4)), step, before

    def forward(self, a: Tensor, b: Tensor, k: int) -> Tensor:
        if self.before:
            a = self.step(a, k)
        for f in self.f:
            a, b = b, (a if self.before else self.step(a, k)) + f(b)
        return torch.cat([a, b], -1)


def check(model: Numbers, sizes: list[tuple[int, int]], dynamic: bool | None = None) -> None:
    """Gradients of steps with other sizes, and other numbers, are plain autograd's; what lies before couplings takes
    nothing from them.
    """
    options: Any = {"inner": "aot_eager"}
    compiled = torch.compile(model, backend="revfx", dynamic=dynamic, options=options)
    with reports() as found:
        for n, k in sizes:
            a, b = torch.randn(3, n, 4, requires_grad=True), torch.randn(3, n, 4, requires_grad=True)
            wanted = [a, b, *model.parameters()]
            got, want = (torch.autograd.grad(call(a, b, k).sin().sum(), wanted) for call in (compiled, model))
            assert relative_error(got, want) < 1e-9
    assert found
    assert not model.before or all(report.regions for report in found)


@pytest.mark.parametrize("before", deep_but((True,), (False, True)))
@pytest.mark.parametrize("step", OF_SIZES)
def test_sizes_that_are_not_fixed(step: str, before: bool) -> None:
    check(Numbers(OF_SIZES[step], before), [(6, 1), (8, 1), (5, 1)], dynamic=True)


@pytest.mark.parametrize("step", OF_NUMBERS)
def test_integers_that_change(step: str) -> None:
    check(Numbers(OF_NUMBERS[step], before=False), [(6, 1), (6, 2), (6, 3)])


Resized = Callable[[Tensor], Tensor]  # of square images

RESIZED: dict[str, Resized] = {
    "flattened": lambda t: t.flatten(2),
    "pooled": lambda t: F.avg_pool2d(t, 2, ceil_mode=True),
    "enlarged": lambda t: F.interpolate(t, scale_factor=1.5),
    "cropped": lambda t: t[:, :, : max(t.shape[2] - 4, 3), : min(t.shape[3], 7)],
}


class Images(nn.Module):
    """Couplings with momentum of two halves of the channels of what becomes of an image."""

    def __init__(self, resized: Resized) -> None:
        super().__init__()
        self.f, self.g = (nn.ModuleList(mlp(4) for _ in range(3)) for _ in range(2))
        self.resized, self.stem = resized, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(self.resized(x).movedim(1, -1)).chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = 0.5 * a + f(b)
            b = b + torch.tanh(g(a))
        return torch.cat([a, b], -1)


@pytest.mark.deep
@pytest.mark.parametrize(
    "resized, exact",
    [("flattened", False), ("pooled", False), ("enlarged", True), ("enlarged", False), ("cropped", False)],
)
def test_images_whose_size_is_not_fixed(resized: str, exact: bool) -> None:
    model = Images(RESIZED[resized])
    options: Any = {"inner": "aot_eager", "exact": exact}
    compiled = torch.compile(model, backend="revfx", dynamic=True, options=options)
    with reports() as found:
        for n in (12, 9):
            x = torch.randn(2, 8, n, n, requires_grad=True)
            wanted = [x, *model.parameters()]
            got, want = (torch.autograd.grad(call(x).sin().sum(), wanted) for call in (compiled, model))
            assert relative_error(got, want) < (1e-3 if exact else 1e-9)
    (report,) = found
    assert report.regions

"""Every reversible program under `torch.compile(backend="revfx")`: found, right, and flat in depth, by both inner
compilers, against what torch's own compiler does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from helpers import TOLERANCE, relative_error
from torch import Tensor, nn
from zoo import ZOO

from revfx.partitioner import reports
from revfx.testing import measure_memory


SHALLOW, DEEP = 4, 12
ROWS, MANY_ROWS = 8, 1024
Options = dict[str, str | int | bool | Callable[..., object]]
QUICK: Options = {"fallback_random": True, "cpp.simdlen": 1}  # the numbers of eager, and code that compiles fast
INNER: dict[str, Options] = {"inductor": QUICK, "aot_eager": {"inner": "aot_eager"}}
Compile = Callable[[nn.Module], Callable[..., Any]]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def stock(model: nn.Module) -> Callable[..., Any]:
    return torch.compile(model, options=QUICK)


def by_revfx(inner: str) -> Compile:
    return lambda model: torch.compile(model, backend="revfx", options=INNER[inner])


def inputs_of(name: str, rows: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(3)
    made = ZOO[name][1](rows)
    return [t.to(dtype).requires_grad_() if t.is_floating_point() else t for t in made]


def loss(model: Callable[..., Any], inputs: Sequence[Tensor]) -> Tensor:
    out = model(*inputs)
    return torch.stack([t.square().mean() for t in (out if isinstance(out, tuple) else (out,))]).sum()


def gradients(compiler: Compile | None, model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of inputs and parameters of a copy of `model`, compiled or as it is, from one random state."""
    torch.compiler.reset()
    model = copy.deepcopy(model)
    run = model if compiler is None else compiler(model)
    torch.manual_seed(1)
    wanted = [*(t for t in inputs if t.requires_grad), *model.parameters()]
    return list(torch.autograd.grad(loss(run, inputs), wanted))


def peak(compiler: Compile, model: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Bytes at the peak of the second step, when all is compiled, less those of the parameters' gradients."""
    torch.compiler.reset()
    run = compiler(model)
    loss(run, inputs).backward()
    model.zero_grad()
    theirs = sum(p.numel() * p.element_size() for p in model.parameters())
    return measure_memory(lambda: loss(run, inputs)).peak - theirs


@pytest.mark.parametrize("name", ZOO)
def test_gradients_are_plain_autograds(name: str) -> None:
    torch.manual_seed(0)
    model = ZOO[name][0](SHALLOW).double()
    exact = inputs_of(name, ROWS, torch.float64)
    want = gradients(None, model, exact)
    single, rounded = copy.deepcopy(model).float(), inputs_of(name, ROWS, torch.float32)
    theirs = relative_error(_double(gradients(stock, single, rounded)), want)
    for inner in INNER:
        with reports() as found:
            assert relative_error(gradients(by_revfx(inner), model, exact), want) < TOLERANCE
        assert any(report.regions for report in found)
        ours = relative_error(_double(gradients(by_revfx(inner), single, rounded)), want)
        print(f"{name}, {inner}: fp32 error {ours:.2e}, stock {theirs:.2e}")
        assert ours < 2 * theirs


def _double(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("name", ZOO)
def test_peak_memory_does_not_grow_with_depth(name: str) -> None:
    inputs = inputs_of(name, MANY_ROWS, torch.float32)
    models = {depth: ZOO[name][0](depth) for depth in (SHALLOW // 2, SHALLOW, DEEP)}

    def growth(compiler: Compile, shallow: int, deep: int) -> int:
        low, high = (peak(compiler, models[depth], inputs) for depth in (shallow, deep))
        return high - low

    # torch keeps as much for each layer: what it grows by from 2 to 4, four times, is what it grows by from 4 to 12
    plain = growth(stock, SHALLOW // 2, SHALLOW) * (DEEP - SHALLOW) // (SHALLOW - SHALLOW // 2)
    for inner in INNER:
        ours = growth(by_revfx(inner), SHALLOW, DEEP)
        print(f"{name}, {inner}: growth {ours / plain:.2%}")
        assert ours < 0.03 * plain

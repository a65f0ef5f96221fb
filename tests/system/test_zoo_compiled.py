"""Every reversible program under `torch.compile(backend="revfx")`: found, right, and flat in depth, by both inner
compilers, against what torch's own compiler does.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from helpers import TOLERANCE, deep_but, relative_error
from torch import Tensor, nn
from zoo import ZOO

from revfx.compiled.partitioner import reports
from revfx.testing import measure_memory


# Compiling C++ takes long: with REVFX_DEEP=12 all programs go as deep, and through inductor too.
ALL_DEEP = int(os.environ.get("REVFX_DEEP", "0"))
SHALLOW, DEEP = 4, ALL_DEEP or 6
BY_INDUCTOR = ("additive",)
MEASURED = ("momentum", "additive", "conv+BN")
OF_EACH_SORT = (
    *("affine exp", "momentum", "four streams", "cat/split per block", "masked by where", "side inputs", "two stages"),
    "transformer",
)
CAST = ("affine exp", "momentum", "side inputs", "transformer")  # what casts other operators than the rest
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


def stock(inner: str) -> Compile:
    """What stores as without revfx: torch's own compiler, and where eager kernels run, plain autograd."""
    return lambda model: torch.compile(model, options=QUICK) if inner == "inductor" else model


def by_revfx(inner: str) -> Compile:
    return lambda model: torch.compile(model, backend="revfx", options=INNER[inner])


def inputs_of(name: str, rows: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(3)
    made = ZOO[name][1](rows)
    return [t.to(dtype).requires_grad_() if t.is_floating_point() else t for t in made]


def loss(model: Callable[..., Any], inputs: Sequence[Tensor]) -> Tensor:
    out = model(*inputs)
    return torch.stack([t.square().mean() for t in (out if isinstance(out, tuple) else (out,))]).sum()


def gradients(run: Callable[..., Any], model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of inputs and parameters from one random state, in double precision."""
    torch.manual_seed(1)
    wanted = [*(t for t in inputs if t.requires_grad), *model.parameters()]
    return [g.double() for g in torch.autograd.grad(loss(run, inputs), wanted)]


def trained(compiler: Compile, model: nn.Module, inputs: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """The gradients of a copy of `model`, compiled, and the bytes at the peak of its second step, when all is compiled,
    less those of the parameters' gradients.
    """
    torch.compiler.reset()
    model = copy.deepcopy(model)
    run = compiler(model)
    found = gradients(run, model, inputs)
    theirs = sum(p.numel() * p.element_size() for p in model.parameters())
    return found, measure_memory(lambda: loss(run, inputs)).peak - theirs


@pytest.mark.parametrize("name", deep_but(OF_EACH_SORT, ZOO))
def test_gradients_are_plain_autograds(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = ZOO[name][0](SHALLOW).double(), inputs_of(name, ROWS, torch.float64)
    plain = copy.deepcopy(model)
    want = gradients(plain, plain, inputs)
    for inner in INNER if ALL_DEEP else ("aot_eager",):
        with reports() as found:
            got, _ = trained(by_revfx(inner), model, inputs)
        assert relative_error(got, want) < TOLERANCE
        assert any(report.regions for report in found)


@pytest.mark.parametrize(
    ("name", "dtype"),
    deep_but(
        [*((name, "float32") for name in OF_EACH_SORT), *((name, "autocast") for name in CAST)],
        itertools.product(ZOO, ("float32", "bfloat16", "autocast")),
    ),
)
def test_by_eager_kernels_all_is_as_it_was_to_the_last_bit(name: str, dtype: str) -> None:
    """As in torch's own "aot_eager", which under autocast casts a weight of several functions once for each."""
    torch.manual_seed(0)
    streams = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    model, inputs = ZOO[name][0](SHALLOW).to(streams), inputs_of(name, ROWS, streams)
    found: list[list[Tensor]] = []
    for backend, options in (("aot_eager", None), ("revfx", INNER["aot_eager"])):
        torch.compiler.reset()
        mine = copy.deepcopy(model)
        compiled = torch.compile(mine, backend=backend, options=options)
        run = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast")(compiled)
        with reports() as regions:
            found.append([*gradients(run, mine, inputs), *gradients(run, mine, inputs), *mine.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert any(report.regions for report in regions)


@pytest.mark.parametrize("name", deep_but(MEASURED, ZOO))
def test_memory_is_flat_and_single_precision_as_good_as_torchs(name: str) -> None:
    torch.manual_seed(0)
    models = {depth: ZOO[name][0](depth) for depth in (SHALLOW // 2, SHALLOW, DEEP)}
    inputs, exact = (inputs_of(name, MANY_ROWS, dtype) for dtype in (torch.float32, torch.float64))
    plain = copy.deepcopy(models[SHALLOW]).double()
    want = gradients(plain, plain, exact)

    by_inductor = ALL_DEEP or name in BY_INDUCTOR
    # torch keeps as much for each layer: from what it grows by from 2 to 4 follows what it grows by further up
    theirs = stock("inductor" if by_inductor else "aot_eager")
    _, low = trained(theirs, models[SHALLOW // 2], inputs)
    stocks, high = trained(theirs, models[SHALLOW], inputs)
    growth = (high - low) * (DEEP - SHALLOW) // (SHALLOW - SHALLOW // 2)
    # eager kernels are what a step of plain eager rounds by too: torch's partitioner takes other ones for norms
    eager = gradients(models[SHALLOW], models[SHALLOW], inputs)
    error = max(relative_error(eager, want), relative_error(stocks, want) if by_inductor else 0.0)
    for inner in INNER if ALL_DEEP else ("inductor",) if by_inductor else ("aot_eager",):
        ours, low = trained(by_revfx(inner), models[SHALLOW], inputs)
        _, high = trained(by_revfx(inner), models[DEEP], inputs)
        print(
            f"{name}, {inner}: growth {(high - low) / growth:.2%}, fp32 error {relative_error(ours, want) / error:.2f}"
        )
        assert high - low < (0.03 if by_inductor else 0.04) * growth  # the codes, by eager kernels
        assert relative_error(ours, want) < 2 * error

"""Converted models in programs that inductor compiles: right, and flat in memory, as blocks are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled import fresh as fresh
from helpers import TOLERANCE, leaf, loss_of, mlp, mlps, relative_error
from test_block_compiled import QUICK, partitioners
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from ways import Plain

import revfx
from revfx.testing import measure_memory


def chain(depth: int = 3, width: int = 4) -> Plain:
    return Plain(mlps(depth, width), mlps(depth, width))


def gradients(call: Any, model: nn.Module, x: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss_of(call(x)), [x, *model.parameters()]))


# --- which partitioner inductor gets
def test_a_converted_model_asks_for_the_partitioner() -> None:
    x = leaf(3, 8)
    inside = nn.Sequential(mlp(8), revfx.convert(chain()), revfx.convert(chain()))
    for call in (revfx.convert(chain()), inside):
        (found,) = partitioners(call, x)
        assert isinstance(found, revfx.ReversiblePartitioner)


def test_none_where_nothing_is_to_be_freed() -> None:
    x = leaf(3, 8)
    assert partitioners(chain(), x) == [None]
    converted = revfx.convert(chain())
    made = type(converted)(mlps(2), mlps(2))  # by its class: it runs plainly
    assert partitioners(made, x) == [None]


# --- what comes of it
def test_gradients_and_memory() -> None:
    model, x = chain(4, 16), leaf(256, 32)
    run = torch.compile(revfx.convert(model), fullgraph=True, options=QUICK)
    assert relative_error(gradients(run, model, x), gradients(chain_of(model), model, x)) < TOLERANCE
    ours, plain = (measure_memory(lambda call=call: call(x).square().mean()).kept for call in (run, chain_of(model)))
    assert ours < 0.25 * plain, (ours, plain)  # of four layers: the output, and little besides


def chain_of(model: Plain) -> Plain:
    """The same functions in a model that was not converted."""
    return Plain(model.f, model.g)


def test_blocks_that_compile_by_themselves_share_their_code() -> None:
    counts: list[int] = []
    for convert in (lambda m: m, revfx.convert):
        torch.compiler.reset()
        model = nn.Sequential(*(convert(chain(1)) for _ in range(3)))
        counter = CompileCounter()
        for block in model:
            block.compile(backend=counter)
        with torch.no_grad():
            model(torch.randn(3, 8))
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] == 1


@pytest.mark.parametrize("strict", [True, False])
def test_it_is_exported_as_plain_code(strict: bool) -> None:
    model, x = chain(), torch.randn(3, 8)
    exported = torch.export.export(revfx.convert(model), (x,), strict=strict).module()
    assert relative_error(exported(x), model(x)) < TOLERANCE

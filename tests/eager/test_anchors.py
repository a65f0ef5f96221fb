"""Anchors: every so many steps a cut is kept, which bounds memory and drift without changing the forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import TOLERANCE, relative_error
from torch import Tensor, nn
from zoo import ZOO, Additive

import revfx
from revfx.compiled.partitioner import reports
from revfx.testing import assert_same_grads, measure_memory


DEPTH, WIDTH = 24, 32
UNIT = 512 * WIDTH * 4  # bytes of both streams


def block(depth: int, every: int | None) -> Callable[[Tensor], Tensor]:
    """A chain by `rev_block` as a function of both streams side by side."""
    torch.manual_seed(0)
    wishes: dict[str, Any] = {"exact": False, "anchor_every": every}
    chain = revfx.RevBlock(lambda: nn.Linear(WIDTH // 2, WIDTH // 2), lambda: nn.Tanh(), depth, **wishes)
    return lambda x: torch.cat(chain(*x.chunk(2, -1)), -1)


def converted(depth: int, every: int | None) -> Any:
    return revfx.convert(Additive(depth), exact=False, anchor_every=every)


def kept(model: Callable[[Tensor], Tensor]) -> float:
    """Units of both streams that a forward keeps."""
    x = torch.randn(512, WIDTH, requires_grad=True)
    return measure_memory(lambda: model(x).square().mean()).kept / UNIT


def test_memory_of_a_block_grows_with_the_number_of_anchors() -> None:
    bare = kept(block(DEPTH, None))
    for every, anchors in ((4, 5), (8, 2), (DEPTH, 0)):
        assert kept(block(DEPTH, every)) - bare == pytest.approx(anchors, abs=0.1)


def test_memory_of_a_converted_model_grows_with_the_number_of_anchors() -> None:
    bare = kept(converted(DEPTH, None))
    for every, anchors in ((8, 5), (16, 2), (2 * DEPTH, 0)):
        assert kept(converted(DEPTH, every)) - bare == pytest.approx(anchors, abs=0.1), "two lines for each layer"


@pytest.mark.parametrize("every", [1, 3, 100])
@pytest.mark.parametrize("name", ["additive", "momentum", "leapfrog", "dropout", "shared weights"])
def test_gradients_are_plain_autograds(name: str, every: int, fp64: None) -> None:
    build, inputs = ZOO[name]
    model = build(6)
    assert_same_grads(revfx.convert(model, anchor_every=every), model, [t.requires_grad_() for t in inputs(8)])


def amplifying(depth: int, every: int | None) -> tuple[nn.Module, nn.Module]:
    """Couplings whose functions amplify rounding several times each, and the same with anchors."""
    torch.manual_seed(0)
    model = Additive(depth)
    for p in model.parameters():
        p.data.mul_(2.0)
    return model, revfx.convert(model, exact=False, anchor_every=every)


def test_rounding_grows_only_from_one_anchor_to_the_next() -> None:
    x = torch.randn(16, WIDTH, requires_grad=True)
    errors: list[float] = []
    for every in (1, None):
        model, reversible = amplifying(DEPTH, every)
        wanted = [x, *model.parameters()]
        with torch.random.fork_rng():
            got = torch.autograd.grad(reversible(x).square().mean(), wanted)
        errors.append(relative_error(got, torch.autograd.grad(model(x).square().mean(), wanted)))
    anchored, bare = errors
    assert anchored == 0.0, "every entry is kept, so each step is run again on the very tensors"
    assert bare > 1e-7


QUICK: dict[str, dict[str, Any]] = {"aot_eager": {"inner": "aot_eager"}, "inductor": {"cpp.simdlen": 1}}


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.deep)])
def test_a_compiled_graph_keeps_them_too(inner: str, fp64: None) -> None:
    torch.compiler.reset()
    model, x = Additive(6), torch.randn(8, WIDTH, requires_grad=True)
    run = torch.compile(model, backend="revfx", options={**QUICK[inner], "anchor_every": 3})
    with reports() as found:
        got = torch.autograd.grad(run(x).square().mean(), [x, *model.parameters()])
    (region,) = found[0].regions
    assert region.kept_cuts == 2 + 3
    assert relative_error(got, torch.autograd.grad(model(x).square().mean(), [x, *model.parameters()])) < TOLERANCE
    torch.compiler.reset()


def test_convert_by_dynamo_passes_them_on(fp64: None) -> None:
    torch.compiler.reset()
    model, x = Additive(6), torch.randn(8, WIDTH, requires_grad=True)
    reversible: Any = revfx.convert(model, capture="dynamo", anchor_every=4)
    assert_same_grads(reversible, model, [x])
    assert reversible.revfx.kept_cuts == 2 + 2
    torch.compiler.reset()


def test_rev_block_without_a_backend_of_ours_is_cut_there(fp64: None) -> None:
    torch.compiler.reset()
    chain, x = block(6, 2), torch.randn(8, WIDTH, requires_grad=True)
    run = torch.compile(chain, backend="aot_eager", fullgraph=True)
    assert (
        relative_error(
            torch.autograd.grad(run(x).square().mean(), [x]), torch.autograd.grad(chain(x).square().mean(), [x])
        )
        < TOLERANCE
    )
    torch.compiler.reset()


@pytest.mark.parametrize("every", [0, -1, True, 2.0])
def test_what_is_no_number_of_steps_is_refused(every: Any) -> None:
    for make in (
        lambda: revfx.convert(Additive(2), anchor_every=every),
        lambda: revfx.RevBlock(nn.Tanh, nn.Tanh, 2, anchor_every=every),
        lambda: revfx.ReversiblePartitioner(anchor_every=every),
    ):
        with pytest.raises(ValueError, match=r"`anchor_every=.*` must be a positive whole number"):
            make()

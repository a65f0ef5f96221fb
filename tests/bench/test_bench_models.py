"""The models of the bench are reversible, repeatable, and what their lists of f and g say."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same_as_stored

import revfx
from revfx.bench.models import MODELS, BenchModel, Coupling
from revfx.testing import measure_memory


BATCH = 8
models = pytest.mark.parametrize("bench", MODELS.values(), ids=list(MODELS))


@models
def test_converted_memory_does_not_grow_from_4_to_16_blocks_and_plain_memory_does(bench: BenchModel) -> None:
    plain: list[int] = []
    ours: list[int] = []
    for depth in (4, 16):
        inputs = bench.inputs(BATCH)
        model = bench.make(depth)
        plain.append(measure_memory(lambda m=model, x=inputs: bench.loss(m(*x))).kept)
        converted = revfx.convert(model, exact=False)
        ours.append(measure_memory(lambda m=converted, x=inputs: bench.loss(m(*x))).kept)
    per_block = (plain[1] - plain[0]) / 12
    assert plain[1] > 2.5 * plain[0]
    assert ours[1] - ours[0] < 0.02 * 12 * per_block


@models
def test_gradients_of_the_converted_model_are_plain_ones(bench: BenchModel) -> None:
    model = revfx.convert(bench.make(4).double())
    inputs = [t.double() if t.is_floating_point() else t for t in bench.inputs(BATCH)]
    assert_same_as_stored(model, inputs, bench.loss)


@models
def test_weights_and_inputs_are_the_same_each_time_and_draw_nothing_from_the_program(bench: BenchModel) -> None:
    before = torch.get_rng_state()
    first, second = bench.make(4).state_dict(), bench.make(4).state_dict()
    assert list(first) == list(second) and all(torch.equal(t, second[name]) for name, t in first.items())
    assert all(torch.equal(a, b) for a, b in zip(bench.inputs(BATCH), bench.inputs(BATCH), strict=True))
    assert all(len(t) == BATCH for t in bench.inputs(BATCH))
    assert torch.equal(before, torch.get_rng_state())


@models
def test_f_and_g_make_the_same_model(bench: BenchModel) -> None:
    model, inputs = bench.make(4), bench.inputs(BATCH)
    if bench.otherwise:
        assert len(model.enter(*inputs)) == 3, "a flow carries its log-determinant"
        return
    a, b = model.enter(*inputs)
    couplings = [block for block in model.blocks if isinstance(block, Coupling)]
    assert len(couplings) == 4
    for block in couplings:
        a = a + block.f(b)
        b = b + block.g(a)
    torch.testing.assert_close(model.leave(a, b), model(*inputs))


def test_a_flow_s_log_determinant_is_that_of_its_jacobian() -> None:
    flow = MODELS["flow"].make(2).double()
    (x,) = MODELS["flow"].inputs(1)
    x = x.double()

    def outputs(x: torch.Tensor) -> torch.Tensor:
        state = flow.enter(x[None])
        for block in flow.blocks:
            state = block(*state)
        return torch.cat(state[:2], -1)[0]

    jacobian = torch.autograd.functional.jacobian(outputs, x[0])
    z = outputs(x[0])
    normal = -0.5 * (z.square() + torch.tensor(2 * torch.pi).log()).sum()
    torch.testing.assert_close(flow(x)[0] - normal, torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-5, atol=1e-5)

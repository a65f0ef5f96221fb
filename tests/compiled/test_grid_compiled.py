"""`exact` in compiled graphs: over eager kernels bit for bit what eager mode gives, elsewhere equal or an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from compiled import QUIET
from helpers import deep_but
from torch import Tensor, nn
from zoo import ZOO, Additive, D, mlp, vectors

import revfx
from revfx.compiled.partitioner import reports
from revfx.testing import measure_memory, store_activations


pytestmark = QUIET
BITWISE = ("affine exp", "two stages")
LIKE_OTHERS = ("half per block", "four streams", "in place", "leapfrog", "channel shuffle", "transformer")


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


def compiled(model: Any, **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="revfx", options={"inner": "aot_eager", "grid": 14, **options})


def gradients(
    call: Callable[..., Any], model: nn.Module, inputs: Sequence[Tensor], autocast: bool = False
) -> list[Any]:
    """Outputs and gradients of one step, drawn from one seed."""
    inputs = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    torch.manual_seed(1)
    with torch.autocast("cpu", enabled=autocast):
        out = call(*inputs)
    outputs = out if isinstance(out, tuple) else (out,)
    loss = sum((t.float().sin().mean() for t in outputs), torch.zeros(()))
    wanted = [*(x for x in inputs if x.requires_grad), *model.parameters()]
    return [*outputs, *torch.autograd.grad(loss, wanted, allow_unused=True)]


def same(got: Sequence[Any], want: Sequence[Any]) -> bool:
    pairs = list(zip(got, want, strict=True))
    return all((g is None) == (w is None) for g, w in pairs) and all(
        torch.equal(g, w) for g, w in pairs if g is not None
    )


@pytest.mark.parametrize("name", deep_but(BITWISE, (*BITWISE, *LIKE_OTHERS)))
def test_over_eager_kernels_it_is_what_eager_mode_gives(name: str) -> None:
    make, inputs_of = ZOO[name]
    model, inputs = make(4), inputs_of(4)
    with reports() as found:
        got = gradients(compiled(model), model, inputs)
    with store_activations():
        assert same(got, gradients(revfx.convert(model, grid=14), model, inputs))
    assert found[0].regions and all(r.kept_cuts == 2 for r in found[0].regions)


@pytest.mark.deep
@pytest.mark.parametrize(
    ("name", "autocast"),
    [("momentum", False), ("momentum", True), ("conv+BN", True), ("transformer", True), ("dropout", False)],
)
def test_it_is_what_keeping_every_cut_gives(name: str, autocast: bool) -> None:
    make, inputs_of = ZOO[name]
    model, inputs = make(6), inputs_of(4)
    want = gradients(compiled(model, anchor_every=1), model, inputs, autocast)
    torch.compiler.reset()
    assert same(gradients(compiled(model), model, inputs, autocast), want)


class Leaking(nn.Module):
    """Couplings of a velocity that loses a tenth in each: a number here, which as an attribute would be no constant."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, a: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        for f in self.f:
            v = v * 0.9 + f(a).tanh()
            a = a + v
        return a, v


def test_bits_are_kept_of_any_number_of_rows() -> None:
    """How far the bits are padded to whole bytes is a remainder of the size, which is not fixed."""
    model = Leaking()
    options: Any = {"inner": "aot_eager", "grid": 14}
    for rows in (4, 5):
        inputs = [torch.randn(rows, 4) for _ in range(2)]
        torch.compiler.reset()
        want = gradients(compiled(model), model, inputs)
        torch.compiler.reset()
        with reports() as found:
            got = gradients(torch.compile(model, backend="revfx", dynamic=True, options=options), model, inputs)
        assert same(got, want)
        assert found[0].regions


def test_convert_by_dynamo_and_a_block_inside_a_compiled_model() -> None:
    model, inputs = Additive(4), vectors(4)
    with store_activations():
        want = gradients(revfx.convert(model, grid=14), model, inputs)
    assert same(gradients(revfx.convert(model, grid=14, capture="dynamo"), model, inputs), want)

    block = revfx.RevBlock(mlp, mlp, 4, grid=14)
    x = [torch.randn(4, D) for _ in range(2)]
    with store_activations():
        want = gradients(block, block, x)
    doors: list[dict[str, Any]] = [{"backend": "revfx", "options": {"inner": "aot_eager"}}, {"backend": "aot_eager"}]
    for door in doors:
        torch.compiler.reset()
        assert same(gradients(torch.compile(block, fullgraph=True, **door), block, x), want)


@pytest.mark.deep
def test_under_inductor_it_is_equal_to_rounding_or_raises() -> None:
    model, inputs = Additive(3), vectors(4)
    with store_activations():
        want = gradients(revfx.convert(model, grid=14), model, inputs)
    with reports() as found:
        call = torch.compile(model, backend="revfx", options={"grid": 14, "cpp.simdlen": 1})
        try:
            got = gradients(call, model, inputs)
        except RuntimeError as error:
            assert "is not bit for bit the forward's" in str(error)
        else:
            assert all((g - w).norm() < 1e-3 * w.norm() for g, w in zip(got, want, strict=True))
    assert found[0].regions


@pytest.mark.deep
def test_memory_is_flat_for_additive_couplings_and_a_bit_per_element_for_momentum() -> None:
    x = torch.randn(256, 2 * D, requires_grad=True)

    def kept(name: str, depth: int) -> int:
        torch.compiler.reset()
        call = compiled(ZOO[name][0](depth))
        return measure_memory(lambda: sum((t.square().mean() for t in _tuple(call(x))), torch.zeros(()))).kept

    assert kept("additive", 8) - kept("additive", 4) <= 4 * 64
    assert kept("momentum", 8) - kept("momentum", 4) <= 4 * (x.numel() / 8 + 128)


def _tuple(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def test_what_leaves_the_range_raises() -> None:
    call, (x,) = compiled(Additive(3)), vectors(4)
    call(x.requires_grad_()).sum().backward()
    with pytest.raises(RuntimeError, match=r"grid=14: a value at .*zoo\.py:\d+ is not finite or not below 1024"):
        call((x.detach() * 1e4).requires_grad_()).sum().backward()
    with pytest.raises(RuntimeError, match="is not finite"):
        call((x.detach() * float("nan")).requires_grad_()).sum().backward()


def test_what_has_no_exact_form_is_reported() -> None:
    for model, reason in ((Additive(3).bfloat16(), "no room for a grid"), (ZOO["masked by where"][0](3), "where")):
        torch.compiler.reset()
        x = torch.randn(4, 2 * D, dtype=next(model.parameters()).dtype, requires_grad=True)
        with reports() as found:
            compiled(model)(x)
        assert not found[0].regions and any(reason in str(r) for r in found[0].refusals)


def test_a_changed_grid_is_another_program() -> None:
    assert revfx.ReversiblePartitioner(grid=14).uuid() != revfx.ReversiblePartitioner(grid=12).uuid()
    assert revfx.ReversiblePartitioner(grid=14).uuid() == revfx.ReversiblePartitioner(grid=14).uuid()
    with pytest.raises(ValueError, match="`exact=True`: inductor's kernels may round"):
        revfx.ReversiblePartitioner(exact=True)
    with pytest.raises(ValueError, match="must be None, or the k of a grid"):
        revfx.ReversiblePartitioner(grid=0)

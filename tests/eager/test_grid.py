"""`grid`: gradients are bitwise those of ordinary storage, at any depth, and whoever leaves the grid is told."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grids import Affine, WithDropout, assert_bitwise, gradients
from helpers import deep_but, unseen
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import (
    Additive,
    AffineSigmoid,
    CatSplit,
    ChannelShuffle,
    ConvBN,
    D,
    Dropout,
    FourStreams,
    HalfPerBlock,
    InPlace,
    Leapfrog,
    Midpoint,
    Momentum,
    SharedWeights,
    SideInputs,
    Slices,
    TwoStages,
    images,
    mlp,
    tokens,
    vectors,
    vectors_and_context,
)

import revfx
from revfx.errors import RangeError, RegenerationError, RevfxWarning
from revfx.testing import Memory, measure_memory, store_activations


CHAINS: dict[str, Callable[[int], nn.Module]] = {"additive": Additive, "affine": Affine, "momentum": Momentum}


# 1,000: `python tests/support/measure.py exact`; 500 by blocks below
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BLOCKS = [("RevBlock", 10), ("rev_block", 50), ("rev_block", 500)]
CASES = [(10, False), (10, True), (50, True)]
EACH = [(name, *case) for name in CHAINS for case in CASES]


@pytest.mark.parametrize("name, depth, autocast", deep_but([c for c in EACH if c[1:] == (10, True)], EACH))
def test_every_gradient_of_a_chain_is_the_same_to_the_bit(name: str, depth: int, autocast: bool) -> None:
    model = CHAINS[name](depth)
    converted: Any = revfx.convert(model, grid=14)
    assert assert_bitwise(converted, vectors(4), autocast) > depth
    assert converted.revfx.kept_cuts == 2, "the first and the last"


@pytest.mark.parametrize("depth, autocast", deep_but(CASES[:2], CASES))
def test_every_gradient_of_a_transformer_with_dropout_is_the_same_to_the_bit(depth: int, autocast: bool) -> None:
    converted: Any = revfx.convert(WithDropout(depth), grid=14)
    assert_bitwise(converted, tokens(2), autocast)
    assert converted.revfx.kept_cuts == 2


@pytest.mark.parametrize("way, depth", deep_but(BLOCKS[:2], BLOCKS))
@pytest.mark.parametrize(
    "dtype",
    deep_but(("autocast",), (torch.float32, torch.float64, torch.bfloat16, "autocast")),
    ids=str,
)
def test_blocks_are_the_same_to_the_bit(way: str, depth: int, dtype: Any) -> None:
    block = revfx.RevBlock(lambda: nn.Sequential(mlp(), nn.Dropout(0.1)), mlp, depth, grid=14)
    autocast = dtype == "autocast"
    dtype = torch.float32 if autocast else dtype
    block.to(dtype)
    inputs = [torch.randn(4, D, dtype=dtype) for _ in range(2)]
    if way == "RevBlock":
        assert assert_bitwise(block, inputs, autocast) == 4 + 8 * depth
        return
    assert isinstance(block.f, nn.ModuleList) and isinstance(block.g, nn.ModuleList)
    f, g = block.f, block.g
    assert assert_bitwise(lambda a, b: revfx.rev_block(a, b, f, g, depth, grid=12), inputs, autocast) == 4
    a, b = inputs
    stored = [revfx.rev_block(a, b, f.eval(), g.eval(), depth, is_training=t, grid=12) for t in (False, True)]
    assert all(torch.equal(*pair) for pair in zip(*stored, strict=True))


@pytest.mark.parametrize("dtype", deep_but((torch.float32, torch.bfloat16), DTYPES), ids=str)
@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (InPlace, vectors), (CatSplit, vectors), (HalfPerBlock, vectors), (AffineSigmoid, vectors),
        (Slices, vectors), (FourStreams, vectors), (Leapfrog, vectors), (Midpoint, vectors), (Dropout, vectors),
        (SharedWeights, vectors), (SideInputs, vectors_and_context), (ChannelShuffle, vectors), (ConvBN, images),
        (TwoStages, images), (lambda n: Momentum(n, 0.6), vectors),
    ],
    ids=lambda x: getattr(x, "__name__", "momentum 0.6"),
)  # fmt: skip
def test_the_zoo_is_the_same_to_the_bit(make: Any, inputs: Any, dtype: torch.dtype) -> None:
    model = make(6).to(dtype)
    converted: Any = revfx.convert(model, grid=12)
    assert_bitwise(converted, [x.to(dtype) if x.is_floating_point() else x for x in inputs(4)])
    assert converted.revfx.plans and all(p.regions for p in converted.revfx.plans)


def test_the_forward_on_a_grid_is_the_plain_one_but_for_the_rounding() -> None:
    model, (x,) = Additive(12), vectors(32)
    plain, ours = gradients(model, [x], store=False), gradients(revfx.convert(model, grid=14), [x], store=False)
    for p, e in zip(plain, ours, strict=True):
        assert (p - e).norm() < 3e-3 * p.norm()
    assert any(not torch.equal(p, e) for p, e in zip(plain, ours, strict=True))


def test_it_computes_the_same_without_gradients_and_when_a_part_is_frozen() -> None:
    model, (x,) = Additive(4), vectors(4)
    converted: Any = revfx.convert(model, grid=14)
    want = converted(x)
    with torch.no_grad():
        assert torch.equal(converted(x), want)
    model.f.requires_grad_(False)
    assert torch.equal(converted(x), want)
    assert not torch.equal(model(x), want)


def test_exact_zeros_are_regenerated_rather_than_kept() -> None:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.chain = nn.Linear(2 * D, 2 * D), Additive(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.chain(torch.relu(self.stem(x)))

    converted: Any = revfx.convert(Stem(), grid=14)
    assert_bitwise(converted, vectors(16))
    assert converted.revfx.kept_cuts == 2


# --- memory
def growth(make: Callable[[int], nn.Module], short: int, long: int, **options: Any) -> float:
    """Bytes kept per layer more."""
    x = torch.randn(64, 2 * D, requires_grad=True)

    def kept(depth: int) -> Memory:
        model = revfx.convert(make(depth), **options)
        return measure_memory(lambda: sum((t.square().mean() for t in pytree.tree_leaves(model(x))), torch.zeros(())))

    return (kept(long).kept - kept(short).kept) / (long - short)


def test_additive_couplings_keep_nothing_more() -> None:
    assert growth(Additive, 4, 24, grid=14) < 1024, "bytes of a few elements of what two functions give"


def test_momentum_keeps_a_bit_and_affine_couplings_two_per_element() -> None:
    elements = 64 * 2 * D
    assert growth(Momentum, 4, 16, grid=14) <= elements / 8 + 1024
    assert growth(Affine, 4, 16, grid=14) <= elements / 4 + 2048, "two bits for a, one for b, of half as many elements"


# --- what does not fit
def test_what_leaves_the_range_is_named_with_a_grid_that_fits() -> None:
    converted, (x,) = revfx.convert(Additive(4), grid=14), vectors(4)
    with pytest.raises(RangeError, match=r"grid=14: `.*` \(.*\) reaches 1200, and .* below 1024 .*use grid=12"):
        converted(x / x.abs().max() * 1200)
    with store_activations(), pytest.raises(RangeError):
        converted(x / x.abs().max() * 1200)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(RangeError, match="is not finite"):
            converted(torch.cat([x, torch.full_like(x[:1], bad)]))
    assert_bitwise(converted, [x])


def test_a_layer_that_leaves_the_range_is_named() -> None:
    block = revfx.RevBlock([nn.Identity(), lambda t: t * 3000], [nn.Identity(), nn.Identity()], 2, grid=14)
    with pytest.raises(RangeError, match=r"`y1_1` \(layer 1\) reaches"):
        block(torch.ones(2, 3, requires_grad=True), torch.ones(2, 3))


def test_factors_without_a_bound_are_refused_with_the_reason() -> None:
    class Unbounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleList(mlp() for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            for net in self.nets:
                a, b = b * torch.exp(net(a)), a
            return torch.cat([a, b], -1)

    converted: Any = revfx.convert(Unbounded(), grid=14)
    with pytest.warns(RevfxWarning, match="no exact inverse: its factor `exp.*` has no known lower bound"):
        converted(*vectors(4)).sum().backward()


def test_a_users_rule_that_does_not_say_what_is_added_is_refused() -> None:
    class Thresholds(Additive):
        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            for f in self.f:
                a, b = torch.nn.functional.threshold(b, -1e9, 0.0), a + f(b)
            return torch.cat([a, b], -1)

    from revfx.rules import Inverse, arguments, register_inverse, unregister_inverse

    @register_inverse(torch.nn.functional.threshold)
    def _(node: Any) -> Any:
        (x,) = arguments(node, "input")
        yield Inverse(x, lambda y: y)

    try:
        with pytest.warns(RevfxWarning, match="its rule does not say what the operation adds"):
            revfx.convert(Thresholds(4), grid=14)(*vectors(4))
    finally:
        unregister_inverse(torch.nn.functional.threshold)


def test_a_function_that_does_not_repeat_itself_is_caught_by_the_checksum() -> None:
    calls = unseen()

    def noisy(t: Tensor) -> Tensor:
        calls.values.append(1)
        return t.tanh() + 1e-4 * len(calls.values)

    block = revfx.RevBlock([noisy] * 3, [torch.tanh] * 3, 3, grid=14)
    y = block(torch.randn(4, D, requires_grad=True), torch.randn(4, D))
    with pytest.raises(RegenerationError, match=r"`f of layer 2` .* when it is computed again"):
        (y[0] + y[1]).sum().backward()


# --- blocks
def test_the_inverse_of_a_block_gives_the_rounded_inputs() -> None:
    block = revfx.RevBlock(mlp, mlp, 50, grid=14)
    x = [torch.randn(4, D), torch.rand(4, D) * 1e-4]
    for got, given in zip(block.inverse(*block(*x)), x, strict=True):
        assert torch.equal(got, (given * 2**14).round() / 2**14)
    assert "grid=14" in repr(block)


def test_streams_of_two_dtypes_keep_them() -> None:
    class F(nn.Module):
        def __init__(self, before: torch.dtype, after: torch.dtype) -> None:
            super().__init__()
            self.linear, self.after = nn.Linear(D, D, dtype=before), after

        def forward(self, t: Tensor) -> Tensor:
            return self.linear(t).to(self.after).tanh()

    half, single = torch.bfloat16, torch.float32
    block = revfx.RevBlock([F(half, single)] * 3, [F(single, half)] * 3, 3, grid=14)
    inputs = [torch.randn(4, D), torch.randn(4, D).to(half)]
    assert [y.dtype for y in block(*inputs)] == [single, half]
    assert_bitwise(block, inputs)


def test_a_function_that_widens_its_half_precision_stream_is_refused() -> None:
    block = revfx.RevBlock([lambda t: t.float()], [lambda t: t], 1, grid=14)
    x = torch.randn(4, D, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"returned torch\.float32 for a stream of torch\.bfloat16"):
        block(x, x)


@pytest.mark.parametrize("grid", [0, 23, "14", True])
def test_wrong_grids_are_refused(grid: Any) -> None:
    with pytest.raises(ValueError, match="must be None, or the k of a grid"):
        revfx.RevBlock(mlp, mlp, 2, grid=grid)
    with pytest.raises(ValueError, match="must be None, or the k of a grid"):
        revfx.rev_block(torch.ones(2), torch.ones(2), torch.tanh, torch.tanh, grid=grid)


def test_anchors_and_copies_and_transforms_go_with_it() -> None:
    import copy
    import pickle

    model, (x,) = Momentum(12), vectors(4)
    converted: Any = revfx.convert(model, grid=14, anchor_every=5)
    assert_bitwise(converted, [x])
    assert converted.revfx.kept_cuts > 2
    want = converted(x)
    for other in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert all(torch.equal(a, b) for a, b in zip(other(x), want, strict=True))
    got = torch.func.vmap(converted)(x.unsqueeze(1))  # runs as it was written
    assert torch.allclose(got[0].squeeze(1), want[0], atol=1e-2)


def test_the_rewritten_program_says_what_is_kept() -> None:
    converted: Any = revfx.convert(Momentum(3), grid=14)
    converted(*vectors(2))
    assert "save uint8[1, 8]" in converted.revfx.code and "to_grid" in converted.revfx.code


# --- what a review found
@pytest.mark.parametrize("d", [5, 6, 9])
@pytest.mark.parametrize("rows", [3, 512])
def test_streams_at_addresses_that_are_not_aligned(d: int, rows: int) -> None:
    class Chunks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.ModuleList(nn.Linear(d, d) for _ in range(12))

        def forward(self, x: Tensor) -> Tensor:
            for f in self.f:
                a, b = x.chunk(2, -1)
                x = torch.cat([b, a + torch.tanh(f(b))], -1)
            return x

    assert_bitwise(revfx.convert(Chunks(), grid=14), [torch.randn(rows, 2 * d)])


@pytest.mark.parametrize(
    "update",
    [
        lambda r, v: torch.add(r, v, alpha=1.5), lambda r, v: torch.sub(r, v, alpha=1.3),
        lambda r, v: torch.rsub(v, r, alpha=1.5), lambda r, v: torch.lerp(r, v, 1.5),
    ],
)  # fmt: skip
def test_a_product_that_leaves_the_range_raises_though_the_sum_is_back(update: Any) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.ModuleList(nn.Linear(D, D) for _ in range(4))

        def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
            a, b = x.chunk(2, -1)
            for f in self.f:
                a, b = b + f(a).tanh(), update(r, a)
            return a, b

    converted = revfx.convert(Scaled(), grid=14)
    assert_bitwise(converted, [torch.randn(4, 2 * D), torch.randn(4, D)])
    with pytest.raises(RangeError):
        converted(torch.full((4, 2 * D), 780.0, requires_grad=True), torch.full((4, D), -900.0))


@pytest.mark.parametrize(
    "factor",
    [
        lambda s: (torch.sigmoid(s) + 1.5).clamp(max=1.25), lambda s: torch.exp(torch.relu(s) + 0.5).clamp(max=1.5),
        lambda s: (-torch.sigmoid(s) - 1.5).clamp(min=-1.25), lambda s: torch.clamp(s, 1.5, 1.0),
    ],
)  # fmt: skip
def test_factors_beyond_what_they_are_clamped_to(factor: Any) -> None:
    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.ModuleList(nn.Linear(D, D) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            for f in self.f:
                a, b = b, a * factor(f(b))
            return torch.cat([a, b], -1)

    model, inputs = Clamped(), vectors(4)
    assert_bitwise(revfx.convert(model, grid=14), inputs)
    plain, ours = gradients(model, inputs, False), gradients(revfx.convert(model, grid=14), inputs, False)
    assert all((p - e).norm() <= 1e-2 * p.norm() for p, e in zip(plain, ours, strict=True))


@pytest.mark.parametrize(
    "factor", [lambda s: torch.relu(-torch.sigmoid(s)), lambda s: torch.exp(-s.clamp(-745, 0)), lambda s: 1e200 + 0 * s]
)
def test_factors_that_can_not_be_bounded_are_refused(factor: Any) -> None:
    class Extreme(Additive):
        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            for f in self.f:
                a, b = b, a / factor(f(b))
            return torch.cat([a, b], -1)

    with pytest.warns(RevfxWarning, match="nothing reversible"):
        revfx.convert(Extreme(4), grid=14)(*vectors(4))


@pytest.mark.parametrize(
    "update", [lambda a, h: h - a, lambda a, h: -a + h, lambda a, h: a * -1 + h, lambda a, h: a * -1.5 + h]
)
def test_functions_that_see_the_sign_of_zero(update: Any) -> None:
    class Signs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.ModuleList(nn.Linear(D, D) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            for f in self.f:
                a, b = b, update(a, torch.tanh(f(torch.atan2(b, -torch.ones_like(b)))))
            return torch.cat([a, b], -1)

    (x,) = vectors(8)
    x[2:5] = 0
    assert_bitwise(revfx.convert(Signs(), grid=2), [x])


def test_half_precision_streams_that_are_read_between_two_regions() -> None:
    class TwoRegions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.between = Additive(4), Additive(4), nn.Linear(2 * D, 2 * D)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            s = self.first(x).flip(-1)
            return self.second(s), torch.sin(self.between(s))

    model = TwoRegions().bfloat16()
    x = vectors(4)[0].bfloat16()
    converted = revfx.convert(model, grid=12)
    assert [t.dtype for t in converted(x)] == [torch.bfloat16, torch.bfloat16]
    assert_bitwise(converted, [x])


def test_an_empty_batch_and_a_second_conversion() -> None:
    block = revfx.RevBlock(mlp, mlp, 3, grid=14)
    sum(block(torch.randn(0, D, requires_grad=True), torch.randn(0, D))).sum().backward()  # type: ignore[union-attr]
    converted = revfx.convert(Additive(3), grid=14)
    assert revfx.convert(converted) is converted and revfx.convert(converted, grid=14) is converted
    with pytest.raises(ValueError, match="is converted already, with other options"):
        revfx.convert(converted, grid=12)


def test_training_ends_with_the_same_weights_to_the_bit() -> None:
    ends: list[dict[str, Tensor]] = []
    for store in (False, True):
        torch.manual_seed(0)
        model: Any = revfx.convert(TwoStages(4), grid=14)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(10):
            x = images(8)[0]
            with store_activations() if store else contextlib.nullcontext():
                loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ends.append(dict(model.state_dict()))
    assert all(torch.equal(w, ends[1][name]) for name, w in ends[0].items())

"""Couplings on a grid: the round trip gives the very bits, whatever the numbers, or the range check sees it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from revfx.passes.grid import (
    Coupling,
    carrier,
    checked_exact,
    checked_grid,
    checksum,
    limit,
    packed,
    straight,
    to_grid,
    units,
    unpacked,
)


DEFAULT = 14
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 5e-324, 1e-45, -1e-40, 6e-8, 2.0**-15, 3 * 2.0**-15, 1e38, -3e38)


def numbers(most: int) -> st.SearchStrategy[float]:
    """Numbers of every magnitude up to 2^most, and special ones."""
    sized = st.builds(
        lambda m, e, s: s * math.ldexp(m, e), st.floats(0.5, 1), st.integers(-60, most), st.sampled_from((-1, 1))
    )
    return st.one_of(sized, sized, sized, st.sampled_from(SPECIAL))


@st.composite
def tensors(draw: Any, most: int = 12) -> Tensor:
    values = draw(st.lists(numbers(most), min_size=1, max_size=9))
    return torch.tensor(values, dtype=torch.float64).to(draw(st.sampled_from(DTYPES)))


def narrowed(t: Tensor, x: Tensor) -> Tensor:
    """`t` in a dtype whose sum with x keeps x's, as an arc demands."""
    return t if torch.promote_types(t.dtype, carrier(x.dtype)) == carrier(x.dtype) else t.to(x.dtype)


def in_range(*tensors: Tensor, k: int) -> bool:
    return all(bool(t.abs().amax() < limit(t.dtype, k)) for t in tensors)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


@settings(max_examples=400, deadline=None)
@given(tensors(), tensors(), st.sampled_from((1, 8, DEFAULT, 20)), st.sampled_from((1.0, -1.0)))
def test_sums_come_back_or_leave_the_range(x: Tensor, h: Tensor, k: int, sign: float) -> None:
    n = min(len(x), len(h))
    x, h = to_grid(x[:n], k), narrowed(h[:n], x)
    coupling = Coupling("add", k, lambda h: h, scale=sign)
    y = coupling(x, h)
    if in_range(x, y, k=k):
        assert same(coupling.inverse(y, h), x)
        assert torch.equal(units(y, k), y * 2.0**k), "it lies on the grid"
    else:
        assert not (
            in_range(x, k=k) and h.isfinite().all() and bool((x.abs() + h.abs()).amax() < limit(x.dtype, k) / 2)
        )


@settings(max_examples=400, deadline=None)
@given(
    tensors(),
    tensors(2),
    st.floats(0.004, 3),
    st.sampled_from((1, 8, DEFAULT)),
    st.booleans(),
    st.booleans(),
    tensors(),
)
def test_products_come_back_with_an_index(
    x: Tensor, c: Tensor, least: float, k: int, reciprocal: bool, negative: bool, h: Tensor
) -> None:
    n = min(len(x), len(c), len(h))
    x, c, h = to_grid(x[:n], k), narrowed(c[:n].abs(), x), narrowed(h[:n], x)
    c = c.clamp(max=1 / least) if reciprocal else c.clamp(min=least)
    c = -c if negative else c
    coupling = Coupling("mul", k, lambda c, h: h, by=0, reciprocal=reciprocal, least=least)
    y = coupling(x, c, h)
    if in_range(x, y, coupling._scaled(x, c, h), k=k):  # pyright: ignore[reportPrivateUsage]
        index = (coupling.index(x, y, c, h),) if coupling.bits else ()
        assert same(coupling.inverse(y, c, h, *index), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.9, -0.5, 1 / 3, 0.25, 0.99999, 1.0000001, 3.0, -17.3, 1 / 255])
def test_products_by_a_number(scale: float, dtype: torch.dtype) -> None:
    coupling = Coupling("mul", DEFAULT, None, scale, least=abs(scale))
    x = torch.arange(-3000, 3000, dtype=dtype) * 2.0**-DEFAULT
    y = coupling(x)
    assert (y - scale * x).abs().max() <= 0.5001 * 2.0**-DEFAULT, "the nearest one"
    index = (coupling.index(x, y),) if coupling.bits else ()
    assert same(coupling.inverse(y, *index), x)


@pytest.mark.parametrize(
    ("least", "bits"), [(1.0, 0), (3.0, 0), (0.999, 1), (0.5, 1), (0.49, 2), (0.25, 2), (0.2, 3), (1 / 256, 8)]
)
def test_how_many_bits_are_kept(least: float, bits: int) -> None:
    coupling = Coupling("mul", DEFAULT, None, by=0, least=least)
    assert coupling.bits == bits
    if bits:
        x = to_grid(torch.randn(1000), DEFAULT)
        c = torch.full((1000,), least)
        index = coupling.index(x, coupling(x, c), c)
        assert index.dtype == torch.uint8 and index.shape == (bits, 125)
        assert same(coupling.inverse(coupling(x, c), c, index), x)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (3, 11), (0,)])
def test_what_was_packed_is_unpacked(bits: int, shape: tuple[int, ...]) -> None:
    index = torch.randint(0, 2**bits, shape)
    planes = packed(index, bits)
    assert planes.shape == (bits, math.ceil(index.numel() / 8))
    assert torch.equal(unpacked(planes, bits, index).long(), index)


def test_gradients_go_straight_through() -> None:
    x, c, h = (to_grid(torch.rand(50, dtype=torch.float64) + 0.5, DEFAULT).requires_grad_() for _ in range(3))
    exact = Coupling("mul", DEFAULT, lambda c, h: h.sin(), by=0, least=0.5)(x, c, h)
    plain = x * c + h.sin()
    assert (exact - plain).abs().max() < 2.0**-DEFAULT
    for got, want in zip(
        torch.autograd.grad(exact.sum(), (x, c, h)), torch.autograd.grad(plain.sum(), (x, c, h)), strict=True
    ):
        assert torch.allclose(got, want, rtol=1e-12)
    assert torch.autograd.grad(to_grid(h, 3).sum(), h)[0].eq(1).all()


@settings(max_examples=300, deadline=None)
@given(tensors(30))
def test_rounding_is_rounding(t: Tensor) -> None:
    k = DEFAULT
    got = to_grid(t, k)
    assert got.dtype == carrier(t.dtype)
    finite = t.isfinite() & (t.abs() < 2.0**100)  # beyond, where it overflows, no range check lets it pass
    assert same(to_grid(got, k)[finite], got[finite]) and not bool(got[~finite].abs().lt(2.0**100).any())
    wide = t.double()[finite]
    assert torch.equal(got.double()[finite], (wide * 2**k).round() / 2**k + 0.0)
    assert not bool((got.eq(0) & got.signbit()).any()), "zeros are positive"


@settings(max_examples=300, deadline=None)
@given(tensors(30), tensors(30))
def test_a_rounded_value_takes_the_place_of_the_plain_one_to_the_bit(plain: Tensor, noise: Tensor) -> None:
    n = min(len(plain), len(noise))
    plain = plain[:n].to(carrier(plain.dtype)).nan_to_num(1.0, 1.0, 1.0)
    off = noise[:n].to(plain.dtype).nan_to_num(0.0).clamp(-0.5, 0.5)
    for k in (3, DEFAULT):
        value = ((plain.double() * 2**k + off.double()).round() / 2**k).to(plain.dtype)
        value = value.where(value.abs() < limit(plain.dtype, k), plain)
        assert torch.equal(straight(plain, value), value)


def test_a_checksum_sees_a_bit_and_the_order_but_not_the_sign_of_zero() -> None:
    for dtype in (torch.float32, torch.float64):
        t = torch.randn(5, 7, dtype=dtype)
        t[2, 3] = 0.0
        want = checksum(t)
        assert torch.equal(want, checksum(t.clone().t().contiguous().t()))
        turned, swapped, bit = t.clone(), t.flip(0), t.clone()
        turned[2, 3] = -0.0
        bit[4, 6] = torch.nextafter(bit[4, 6], torch.tensor(9.0, dtype=dtype))
        assert torch.equal(want, checksum(turned))
        assert not torch.equal(want, checksum(swapped)) and not torch.equal(want, checksum(bit))


def test_what_exact_and_grid_may_be() -> None:
    assert checked_grid(None) is None and checked_grid(1) == 1 and checked_grid(22) == 22
    for wrong in (0, 23, -3, 14.0, "14", True, False):
        with pytest.raises(ValueError, match="must be None, or the k of a grid"):
            checked_grid(wrong)
    assert checked_exact(True, None) and checked_exact(True, 14) and not checked_exact(False, None)
    for wrong in (0, 14, None, "yes"):
        with pytest.raises(ValueError, match="must be True or False"):
            checked_exact(wrong, None)
    with pytest.raises(ValueError, match="what lies on a grid is exact"):
        checked_exact(False, 14)

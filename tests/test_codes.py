"""Codes give back the very bits, whatever the numbers, and are as small as they are said to be."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from revfx import codes
from revfx.codes import WIDTHS, Code, Codec, cheapest, decode, encode
from revfx.layout import flat


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES = ((), (1,), (0, 3), (5,), (7, 13), (2, 3, 4, 5), (64, 1024))


def bits(t: Tensor) -> Tensor:
    t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def pair(shape: tuple[int, ...], dtype: torch.dtype, ratio: float = 0.3) -> tuple[Tensor, Tensor]:
    """A stream, and what the inverse of a coupling gives in its place."""
    x, h = torch.randn(shape, dtype=dtype), ratio * torch.randn(shape, dtype=dtype)
    return x, (x + h) - h


def special(dtype: torch.dtype) -> Tensor:
    """Numbers next to which a distance is hard to tell: both zeros, the smallest ones, the largest, none."""
    info = torch.finfo(dtype)
    least = torch.tensor([1, 2, 3], dtype={2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]).view(dtype)
    sizes = torch.tensor([0.0, info.tiny, 1.0, info.max, torch.inf, torch.nan], dtype=dtype)
    found = torch.cat([sizes, least])
    return torch.cat([found, -found])


def assert_same(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape and torch.equal(bits(got), bits(want))


@pytest.mark.parametrize("dtype", (*FLOATS, torch.complex64, torch.complex128))
@pytest.mark.parametrize("width", WIDTHS)
def test_a_value_comes_back_in_every_width(width: int, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x, predicted = pair(shape, dtype)
        for room, direct in itertools.product((None, (2 * x.numel(), 2 * x.numel())), (False, True)):
            code = encode(x, predicted, width, room, direct=direct)
            assert_same(decode(predicted, code), x)
            assert code.packed is None or 0 <= 8 * code.packed.numel() - bits(x).numel() * width < 4 * width


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", WIDTHS)
def test_any_number_comes_back_from_any_prediction(width: int, dtype: torch.dtype) -> None:
    numbers = special(dtype)
    x, predicted = (t.reshape(-1) for t in torch.meshgrid(numbers, numbers, indexing="ij"))
    for direct in (False, True):
        assert_same(decode(predicted, encode(x, predicted, width, direct=direct)), x)


@pytest.mark.parametrize("fours", (codes.BLOCK, codes.BLOCK + 1, 3 * codes.BLOCK - 1))
@pytest.mark.parametrize("width", WIDTHS)
def test_escapes_are_found_in_many_blocks(width: int, fours: int) -> None:
    """Of which some have none, and one has some at its end only."""
    x = torch.randn(4 * fours)
    predicted = x.clone()
    for at in (-1, -2, 5, 4 * codes.BLOCK - 1):
        bits(predicted)[at] += 100
        bits(predicted)[at - 40] += 1000
    for room, direct in itertools.product((None, (64, 64)), (False, True)):
        code = encode(x, predicted, width, room, direct=direct)
        assert_same(decode(predicted, code), x)
        assert not code.lost


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("width", WIDTHS)
def test_a_prediction_that_is_a_little_off_gives_no_garbage(width: int, dtype: torch.dtype) -> None:
    """As where a kernel jitters: values that cancel to zero stay near to it, and none is NaN or infinite."""
    numbers = special(dtype)
    x = numbers[numbers.isfinite() & (numbers.abs() < 1)]
    steps = torch.arange(-2, 3).repeat_interleave(len(x))
    x = x.repeat(5)
    predicted = (bits(x) + steps.to(bits(x).dtype)).view(dtype)
    x, predicted = x[predicted.isfinite()], predicted[predicted.isfinite()]
    code = encode(x, predicted, width)
    for off in (torch.zeros_like(predicted), -torch.zeros_like(predicted), predicted.nextafter(torch.zeros_like(x))):
        got = decode(off, code)
        assert got.isfinite().all() and (got - x).abs().max() <= 256 * torch.finfo(dtype).tiny


def test_layouts_are_kept() -> None:
    x, predicted = pair((4, 6, 5, 3), torch.float32)
    views = {
        "transposed": lambda t: t.transpose(0, 1),
        "channels last": lambda t: t.to(memory_format=torch.channels_last),
        "with gaps": lambda t: t[..., ::2],
        "a part": lambda t: t[1:, 2:],
    }
    for view in views.values():
        a, b = view(x), view(predicted)
        for p in (b, b.contiguous(), b.clone()):
            assert_same(decode(p, encode(a, p, 2)), a)
    transposed = predicted.transpose(0, 1)
    assert decode(transposed, encode(x.transpose(0, 1), transposed, 2)).stride() == transposed.stride()
    assert flat(transposed).data_ptr() == predicted.data_ptr()


def test_nothing_that_is_given_is_written_to() -> None:
    x, predicted = pair((64, 64), torch.float32)
    before = x.clone(), predicted.clone()
    for width in WIDTHS:
        decode(predicted, encode(x, predicted, width))
        assert torch.equal(x, before[0]) and torch.equal(predicted, before[1])


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 0.6), (torch.bfloat16, 0.5), (torch.float64, 0.65)])
def test_bytes_of_an_additive_coupling(dtype: torch.dtype, most: float) -> None:
    x, predicted = pair((512, 512), dtype)
    width, escapes, far = cheapest(x, predicted)
    assert width is not None
    code = encode(x, predicted, width)
    size = x.numel() * width / 8 + escapes * (2 + 4) + far * (8 + 4 * x.element_size())
    assert code.nbytes == size < most * x.numel()


def test_the_cheapest_is_chosen() -> None:
    x, predicted = pair((64, 64), torch.float32)
    found = {w: encode(x, predicted, w) for w in WIDTHS}
    sizes = {w: code.nbytes + codes.SLOW * code.escapes for w, code in found.items()}
    assert sizes[cheapest(x, predicted)[0] or 0] == min(sizes.values())
    assert cheapest(x, x) == (0, 0, 0)
    assert cheapest(x, torch.randn(64, 64)) == (None, 0, 0), "keeping it takes less"
    noisy = x * (1 + 60 * torch.finfo(torch.float32).eps * torch.randn(64, 64))
    assert cheapest(x, noisy)[0] == 8


# --- what is learnt
def coded(codec: Codec, x: Tensor, predicted: Tensor) -> Code | None:
    return codec.encode(x, predicted) if codec.asks(x) else None


def test_codes_are_measured_in_calls_1_2_4_8_and_where_escapes_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    codec, cheap = Codec(), codes.cheapest

    def counted(x: Tensor, predicted: Tensor) -> tuple[int | None, int, int]:
        measured.append(codec.calls)
        return cheap(x, predicted)

    monkeypatch.setattr(codes, "cheapest", counted)
    x, predicted = pair((64, 64), torch.float32)
    for _ in range(9):
        assert coded(codec, x, predicted) is not None
    assert measured == [1, 2, 4, 8]
    worse = (x + 500) - 500
    assert coded(codec, x, worse) is None, "it would take more than the value"
    assert coded(codec, x, worse) is not None and codec.width == 8, "so it was measured again"
    assert measured == [1, 2, 4, 8, 11]


def test_a_value_without_a_good_inverse_is_kept_and_looked_at_again_later() -> None:
    codec, (x, predicted) = Codec(), pair((64, 64), torch.float32)
    assert coded(codec, x, torch.zeros(64, 64)) is None
    assert coded(codec, x, torch.zeros(64, 64)) is None
    assert not codec.asks(x), "nothing is computed for it"
    assert coded(codec, x, predicted) is not None


@pytest.mark.usefixtures("sizes")
def test_small_values_and_such_as_can_not_be_coded_are_kept() -> None:
    for x in (torch.randn(32, 32), torch.ones(4096, dtype=torch.int64), torch.randn(1)):
        assert not Codec().asks(x)
    assert Codec().asks(torch.randn(33, 32)) and Codec().asks(torch.randn(4096, dtype=torch.complex64))


# --- where the host does not know how many escapes there are
def test_room_is_learnt_and_what_finds_none_is_off_by_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes, "is_counted", lambda t: False)
    codec, (x, predicted) = Codec(), pair((64, 64), torch.float32)
    for _ in range(4):
        code = coded(codec, x, predicted)
        assert code is not None and code.lost is not None and not code.lost
        assert_same(decode(predicted, code), x)
    assert codec.room is not None and codec.room[0] >= 1.5 * cheapest(x, predicted)[1]
    x, predicted = pair((64, 64), torch.float32, ratio=4.0)
    code = coded(codec, x, predicted)
    assert code is not None and code.lost is not None and code.lost > 0
    got = decode(predicted, code)
    assert not torch.equal(got, x) and (got - x).abs().max() < 1e-5
    codec.due = True  # as the end of the backward says
    code = coded(codec, x, predicted)
    assert code is not None and code.lost is not None and not code.lost


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_prediction_that_is_spent_gives_the_same_code(width: int, dtype: torch.dtype) -> None:
    x, predicted = pair((64, 64), dtype)
    code = encode(x, predicted.clone(), width, spent=True)
    assert_same(decode(predicted, code), x)

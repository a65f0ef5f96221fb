"""A codec learns which code is smallest, and how much room its escapes need."""

from __future__ import annotations

import operator

import pytest
import torch
from codes_cases import assert_same
from torch import Tensor

from revfx.codes import WIDTHS, Code, Codec, Prediction, count_escapes, decode, encode
from revfx.codes.codec import ESCAPE_COST


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, ratio: float = 0.3) -> tuple[Tensor, Prediction]:
    """A stream, and what the inverse of a coupling gives in its place."""
    x, h = torch.randn(shape, dtype=dtype), ratio * torch.randn(shape, dtype=dtype)
    return x, Prediction((x + h, h), operator.sub)


def given(t: Tensor) -> Prediction:
    return Prediction((t,))


def coded(codec: Codec, x: Tensor, prediction: Prediction) -> Code | None:
    return codec.encode(x, prediction) if codec.needs_prediction(x) else None


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 0.48), (torch.bfloat16, 0.4), (torch.float64, 0.6)])
def test_bytes_of_an_additive_coupling(dtype: torch.dtype, most: float) -> None:
    """An element of which takes 4, 2 or 8 bytes."""
    x, prediction = pair((512, 512), dtype)
    code = coded(Codec(), x, prediction)
    assert code is not None
    n, escapes = x.numel(), len(code.values)
    assert escapes == count_escapes(x, prediction)[WIDTHS.index(code.width)]
    packed = n * code.width / 8 + escapes * (2 + x.element_size())
    assert packed < code.nbytes == packed + 8 * n / 2048 + 8 + 16 * x.element_size() < most * n


@pytest.mark.usefixtures("sizes")
def test_the_smallest_code_is_chosen() -> None:
    x, prediction = pair((64, 64))
    sizes: dict[int, int] = {}
    for width in WIDTHS:
        code = encode(x, prediction, width)
        sizes[width] = code.nbytes + ESCAPE_COST * len(code.values)
    code = coded(Codec(), x, prediction)
    assert code is not None and sizes[code.width] == min(sizes.values())
    code = coded(Codec(), x, given(x))
    assert code is not None and (code.width, len(code.values)) == (0, 0)
    assert coded(Codec(), x, given(torch.randn(64, 64))) is None, "keeping it takes less"
    noisy = x * (1 + 60 * torch.finfo(torch.float32).eps * torch.randn(64, 64))
    code = coded(Codec(), x, given(noisy))
    assert code is not None and code.width == 8


def test_escapes_are_counted_in_calls_1_2_4_8_and_where_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    codec, count = Codec(), count_escapes

    def noted(x: Tensor, prediction: Prediction) -> list[int]:
        counted.append(codec.calls)
        return count(x, prediction)

    monkeypatch.setattr("revfx.codes.codec.count_escapes", noted)
    x, prediction = pair((64, 64))
    for _ in range(9):
        assert coded(codec, x, prediction) is not None
    assert counted == [1, 2, 4, 8]
    worse = given((x + 500) - 500)
    assert coded(codec, x, worse) is None, "it would take more than the value"
    code = coded(codec, x, worse)
    assert code is not None and code.width == 8, "so they were counted again"
    assert counted == [1, 2, 4, 8, 11]


def test_a_value_without_a_good_inverse_is_kept_and_looked_at_again_later() -> None:
    codec, (x, prediction) = Codec(), pair((64, 64))
    for _ in range(2):
        assert coded(codec, x, given(torch.zeros(64, 64))) is None
    assert not codec.needs_prediction(x), "nothing is computed for it"
    assert coded(codec, x, prediction) is not None


@pytest.mark.usefixtures("sizes")
def test_small_values_and_such_as_can_not_be_coded_are_kept() -> None:
    bytes_each = torch.randn(8192).to(torch.float8_e5m2)
    for x in (torch.randn(32, 32), torch.ones(4096, dtype=torch.int64), torch.randn(1), bytes_each):
        assert not Codec().needs_prediction(x)
    assert Codec().needs_prediction(torch.randn(33, 32)) and Codec().needs_prediction(
        torch.randn(4096, dtype=torch.complex64)
    )


def test_room_is_learnt_and_what_finds_none_is_off_by_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host does not know how many escapes there are."""
    monkeypatch.setattr("revfx.codes.codec.is_counted", lambda t: False)
    monkeypatch.setattr("revfx.codes.implementations.CHOICE", "aten")
    codec, (x, prediction) = Codec(), pair((64, 64))
    for _ in range(4):
        code = coded(codec, x, prediction)
        assert code is not None and code.count is not None and code.count <= len(code.values)
        assert_same(decode(prediction, code)[0], x)
    assert codec.capacity is not None and codec.capacity >= 1.5 * count_escapes(x, prediction)[1]
    x, prediction = pair((64, 64), ratio=4.0)
    code = coded(codec, x, prediction)
    assert code is not None and code.count is not None and code.count > len(code.values) == codec.capacity
    got, words = decode(prediction, code)
    assert not torch.equal(got, x) and (got - x).abs().max() < 1e-5
    assert not torch.equal(words, code.words)
    codec.counts_next = True  # as the end of the backward says
    code = coded(codec, x, prediction)
    assert code is not None and code.count is not None and code.count <= len(code.values)

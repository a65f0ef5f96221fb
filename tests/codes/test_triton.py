"""Triton's kernels for codes, interpreted on the CPU: the bytes of other implementations, but for the order of escapes.

The interpreter must be chosen before Triton is imported, so this file runs itself in another process.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import operator
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from revfx.codes import aten, c
from revfx.codes.format import GROUP, INTEGER, WIDTHS, Code, Prediction
from revfx.fit import bits


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LENGTHS = (5, 300, GROUP + 70)
Case = tuple[Tensor, Prediction]


def kernels() -> Any:
    return importlib.import_module("revfx.codes.triton")


def raw(t: Tensor) -> Tensor:
    t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    return t.contiguous().view(INTEGER[t.element_size()])


def assert_same(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape and torch.equal(raw(got), raw(want))


def specials(n: int, dtype: torch.dtype) -> Tensor:
    """Random numbers, of which 40 % are NaN, infinite, zero, the largest, the smallest or denormal."""
    info = torch.finfo(dtype)
    numbers = torch.randn(n).to(dtype)
    for value in (torch.nan, torch.inf, -torch.inf, 0.0, -0.0, info.tiny, info.max, -info.tiny / 2):
        numbers[torch.rand(n) < 0.05] = value
    return numbers


def random_bits(n: int, dtype: torch.dtype) -> Tensor:
    info = torch.iinfo(INTEGER[dtype.itemsize])
    return torch.randint(info.min, info.max, (n,), dtype=INTEGER[dtype.itemsize]).view(dtype)


def pairs(n: int, dtype: torch.dtype) -> Iterator[Case]:
    """Tensors with predictions: near ones, special numbers, any bits."""
    x, h = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    yield x, Prediction((x + h, h), operator.sub)
    yield specials(n, dtype), Prediction((specials(n, dtype), specials(n, dtype)), operator.sub)
    yield random_bits(n, dtype), Prediction((random_bits(n, dtype), random_bits(n, dtype)), operator.add)
    near = specials(n, dtype)
    yield (raw(near) + torch.randint(-3, 4, (n,))).to(INTEGER[dtype.itemsize]).view(dtype), Prediction((near,))


def escapes(code: Code) -> list[tuple[int, int, int]]:
    """Return the group, the place and the value of each escape, in order."""
    found: list[tuple[int, int, int]] = []
    for group, (first, end) in enumerate(code.spans.tolist()):
        places, values = code.places[first:end].tolist(), code.values[first:end].tolist()
        found += [(group, place, value) for place, value in zip(places, values, strict=True)]
    return sorted(found)


def in_reverse(code: Code) -> Code:
    """Return the same code with its escapes in the opposite order."""
    n = int(code.spans.max())
    spans = n - code.spans.flip(1)
    return replace(code, spans=spans, values=code.values[:n].flip(0), places=code.places[:n].flip(0))


def check_codes_are_alike() -> None:
    lengths = itertools.cycle(LENGTHS)
    for dtype, width in itertools.product(FLOATS, WIDTHS):
        for x, prediction in pairs(next(lengths), dtype):
            want, got = aten.encode(x, prediction, width), kernels().encode(x, prediction, width)
            assert_same(got.packed, want.packed)
            assert_same(got.words, want.words)
            assert escapes(got) == escapes(want)
            assert_same(got.count, torch.tensor([len(want.values)]))
            readers: list[tuple[Any, Code]] = [(kernels(), want), (kernels(), in_reverse(got))]
            if c.library() is not None:
                readers.append((c, got))
            for reader, code in readers:
                back, words = reader.decode(prediction, code)
                assert_same(back, x)
                assert_same(words, want.words)


def check_lost_escapes_are_counted() -> None:
    """A group has all of its escapes, or the first ones, or none."""
    for dtype, room in itertools.product((torch.bfloat16, torch.float64), (0, GROUP + 1)):
        x = random_bits(2 * GROUP + 9, dtype)
        prediction = Prediction((torch.zeros_like(x),))
        whole, code = kernels().encode(x, prediction, 2), kernels().encode(x, prediction, 2, room)
        assert_same(code.count, whole.count)
        assert len(code.values) == len(code.places) == len(escapes(code)) == room < whole.count
        assert set(escapes(code)) <= set(escapes(whole))
        back, words = kernels().decode(prediction, code)
        assert int((raw(back) != raw(x)).sum()) == int(whole.count) - room
        assert_same(words, aten.fingerprint(back))


def check_operands_are_written_over() -> None:
    for dtype, at in itertools.product((torch.bfloat16, torch.float64), (0, 1)):
        for x, prediction in pairs(GROUP + 70, dtype):
            if at < len(prediction.tensors):
                code = kernels().encode(x, prediction, 2)
                back, words = kernels().decode(prediction, code, prediction.tensors[at])
                assert back is prediction.tensors[at]
                assert_same(back, x)
                assert_same(words, code.words)


def check_layouts() -> None:
    for dtype in (torch.bfloat16, torch.complex64):
        dense = torch.randn((9, 40), dtype=dtype)
        likes = (
            dense.t(),
            torch.randn((2, 3, 4, 5), dtype=dtype).contiguous(memory_format=torch.channels_last),
            torch.randn((), dtype=dtype),
            torch.randn((0, 3), dtype=dtype),
            torch.randn(99, dtype=dtype)[3:],
        )
        for like in likes:
            x = (like * 1.001).contiguous()
            code = kernels().encode(x, Prediction((like,)), 4)
            back, words = kernels().decode(Prediction((like,)), code)
            assert_same(back, x)
            assert back.stride() == like.stride()
            assert_same(words, aten.encode(x, Prediction((like,)), 4).words)
        conjugate, strided = Prediction((dense.conj(),)), Prediction((dense[:, ::2],))
        for x, prediction in ((dense.conj(), conjugate), (dense[:, ::2], strided)):
            assert_same(kernels().decode(prediction, kernels().encode(x, prediction, 0))[0], x)


def check_fingerprints() -> None:
    for dtype, n in itertools.product((torch.bool, torch.int8, torch.int16, torch.float32, torch.int64), (0, 3, 5000)):
        t = torch.randint(0, 2, (n,)).to(dtype)
        assert_same(kernels().fingerprint(t), aten.fingerprint(t))


def check_marks() -> None:
    for n in (0, 1, 8, GROUP + 7):
        marks = torch.rand(n) > 0.5
        packed = kernels().pack_marks(marks)
        assert_same(packed, bits.encode(marks.clone()))
        for dtype in (torch.bool, torch.int64, torch.bfloat16, torch.float64):
            assert_same(kernels().unpack_marks(packed, n, dtype), marks.to(dtype))


CHECKS: tuple[Callable[[], None], ...] = (
    check_codes_are_alike,
    check_lost_escapes_are_counted,
    check_operands_are_written_over,
    check_layouts,
    check_fingerprints,
    check_marks,
)


def main() -> None:
    """Print the errors of the checks, by name."""
    errors: dict[str, str] = {}
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # numpy's, of infinite numbers
    for check in CHECKS:
        try:
            check()
        except Exception:
            errors[check.__name__] = traceback.format_exc()
    print(json.dumps(errors))


@pytest.fixture(scope="module")
def errors() -> dict[str, str]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_interpreted(name: str, errors: dict[str, str]) -> None:
    assert name not in errors, errors[name]


if __name__ == "__main__":
    main()

"""Triton's kernels for codes, interpreted on the CPU: the bytes of other implementations, but for the order of escapes.

The interpreter must be chosen before Triton is imported, so this file runs itself in another process.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from codes_cases import FLOATS, assert_alike, assert_same, cases
from helpers import DEEP

from revfx.codes import WIDTHS, Code, Prediction, aten, c
from revfx.codes.format import GROUP


LENGTHS = (5, 300, GROUP + 70)
EVERY = 2 if DEEP else 4  # of the cases: each width, and each length, takes other ones


def kernels() -> Any:
    return importlib.import_module("revfx.codes.triton")


def in_reverse(code: Code) -> Code:
    """Return the same code with its escapes in the opposite order."""
    n = int(code.spans.max())
    spans = n - code.spans.flip(1)
    return replace(code, spans=spans, values=code.values[:n].flip(0), places=code.places[:n].flip(0))


def check_codes_are_alike() -> None:
    lengths = itertools.cycle(LENGTHS)
    for dtype, (number, width) in itertools.product(FLOATS, enumerate(WIDTHS)):
        n = next(lengths)
        for name, x, prediction in itertools.islice(cases(dtype, n), number % EVERY, None, EVERY):
            at = f"{dtype} {n} {name}, {width} bits"
            want, got = aten.encode(x, prediction, width), kernels().encode(x, prediction, width)
            assert_alike(got, want, at)
            assert_same(got.count, torch.tensor([len(want.values)]), at)
            readers: list[tuple[Any, Code]] = [(kernels(), want), (kernels(), in_reverse(got))]
            if c.library() is not None:
                readers.append((c, got))
            for reader, code in readers:
                back, words = reader.decode(prediction, code)
                assert_same(back, x, at)
                assert_same(words, want.words, at)


def check_lost_escapes_are_counted() -> None:
    """A group has all of its escapes, or the first ones, or none."""
    for dtype, room in itertools.product((torch.int16, torch.int64), (0, GROUP + 1)):
        info = torch.iinfo(dtype)
        x = torch.randint(info.min, info.max, (2 * GROUP + 9,), dtype=dtype)
        prediction = Prediction((torch.zeros_like(x),))
        whole, code = kernels().encode(x, prediction, 2), kernels().encode(x, prediction, 2, room)
        assert_same(code.count, whole.count)
        assert len(code.values) == len(code.places) == room < whole.count
        assert int((code.spans[:, 1] - code.spans[:, 0]).sum()) == room
        back, words = kernels().decode(prediction, code)
        assert int((back != x).sum()) == int(whole.count) - room
        assert_same(words, aten.fingerprint(back))


def check_operands_are_written_over() -> None:
    for dtype, at in itertools.product((torch.bfloat16, torch.float32), (0, 1)):
        for name, x, prediction in cases(dtype, GROUP + 70):
            if at < len(prediction.tensors):
                code, spent = kernels().encode(x, prediction, 2), prediction.tensors[at]
                back, words = kernels().decode(prediction, code, spent)
                assert (back is spent) == (spent.dtype == dtype), name
                assert_same(back, x, name)
                assert_same(words, code.words, name)


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
        t = torch.randn(n)
        marks, packed = t > 0, kernels().pack_marks(t, True)
        assert_same(packed, aten.pack_marks(t, True))
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
    support = str(Path(__file__).parents[1] / "support")
    path = os.pathsep.join((support, os.environ.get("PYTHONPATH", "")))
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_interpreted(name: str, errors: dict[str, str]) -> None:
    assert name not in errors, errors[name]


if __name__ == "__main__":
    main()

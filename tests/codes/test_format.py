"""Codes give back the very bits of any numbers, and all implementations give the same bytes."""

from __future__ import annotations

import operator
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from codes_cases import FLOATS, LENGTHS, assert_alike, assert_same, bits, cases, special
from torch import Tensor

from revfx import codes
from revfx.codes import WIDTHS, Prediction, aten, c, implementations, predict
from revfx.debug import codes_by


needs_c = pytest.mark.skipif(c.library() is None, reason="revfx was installed without a C compiler")
IMPLEMENTATIONS = [aten, pytest.param(c, marks=needs_c)]
SOURCE = Path(codes.__file__).parent / "codec.c"


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@needs_c
@pytest.mark.parametrize("dtype", FLOATS)
def test_c_makes_the_bytes_of_the_reference_and_each_decodes_both(dtype: torch.dtype) -> None:
    for n in LENGTHS:
        for name, x, prediction in cases(dtype, n):
            assert c.count_escapes(x, prediction) == aten.count_escapes(x, prediction), (n, name)
            for width in WIDTHS:
                at = f"{n} {name}, {width} bits"
                want, got = aten.encode(x, prediction, width), c.encode(x, prediction, width)
                with_room = aten.encode(x, prediction, width, capacity=n + 5)
                assert_alike(got, want, at)
                for code in (want, got, with_room):
                    for by in (aten, c):
                        back, words = by.decode(prediction, code)
                        assert_same(back, x, at)
                        assert torch.equal(words, want.words), at


@pytest.mark.parametrize("by", IMPLEMENTATIONS)
@pytest.mark.usefixtures("two_threads")
def test_marks_tell_what_is_not_zero_or_what_is_positive(by: Any) -> None:
    many = 2 * c.MARKS_PER_ELEMENT * c.ELEMENTS_PER_THREAD + 13  # two threads in C
    edges = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 1e-40, -1e-40])
    for dtype in (torch.bool, torch.int16, torch.int64, *FLOATS):
        for n in (0, 1, 7, 8, 2049, many if dtype == torch.float32 else 777):
            t = edges[torch.randint(0, 4 if dtype.itemsize == 1 or not dtype.is_floating_point else 10, (n,))].to(dtype)
            for positive, want in ((False, t != 0), (True, ~(t <= 0))):
                packed = by.pack_marks(t, positive)
                assert_same(packed, torch.from_numpy(np.packbits(want.numpy(), bitorder="little")))
                for other in (torch.bool, torch.float16, torch.float32, torch.float64, torch.complex64):
                    assert_same(by.unpack_marks(packed, n, other), want.to(other))
    rows = torch.randn(33, 17).t()  # dense, in another order
    assert_same(by.unpack_marks(by.pack_marks(rows, True), rows.numel(), torch.bool), (rows.t() > 0).flatten())


@pytest.mark.parametrize("by", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", (torch.complex64, torch.complex128))
def test_complex_numbers_are_pairs(dtype: torch.dtype, by: Any) -> None:
    x, h = torch.randn(2, 7, 33, dtype=dtype)
    for prediction in (predict(operator.sub, x + h, h), predict(operator.sub, x + h, h.conj().resolve_conj().conj())):
        for width in WIDTHS:
            code = by.encode(x, prediction, width)
            back, words = by.decode(prediction, code)
            assert_same(back, x)
            assert torch.equal(words, by.fingerprint(x)) and torch.equal(words, code.words)


@needs_c
@pytest.mark.usefixtures("two_threads")
def test_threads_make_the_same_bytes() -> None:
    n = 2 * c.ELEMENTS_PER_THREAD + 777
    x, h = torch.randn(n), 0.3 * torch.randn(n)
    prediction = Prediction((x + h, h), operator.sub)
    code = c.encode(x, prediction, 2)
    back, words = c.decode(prediction, code)
    counts, fingerprint = c.count_escapes(x, prediction), c.fingerprint(x)
    torch.set_num_threads(1)
    assert_alike(code, c.encode(x, prediction, 2))
    assert_same(back, x)
    assert torch.equal(words, c.decode(prediction, code)[1]) and torch.equal(words, fingerprint)
    assert counts == c.count_escapes(x, prediction)


@pytest.mark.parametrize("by", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("width", WIDTHS)
def test_a_prediction_that_is_a_little_off_gives_no_garbage(width: int, dtype: torch.dtype, by: Any) -> None:
    """As where a kernel jitters: values that cancel to zero stay near to it, and none is NaN or infinite."""
    numbers = special(400, dtype)
    x = numbers[numbers.isfinite() & (numbers.abs() < 1)]
    steps = torch.arange(-2, 3).repeat_interleave(len(x))
    x = x.repeat(5)
    predicted = (bits(x) + steps.to(bits(x).dtype)).view(dtype)
    x, predicted = x[predicted.isfinite()], predicted[predicted.isfinite()]
    code = by.encode(x, Prediction((predicted,)), width)
    zero = torch.zeros_like(predicted)
    for off in (predicted.nextafter(zero), predicted.nextafter(-predicted), -predicted * (predicted.abs() < 1e-30)):
        off = torch.where(predicted == 0, zero, off)
        assert by.decode(Prediction((off,)), code)[0].isfinite().all()


@pytest.mark.parametrize("by", IMPLEMENTATIONS)
def test_layouts_are_kept_and_nothing_that_is_given_is_written_to(by: Any) -> None:
    x, h = torch.randn(2, 4, 6, 5, 3)
    y = x + h
    views = {
        "transposed": lambda t: t.transpose(0, 1),
        "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "with gaps": lambda t: t[..., ::2],
        "a part": lambda t: t[1:, 2:],
        "from one byte on": lambda t: t.view(-1)[1:].view(359),
    }
    before = x.clone(), h.clone(), y.clone()
    for name, view in views.items():
        for p in (predict(operator.sub, view(y), view(h)), predict(lambda t: t.clone(), view(y))):
            code = by.encode(view(x), p, 2)
            back, words = by.decode(p, code)
            assert_same(back, view(x), name)
            assert torch.equal(words, code.words), name
            if view(y).is_contiguous(memory_format=torch.channels_last) or name == "transposed":
                assert back.stride() == p.like.stride(), name
    for t, was in zip((x, h, y), before, strict=True):
        assert torch.equal(t, was)


@pytest.mark.parametrize("by", IMPLEMENTATIONS)
def test_predictions_with_gaps_or_overlaps_are_contiguous_when_decoded(by: Any) -> None:
    x = torch.randn(6, 4)
    with_gaps = (x + 1e-7).t().repeat_interleave(2, 1)[:, ::2].t()
    overlapping = torch.randn(6).view(6, 1).expand(6, 4)
    for predicted in (with_gaps, overlapping):
        for value in (x, x.t().contiguous().t()):
            back, words = by.decode(Prediction((predicted,)), by.encode(value, Prediction((predicted,)), 4))
            assert_same(back, value)
            assert back.is_contiguous() and torch.equal(words, by.fingerprint(x))


@pytest.mark.parametrize("by", IMPLEMENTATIONS)
def test_a_conjugate_view_does_not_give_its_memory(by: Any) -> None:
    x = torch.randn(300, dtype=torch.complex64)
    predicted = x.clone().conj()
    prediction = Prediction((predicted,))
    back, _ = by.decode(prediction, by.encode(x, prediction, 2), predicted)
    assert_same(back, x)


def test_escapes_without_room_leave_those_of_other_groups_alone() -> None:
    x = torch.randn(3 * 2048 + 100)
    prediction = Prediction((torch.randn_like(x),))
    code = aten.encode(x, prediction, 2, capacity=3000)
    assert code.count is not None and code.count == len(x)
    assert code.spans.tolist() == [[0, 2048], [2048, 3000], [3000, 3000], [3000, 3000]]
    for by in (aten, c) if c.library() is not None else (aten,):
        back, _ = by.decode(prediction, code)
        assert_same(back[:3000], x[:3000])


@pytest.mark.parametrize("by", IMPLEMENTATIONS)
@pytest.mark.parametrize("which", ("y", "h"))
def test_the_result_may_take_the_memory_of_an_operand(which: str, by: Any) -> None:
    for dtype in FLOATS:
        x, h = torch.randn(2, 3001).to(dtype)
        y = x + h
        prediction = Prediction((y, h), operator.sub)
        code = by.encode(x, prediction, 4)
        assert_same(by.decode(prediction, code, {"y": y, "h": h}[which])[0], x)


def test_only_terms_that_lie_alike_are_left_to_the_codec() -> None:
    y, h = torch.randn(2, 4, 6)
    assert predict(operator.sub, y, h).by is operator.sub and predict(operator.add, y, h).by is operator.add
    assert predict(operator.sub, y.t(), h.t()).by is operator.sub
    assert predict(operator.sub, y, h.bfloat16()).by is predict(operator.sub, y, h.half()).by is operator.sub
    others: list[tuple[Tensor, Tensor]] = [
        (y, h[:1]), (y, h.double()), (y.double(), h), (y.half(), h), (y, torch.randn(6, 4).t()), (y[:, ::2], h[:, ::2]),
        (y, torch.complex(y, h).conj().imag), (y.long(), h.long()),
    ]  # fmt: skip
    for a, b in others:
        prediction = predict(operator.sub, a, b)
        assert prediction.by is None and torch.equal(prediction.like, a - b)
    assert predict(torch.mul, y, h).by is None


# --- fingerprints
@pytest.mark.parametrize("by", IMPLEMENTATIONS)
def test_a_fingerprint_tells_any_bit_and_any_order(by: Any) -> None:
    x = torch.randn(2500)
    seen = {by.fingerprint(x)[0].item()}
    integers = bits(x).clone()
    for at in (0, 1, 127, 128, 2047, 2048, 2499):
        for bit in (0, 15, 31):
            other = integers.clone()
            other[at] ^= 1 << bit if bit < 31 else -(1 << 31)
            seen.add(by.fingerprint(other)[0].item())
    for a, b in ((0, 1), (5, 133), (0, 2048), (7, 2499)):
        other = integers.clone()
        other[[a, b]] = integers[[b, a]]
        seen.add(by.fingerprint(other)[0].item())
    signs = torch.ones(2500)
    signs[3] = -1
    seen.add(by.fingerprint(signs)[0].item())
    seen.add(by.fingerprint(signs.roll(1))[0].item())
    assert len(seen) == 1 + 7 * 3 + 4 + 2


@needs_c
def test_fingerprints_of_any_dtype_and_length_are_alike() -> None:
    dtypes = (
        *FLOATS,
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int64,
        torch.float8_e4m3fn,
        torch.complex64,
    )
    for dtype in dtypes:
        for n in (0, 1, 2, 3, 15, 16, 17, 511, 513, 4096, 10000):
            t = (100 * torch.randn(n)).to(dtype)
            assert torch.equal(aten.fingerprint(t), c.fingerprint(t)), (dtype, n)
            words = aten.fingerprint(t[::2])
            assert torch.equal(words, c.fingerprint(t[::2])) and torch.equal(words, c.fingerprint(t[::2].clone()))


# --- the implementation in C
SANITIZED = """
import ctypes, random, struct
lib = ctypes.CDLL({library!r})
P = ctypes.c_void_p
lib.revfx_encode.restype = P
random.seed(1)
def buffer(n): return (ctypes.c_char * max(n, 1))()
for size in (2, 4, 8):
    for n in {lengths}:
        for kind in (0, 1, 2):
            for width in (0, 2, 4, 8):
                for threads in (1, 3):
                    x = bytearray(random.randbytes(n * size))
                    a, b, out = buffer(n * size), buffer(n * size), buffer(n * size)
                    a[:], b[:] = bytes(x), bytes(n * size)
                    for i in range(0, n, 7):
                        a[i * size] = random.randrange(256)
                    held = buffer(n * size)
                    held[:] = bytes(x)
                    block = 32 * width
                    packed = buffer(n // 256 * block + min(n % 256, block))
                    spans, words = buffer(8 * -(-n // 2048)), buffer(8 + 16 * size)
                    count = ctypes.c_int64()
                    ends = ctypes.c_int64(n)
                    found = lib.revfx_encode(
                        width, size, kind, ends, held, a, b, packed, spans, words, ctypes.byref(count), threads)
                    values, places = buffer(count.value * size), buffer(count.value * 2)
                    lib.revfx_take(P(found), size, values, places)
                    again = buffer(8 + 16 * size)
                    lib.revfx_decode(width, size, kind, ends, a, b, packed, spans, values, places, out, again, threads)
                    assert out.raw == bytes(x) and again.raw == words.raw, (size, n, kind, width)
                    counts = (ctypes.c_int64 * 4)()
                    lib.revfx_count(size, kind, ends, held, a, b, counts, threads)
                    assert counts[{widths}.index(width)] == count.value
                    lib.revfx_fingerprint(out, ends, size, again, threads)
                    assert again.raw == words.raw
print("done")
"""


@pytest.mark.skipif(shutil.which("gcc") is None or sys.platform != "linux", reason="needs gcc with its sanitizers")
def test_c_touches_no_memory_but_its_own_and_does_nothing_undefined(tmp_path: Path) -> None:
    library = tmp_path / "codec.so"
    flags = ["-O1", "-g", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-DONE_TARGET"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["gcc", *flags, *sanitizers, str(SOURCE), "-o", str(library)], check=True)
    found = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    lengths = (1, 63, 64, 255, 256, 257, 2048, 2049, 6000)
    program = SANITIZED.format(library=str(library), lengths=lengths, widths=WIDTHS)
    environment = {"LD_PRELOAD": found.stdout.strip(), "PYTHONMALLOC": "malloc", "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr[-3000:]


# --- which implementation there is
def test_the_environment_chooses_the_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementations, "CHOICE", "")
    assert codes_by() == codes_by("cpu") == ("aten" if c.library() is None else "c")
    assert codes_by("mps") == "aten"
    monkeypatch.setattr(implementations, "CHOICE", "aten")
    assert codes_by() == codes_by("cuda") == "aten"
    monkeypatch.setattr(implementations, "CHOICE", "fast")
    with pytest.raises(ValueError, match="REVFX_CODES is 'fast'; it may be aten, c or triton"):
        codes_by()


def test_without_the_library_codes_are_made_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementations, "_chosen", vars(implementations)["_chosen"].__wrapped__)
    monkeypatch.setattr(c, "library", lambda: None)
    monkeypatch.setattr(implementations, "CHOICE", "")
    assert codes_by() == "aten"
    monkeypatch.setattr(implementations, "CHOICE", "c")
    with pytest.raises(ImportError, match="installed without a C compiler"):
        codes_by()

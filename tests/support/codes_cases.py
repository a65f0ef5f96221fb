"""Tensors next to predictions that are hard to code, and codes in a form that can be compared."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import Tensor

from revfx.codes import Code, Prediction


INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LENGTHS = (1, 3, 63, 64, 65, 255, 256, 257, 2047, 2048, 2049, 5000)
Case = tuple[str, Tensor, Prediction]


def bits(t: Tensor) -> Tensor:
    """The bits of a tensor."""
    t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    return t.contiguous().view(INTEGER[t.element_size()])


def special(n: int, dtype: torch.dtype) -> Tensor:
    """Numbers next to which a distance is hard to tell among others: zeros, the smallest, the largest, none."""
    info = torch.finfo(dtype)
    t = torch.randn(n, dtype=torch.float64).to(dtype)
    for number in (torch.nan, torch.inf, -torch.inf, 0.0, -0.0, info.tiny, info.max, -info.smallest_normal / 2):
        t[torch.randperm(n)[: max(1, n // 20)]] = number
    return t


def cases(dtype: torch.dtype, n: int) -> Iterator[Case]:
    """Tensors with predictions."""
    integer = INTEGER[dtype.itemsize]
    info = torch.iinfo(integer)

    def any_bits() -> Tensor:
        return torch.randint(info.min, info.max, (n,), dtype=integer).view(dtype)

    x, h, p = torch.randn(n).to(dtype), (0.3 * torch.randn(n)).to(dtype), special(n, dtype)
    near = (p.view(integer) + torch.randint(-3, 4, (n,), dtype=integer)).view(dtype)
    yield "y - h", x, Prediction((x + h, h), operator.sub)
    yield "y + h", x, Prediction((x - h, h), operator.add)
    yield "any bits", any_bits(), Prediction((any_bits(),))
    yield "any bits, y - h", any_bits(), Prediction((any_bits(), any_bits()), operator.sub)
    yield "any bits, y + h", any_bits(), Prediction((any_bits(), any_bits()), operator.add)
    yield "near", near, Prediction((p,))
    if dtype == torch.float32:
        for narrow in (torch.bfloat16, torch.float16):
            yield f"y - h, {narrow}", x, Prediction((x + h.to(narrow), h.to(narrow)), operator.sub)
            odd = special(n, narrow)
            yield f"special, y + h, {narrow}", special(n, dtype), Prediction((special(n, dtype), odd), operator.add)
    yield "special, y - h", special(n, dtype), Prediction((special(n, dtype), special(n, dtype)), operator.sub)


def parts(code: Code) -> list[Tensor]:
    """All bytes of a code, with the escapes of each group in the order of their places."""
    found = [code.packed, code.spans[:, 1] - code.spans[:, 0], code.words]
    for first, end in code.spans.tolist():
        order = code.places[first:end].argsort()
        found += [code.places[first:end][order], code.values[first:end][order]]
    return found


def assert_alike(got: Code, want: Code, name: str = "") -> None:
    """Assert that two codes have the same bytes, but for the order of escapes."""
    for a, b in zip(parts(got), parts(want), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name


def assert_same(got: Tensor, want: Tensor, name: str = "") -> None:
    """Assert that two tensors have the same bits."""
    assert got.dtype == want.dtype and got.shape == want.shape, name
    if got.is_floating_point() or got.is_complex():
        got, want = bits(got), bits(want)
    assert torch.equal(got, want), name

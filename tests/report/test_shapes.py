"""Results of operations on fake tensors that are remembered are those that torch itself works out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from revfx import _fake, _torch
from revfx.report.simulate import Shapes


aten: Any = torch.ops.aten
CASES: dict[str, tuple[Any, Callable[[Tensor], tuple[Any, ...]]]] = {
    "sum": (aten.add.Tensor, lambda x: (x, x)),
    "broadcast": (aten.mul.Tensor, lambda x: (x, x[:, :1])),
    "promoted": (aten.add.Tensor, lambda x: (x.long(), 0.5)),
    "product": (aten.mm.default, lambda x: (x, x.t())),
    "transposed": (aten.t.default, lambda x: (x,)),
    "part of a part": (aten.slice.Tensor, lambda x: (x[1:], 1, 1, 3)),
    "parts": (aten.split.Tensor, lambda x: (x, 2, 1)),
    "tuple of new ones": (aten.native_layer_norm.default, lambda x: (x, [6], None, None, 1e-5)),
    "same memory": (aten.detach.default, lambda x: (x,)),
    "listed": (aten.cat.default, lambda x: ([x, x.t().contiguous().view(4, 6)], 1)),
}


def alike(got: Any, want: Any) -> bool:
    """Whether two results have the same shapes in memory."""
    if isinstance(want, (tuple, list)):
        return len(got) == len(want) and all(map(alike, got, want))
    parts = (Tensor.size, Tensor.stride, Tensor.storage_offset)
    same = all(f(got) == f(want) for f in parts)
    return same and (got.dtype, got.device, type(got)) == (want.dtype, want.device, type(want))


@pytest.mark.parametrize("name", CASES)
def test_what_is_remembered_is_what_torch_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    func, operands = CASES[name]
    mode = _fake.fake_mode()
    shapes, x = Shapes(mode), mode.from_tensor(torch.randn(4, 6))
    args = operands(x)
    want = shapes.run(func, args, {})
    assert all(shapes.seen.values())
    with monkeypatch.context() as patched:
        patched.setattr(mode, "dispatch", None)  # which would work it out
        got = shapes.run(func, args, {})
    assert alike(got, want)
    first = got[0] if isinstance(got, (tuple, list)) else got
    theirs = want[0] if isinstance(want, (tuple, list)) else want
    shares = [
        _torch.storage_key(t) == _torch.storage_key(args[0]) for t in (first, theirs) if isinstance(args[0], Tensor)
    ]
    assert shares in ([], [True, True], [False, False])
    assert first is not theirs


def test_other_shapes_strides_numbers_and_keywords_are_looked_into_again() -> None:
    mode = _fake.fake_mode()
    shapes, x = Shapes(mode), mode.from_tensor(torch.randn(4, 6))
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (aten.sum.dim_IntList, (x, [1]), {}),
        (aten.sum.dim_IntList, (x, [0]), {}),
        (aten.sum.dim_IntList, (x, [0], True), {}),
        (aten.sum.dim_IntList, (x, [0], True), {"dtype": torch.float64}),
        (aten.sum.dim_IntList, (x.t(), [0], True), {}),
        (aten.mul.Tensor, (x.long(), 2), {}),
        (aten.mul.Tensor, (x.long(), 2.0), {}),
    ]
    for func, args, kwargs in calls:
        assert alike(shapes.run(func, args, kwargs), func(*args, **kwargs))
    assert len(shapes.seen) == len(calls)


def test_writes_real_tensors_and_values_are_left_to_torch() -> None:
    mode = _fake.fake_mode()
    shapes, x = Shapes(mode), mode.from_tensor(torch.randn(4, 6))
    assert shapes.run(aten.add_.Tensor, (x, 1), {}) is x
    for _ in range(2):
        assert shapes.run(aten.add.Tensor, (torch.ones(2), 1), {}).tolist() == [2, 2]
    with pytest.raises(_fake.DATA_DEPENDENT):
        shapes.run(aten.nonzero.default, (x,), {})
    assert not shapes.seen

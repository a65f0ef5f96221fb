"""Every rule in the table has a sample, solves every operand that it says it solves, and refuses outside its domain."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import revfx
from revfx import rules
from revfx.errors import NotConvertedWarning
from revfx.inspection import direction_errors
from revfx.rules import Inverse, arguments, aten, op_name
from revfx.testing import check_inverse


prims = torch.ops.prims


def t(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def far_from_zero(*shape: int) -> Tensor:
    return torch.exp(t(*shape))


PAIR = (t(3, 4), t(3, 4))
ORDER = torch.tensor([2, 0, 3, 1])
SAMPLES: dict[str, list[tuple[Any, ...]]] = {
    "add": [PAIR, (t(3, 4), t(4)), (t(3, 4), 2.5), (t(3, 4) > 0, t(3, 4))],
    "radd": [PAIR],
    "iadd": [PAIR],
    "sub": [PAIR, (t(3, 4), 1)],
    "subtract": [PAIR],
    "isub": [PAIR],
    "rsub": [PAIR],
    "neg": [(t(3, 4),)],
    "negative": [(t(3, 4),)],
    "mul": [(t(3, 4), -0.3)],
    "multiply": [(t(3, 4), 4)],
    "rmul": [(t(3, 4), 0.3)],
    "imul": [(t(3, 4), 0.3)],
    "div": [(t(3, 4), 0.3)],
    "divide": [(t(3, 4), 0.3)],
    "truediv": [(t(3, 4), -3)],
    "true_divide": [(t(3, 4), 3)],
    "addcmul": [(t(3, 4), *PAIR), (t(3, 4), t(4), t(3, 1))],
    "addcdiv": [(t(3, 4), t(3, 4), far_from_zero(3, 4))],
    "lerp": [(*PAIR, 0.3)],
    "to": [(torch.randn(3, 4), torch.float64), (torch.randn(3, 4).bfloat16(), torch.float32)],
    "float": [(torch.randn(3, 4).half(),)],
    "double": [(torch.randn(3, 4),)],
    "half": [(torch.randn(3, 4).half(),)],
    "bfloat16": [(torch.randn(3, 4).bfloat16(),)],
    "type": [(torch.randn(3, 4), torch.float64)],
    "type_as": [(torch.randn(3, 4), t(1))],
    "cpu": [(t(3, 4),)],
    "reshape": [(t(3, 4), (2, 6))],
    "view": [(t(3, 4), 12), (t(3, 4), -1, 2)],
    "view_as": [(t(3, 4), t(4, 3))],
    "reshape_as": [(t(3, 4), t(4, 3))],
    "flatten": [(t(2, 3, 4),), (t(2, 3, 4), 1)],
    "unflatten": [(t(3, 4), 1, (2, 2))],
    "squeeze": [(t(3, 1, 4),), (t(3, 1, 4), 1)],
    "unsqueeze": [(t(3, 4), 1)],
    "ravel": [(t(3, 4),)],
    "clone": [(t(3, 4),)],
    "contiguous": [(t(3, 4).t(),)],
    "permute": [(t(2, 3, 4), (2, 0, 1)), (t(2, 3, 4), (-1, 0, 1))],
    "transpose": [(t(2, 3, 4), 0, 2)],
    "swapaxes": [(t(2, 3, 4), 0, -1)],
    "swapdims": [(t(2, 3, 4), 0, 1)],
    "movedim": [(t(2, 3, 4), 0, 2), (t(2, 3, 4), (0, 1), (2, 0))],
    "moveaxis": [(t(2, 3, 4), 0, 2)],
    "t": [(t(3, 4),), (t(3),), (t(),)],
    "getattr": [(t(3, 4), "T"), (t(2, 3, 4), "mT")],
    "flip": [(t(3, 4), (0, 1))],
    "roll": [(t(3, 4), 1, 0), (t(3, 4), (1, 2), (0, 1)), (t(3, 4), 5)],
    "pixel_shuffle": [(t(2, 8, 3, 3), 2)],
    "pixel_unshuffle": [(t(2, 2, 4, 6), 2)],
    "channel_shuffle": [(t(2, 6, 3), 2)],
    "cat": [((t(2, 3), t(4, 3)),), ([t(2, 3), t(2, 1)], -1)],
    "concat": [([t(2, 3), t(2, 1)], 1)],
    "concatenate": [([t(2, 3), t(4, 3)],)],
    "stack": [([t(2, 3), t(2, 3)], 1)],
    "chunk": [(t(5, 3), 2), (t(2, 6), 3, -1)],
    "split": [(t(5, 3), 2), (t(2, 6), [1, 2, 3], 1)],
    "split_with_sizes": [(t(2, 6), [1, 2, 3], 1)],
    "tensor_split": [(t(5, 3), 2)],
    "unbind": [(t(3, 4), 1)],
    "narrow": [(t(3, 4), 1, 0, 4)],
    "select": [(t(3, 1), 1, 0)],
    "getitem": [(t(3, 4), (slice(None), ORDER))],
    "index_select": [(t(3, 4), 1, ORDER)],
    "index": [(t(3, 4), [None, ORDER])],
    "_unsafe_index": [(t(3, 4), [None, ORDER])],
    **{name: [(t(3, 4),)] for name in "exp expm1 sinh asinh tanh atan sigmoid leaky_relu elu selu softplus".split()},
    **{name: [(far_from_zero(3, 4),)] for name in ("log", "log1p", "reciprocal")},
    **{name: [(far_from_zero(3, 4), 2.5), (far_from_zero(3, 4), t(3, 4))] for name in ("rdiv", "rtruediv")},
    "Identity": [(t(3, 4),)],
    "Flatten": [(t(3, 2, 4),)],
}
LINEAR = {op_name(op) for op, rule in rules.registered().items() if rule.__module__ == "revfx.rules.linear"}
# test_linear; the zoo (masks); the rule of `to`; below
TESTED_ELSEWHERE = {*LINEAR, "where", "cuda", "Unflatten", "index_put"}
WITHOUT_ONE = {aten.lerp.Tensor: "not bounded away from zero"}  # rules that only say why
ATEN: dict[object, list[tuple[Any, ...]]] = {  # where the name's samples are not this overload's; a dict: by name
    aten.add.Scalar: [(t(3, 4), 2.5), (t(3, 4), 2.5, -2)],
    aten.sub.Scalar: [(t(3, 4), 1), (t(3, 4), 1, 3)],
    aten.rsub.Scalar: [(t(3, 4), 2.5), (t(3, 4), 2.5, 2)],
    aten.div.Tensor_mode: [(t(3, 4), t(4), {"rounding_mode": None})],
    aten.div.Scalar_mode: [(t(3, 4), 0.3, {"rounding_mode": None})],
    aten.addcmul.default: [(t(3, 4), *PAIR, {"value": -2})],
    aten._to_copy.default: [
        (torch.randn(3, 4), {"dtype": torch.float64}),
        (torch.randn(3, 4), {"memory_format": torch.preserve_format}),
    ],
    prims.convert_element_type.default: [(torch.randn(3, 4).half(), torch.float32), (t(3, 4), torch.float64)],
    aten.view.default: [(t(3, 4), [12]), (t(3, 4), [-1, 2])],
    aten._unsafe_view.default: [(t(3, 4), [12])],
    aten.alias.default: [(t(3, 4),)],
    aten.detach.default: [(t(3, 4),)],
    aten.squeeze.default: [(t(3, 1, 4),)],
    aten.squeeze.dim: [(t(3, 1, 4), 1), (t(3, 1, 4), 0)],
    aten.squeeze.dims: [(t(3, 1, 1), [1, -1])],
    aten.permute.default: [(t(2, 3, 4), [-1, 0, 1]), (t(), [])],
    aten.flip.default: [(t(3, 4), [0, -1]), (t(3, 4), [])],
    prims.rev.default: [(t(3, 4), [0, 1])],
    aten.roll.default: [(t(3, 4), [1], [0]), (t(3, 4), [1, 2], [0, 1]), (t(3, 4), [5]), (t(3, 4), [5], [])],
    aten.native_channel_shuffle.default: [(t(2, 6, 3), 2)],
    aten.split.Tensor: [(t(5, 3), 2), (t(2, 6), 3, -1)],
    aten.slice.Tensor: [(t(3, 4),), (t(3, 4), 1, 0, sys.maxsize), (t(3, 4), -1, -4, 9)],  # parts: below
    aten.slice_scatter.default: [
        (t(3, 4), t(3, 2), 1, 1, 3),
        (t(5, 4), t(2, 4), 0, -4, sys.maxsize, 2),
        (t(3, 4), t(3, 4), -1),
    ],
    aten.select_scatter.default: [(t(3, 4), t(3), 1, -2), (t(3, 4), t(4), 0, 1)],
    aten.copy.default: [(t(3, 4), t(3, 4))],
    aten.expand.default: [(t(3, 4), [3, -1]), (t(3, 4), [1, 3, 4])],
    aten.lift_fresh_copy.default: [(t(3, 4),)],
}


def _sample(op: object) -> str:
    name = op_name(op)
    return name.strip("_") if name.endswith("__") else name.rstrip("_")


@pytest.mark.parametrize(
    "op", rules.registered(), ids=lambda op: f"{'method ' if isinstance(op, str) else ''}{op_name(op)}"
)
def test_every_rule_gives_its_operands_back(op: object) -> None:
    name = _sample(op)
    if name in TESTED_ELSEWHERE or op in WITHOUT_ONE:
        return
    assert op in ATEN or name in SAMPLES, f"no sample for {op}"
    for sample in ATEN.get(op) or SAMPLES[name]:
        if name in ("getitem", "index_select", "index", "_unsafe_index"):
            errors = check_inverse(Indexes(op, sample[-1]).convert(), sample[0])
        elif isinstance(sample[-1], dict):
            errors = direction_errors(Applies(op, **sample[-1]), sample[:-1])
            assert max(errors.values()) < 1e-12
        else:
            errors = check_inverse(op, sample)
        assert errors


class Applies(nn.Module):
    """An operation with arguments that only have names, on a copy of its first operand."""

    def __init__(self, op: Any, **named: Any) -> None:
        super().__init__()
        self.op, self.named = op, named

    def forward(self, first: Tensor, *rest: Any) -> Any:
        return self.op(first.clone(), *rest, **self.named)


class Unflattens(nn.Module):
    """A module with arguments of its own, kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Unflatten(1, (2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_module_that_moves_elements_gives_them_back() -> None:
    assert direction_errors(Unflattens(), [t(4, 6)]) == {"x0 <- view  (view)": 0.0}


class Indexes(nn.Module):
    """Indexing by a permutation that is a buffer, between two couplings so that a region spans it."""

    order: Tensor

    def __init__(self, op: Any, index: Any) -> None:
        super().__init__()
        self.op = op
        self.register_buffer("order", index[1] if isinstance(index, (tuple, list)) else index)

    def convert(self) -> nn.Module:
        return revfx.convert(self)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x + 0.5, x * 2
        for _ in range(4):
            a = a + torch.tanh(b)
            if _sample(self.op) == "getitem":
                a = a[:, self.order]
            elif isinstance(self.op, str):
                a = a.index_select(1, self.order)
            elif op_name(self.op).endswith("index"):
                a = self.op(a, [None, self.order])
            else:
                a = self.op(a, 1, self.order)
            b = b + torch.tanh(a)
        return torch.cat([a, b], -1)


OUTSIDE: list[tuple[Any, tuple[Any, ...], str]] = [
    (torch.mul, (t(3), 0.0), "factor is 0"),
    (torch.div, (t(3), float("inf")), "factor is inf"),
    (torch.add, (t(1, 4), t(3, 4).sum() * t(3, 4)), "broadcasts it"),
    (torch.add, (torch.arange(3), 1), "only floating-point values"),
    (torch.add, (torch.arange(3), 0.5), "only floating-point values"),
    (torch.lerp, (t(3), t(3), 1.0), "factor is 0"),
    (torch.where, (t(3) > 0, t(3), t(3)), "`where` drops"),
    (aten.div.Tensor_mode, (t(3), t(3), {"rounding_mode": "floor"}), "loses the remainder"),
    (aten.div.Scalar_mode, (t(3), 2, {"rounding_mode": "trunc"}), "loses the remainder"),
    (aten.mul.Scalar, (t(3), 0), "factor is 0"),
    (aten.rsub.Scalar, (t(3), 1, 0), "factor is 0"),
    (aten._to_copy.default, (t(3), {"dtype": torch.bfloat16}), "loses bits"),
    (prims.convert_element_type.default, (t(3), torch.float32), "loses bits"),
    (aten.expand.default, (t(3, 1), [3, 4]), "repeats it"),
    (aten.copy.default, (t(3, 4), t(1, 4)), "`copy` repeats it"),
    (aten.copy.default, (t(3, 4).float(), t(3, 4)), "loses bits"),
    (aten.slice.Tensor, (t(3, 4), 1, 0, 3), "yields nothing"),
    (aten.slice.Tensor, (t(3, 4), 0, 0, 3, 2), "yields nothing"),
    (aten.select.int, (t(3, 4), 0, -1), "yields nothing"),
    (aten.index.Tensor, (t(3, 4), [None, ORDER]), "not a constant"),
    (aten.index.Tensor, (t(3, 4), [ORDER[1:2], ORDER]), "more than one dimension"),
    (aten._unsafe_index.Tensor, (t(3, 4), [None, ORDER[1:]]), "not a constant"),
    *((op, (t(3), t(3), t(3)), reason) for op, reason in WITHOUT_ONE.items()),
]


@pytest.mark.parametrize(("op", "operands", "reason"), OUTSIDE)
def test_outside_its_domain_a_rule_refuses(op: Any, operands: tuple[Any, ...], reason: str) -> None:
    if op in (torch.add, torch.lerp) and operands[0].is_floating_point():  # the other operand can still be solved for
        assert not any(name.startswith("clone <-") for name in check_inverse(op, operands))
        return
    with pytest.raises(revfx.RevfxError, match=reason):
        if isinstance(operands[-1], dict):
            direction_errors(Applies(op, **operands[-1]), operands[:-1])
        else:
            check_inverse(op, operands)


class Parts(nn.Module):
    """Two parts of a value, as compiled graphs spell them, and a copy of it with something else in place of one."""

    def __init__(self, *parts: tuple[Any, ...], patch: tuple[Any, ...] | None = None) -> None:
        super().__init__()
        self.parts, self.patch = parts, patch

    def forward(self, x: Tensor, other: Tensor) -> Any:
        x = x.clone()
        parts = [op(x, *where) for op, *where in self.parts]
        if self.patch is None:
            return parts
        op, *where = self.patch
        return *parts, op(x, other, *where)


PUT_TOGETHER = [
    ((aten.slice.Tensor, 1, 0, 2), (aten.slice.Tensor, 1, 2, sys.maxsize)),
    ((aten.slice.Tensor, -1, -1), (aten.slice.Tensor, -1, -9, -1)),
    ((aten.slice.Tensor, 1, 0, 4, 2), (aten.slice.Tensor, 1, 1, 4, 2)),
    ((aten.slice.Tensor, 0, 1), (aten.select.int, 0, -3)),
]


@pytest.mark.parametrize("parts", PUT_TOGETHER)
def test_parts_that_tile_a_value_give_it_back(parts: Any) -> None:
    errors = direction_errors(Parts(*parts), [t(3, 4), t(0)])
    assert list(errors.values()) == [0.0]
    assert next(iter(errors)).endswith("(put together)")


@pytest.mark.parametrize(
    "parts",
    [
        ((aten.slice.Tensor, 1, 0, 2), (aten.slice.Tensor, 1, 1, 4)),  # overlap
        ((aten.slice.Tensor, 1, 0, 2), (aten.slice.Tensor, 1, 3, 4)),  # gap
        ((aten.slice.Tensor, 1, 0, 2), (aten.slice.Tensor, 0, 2, 4)),  # two dimensions
    ],
)
def test_parts_that_do_not_tile_a_value_give_nothing(parts: Any) -> None:
    with pytest.raises(revfx.RevfxError, match="yields nothing"):
        direction_errors(Parts(*parts), [t(4, 4), t(0)])


SCATTER, SELECT = aten.slice_scatter.default, aten.select_scatter.default
PATCHES: list[tuple[tuple[Any, ...], tuple[Any, ...], Tensor]] = [
    ((aten.slice.Tensor, 1, 1, 3), (SCATTER, 1, 1, 3), t(3, 2)),
    ((aten.slice.Tensor, -1, 1, 3), (SCATTER, 1, -3, -1), t(3, 2)),
    ((aten.slice.Tensor, 0, 0, 3, 2), (SCATTER, 0, 0, sys.maxsize, 2), t(2, 4)),
    ((aten.select.int, 1, -1), (SELECT, 1, 3), t(3)),
    ((aten.select.int, 0, 1), (SELECT, -2, -2), t(4)),
]


@pytest.mark.parametrize(("part", "patch", "other"), PATCHES)
def test_a_patched_copy_and_the_part_it_lacks_give_a_value_back(part: Any, patch: Any, other: Tensor) -> None:
    errors = direction_errors(Parts(part, patch=patch), [t(3, 4), other])
    assert sorted(name.rpartition(" (")[2] for name in errors) == ["patch)", f"{op_name(patch[0])})"]
    assert list(errors.values()) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("part", "patch", "other"),
    [
        ((aten.slice.Tensor, 1, 0, 2), (SCATTER, 1, 1, 3), t(3, 2)),  # another place
        ((aten.slice.Tensor, 1, 1, 2), (SCATTER, 1, 1, 3), t(3, 2)),  # less than what is lacking
        ((aten.slice.Tensor, 0, 1, 3), (SCATTER, 1, 1, 3), t(3, 2)),  # another dimension
        ((aten.select.int, 1, 1), (SCATTER, 1, 1, 2), t(3, 1)),  # another shape
    ],
)
def test_a_patched_copy_and_another_part_give_nothing(part: Any, patch: Any, other: Tensor) -> None:
    errors = direction_errors(Parts(part, patch=patch), [t(3, 4), other])
    assert [name for name in errors if name.endswith("(patch)")] == []


class Puts(nn.Module):
    """Writes by an index that a buffer holds into a copy, and takes what was there."""

    def __init__(self, index: Sequence[int], dims: int, accumulate: bool) -> None:
        super().__init__()
        self.register_buffer("index", torch.tensor(index))
        self.dims, self.accumulate = dims, accumulate

    def forward(self, x: Tensor, other: Tensor) -> Any:
        index = [None, self.index] if self.dims == 1 else [self.index] * 2
        x = x.clone()
        return aten.index_put.default(x, index, other, self.accumulate), aten.index.Tensor(x, [None, self.index])


def test_what_is_put_by_a_constant_index_is_taken_back() -> None:
    errors = direction_errors(Puts([2, -4], 1, accumulate=False), [t(3, 4), t(3, 2)])
    assert sorted(name.rpartition(" (")[2] for name in errors) == ["index_put)", "patch)"]
    assert list(errors.values()) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("index", "dims", "accumulate", "why"),
    [
        ([2, 2], 1, False, "takes a position twice"),
        ([2, 0], 1, True, "it is added to"),
        ([2, 0], 2, False, "along more than one dimension"),
    ],
)
def test_what_is_put_otherwise_is_not(index: Any, dims: int, accumulate: bool, why: str) -> None:
    with pytest.raises(revfx.RevfxError, match=why):
        direction_errors(Puts(index, dims, accumulate), [t(3, 4), t(3, 2) if dims == 1 else t(2)])


def test_registering_twice_raises_and_a_users_rule_is_used(fp64: None) -> None:
    with pytest.raises(revfx.RevfxError, match="`add` has a rule already"):
        revfx.register_inverse(torch.add)(lambda node: iter(()))

    with scaled_by(3.0):
        model = Scaled()
        converted: Any = revfx.convert(model)
        revfx.testing.assert_same_grads(converted, model, [t(5, 8).requires_grad_()])
        assert converted.revfx.plans[0].regions
        check_inverse(converted, t(5, 8).requires_grad_())


def test_a_users_rule_that_is_wrong_costs_and_is_warned_of(fp64: None) -> None:
    with scaled_by(2.0):
        model, x = Scaled(), t(512, 8).requires_grad_()
        converted: Any = revfx.convert(model)
        converted(x)  # which is learnt from
        text = r"The inverse of `Scale` \(.*test_rules.py:\d+\) does not give back"
        with pytest.warns(NotConvertedWarning, match=text):
            got = converted(x)
        assert torch.equal(got, model(x))
        for g, w in zip(
            *(torch.autograd.grad(y.sum(), [x, *model.parameters()]) for y in (got, model(x))), strict=True
        ):
            assert torch.equal(g, w)


class Scale(nn.Module):
    """Which is registered as an operation of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tensor(3.0)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = Scale()
        self.f = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f in self.f:
            a, b = self.scale(b), a + torch.tanh(f(b))
        return torch.cat([a, b], -1)


@contextmanager
def scaled_by(factor: float) -> Generator[None]:
    """A context in which the inverse of `Scale` is said to divide by that."""

    @revfx.register_inverse(Scale)
    def _(node: fx.Node) -> Iterator[rules.Direction]:
        (x,) = arguments(node, "input")
        yield Inverse(x, lambda y: y / factor, factor=factor)

    try:
        yield
    finally:
        rules.unregister_inverse(Scale)

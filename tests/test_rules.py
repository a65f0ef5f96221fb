"""Every rule in the table has a sample, solves every operand that it says it solves, and refuses outside its domain."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import revfx
from revfx import rules
from revfx.inspection import directions
from revfx.rules import Inverse, arguments, op_name
from revfx.testing import check_inverse


def t(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def far_from_zero(*shape: int) -> Tensor:
    return torch.exp(t(*shape))


PAIR = (t(3, 4), t(3, 4))
SAMPLES: dict[str, list[tuple[Any, ...]]] = {
    "add": [PAIR, (t(3, 4), t(4)), (t(3, 4), 2.5)],
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
    "t": [(t(3, 4),)],
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
    "getitem": [(t(3, 4), (slice(None), torch.tensor([2, 0, 3, 1])))],
    "index_select": [(t(3, 4), 1, torch.tensor([2, 0, 3, 1]))],
    "Identity": [(t(3, 4),)],
    "Flatten": [(t(3, 2, 4),)],
}
TESTED_ELSEWHERE = {"where", "cuda", "Unflatten"}  # in the zoo (masked couplings); the rule of `to`; below


def _sample(op: object) -> str:
    name = op_name(op)
    return name.strip("_") if name.endswith("__") else name.rstrip("_")


@pytest.mark.parametrize(
    "op", rules.registered(), ids=lambda op: f"{'method ' if isinstance(op, str) else ''}{op_name(op)}"
)
def test_every_rule_gives_its_operands_back(op: object) -> None:
    name = _sample(op)
    if name in TESTED_ELSEWHERE:
        return
    assert name in SAMPLES, f"no sample for {name}"
    for sample in SAMPLES[name]:
        if name in ("getitem", "index_select"):
            errors = check_inverse(Indexes(op, sample[-1]).convert(), sample[0])
        else:
            errors = check_inverse(op, *sample)
        assert errors


class Unflattens(nn.Module):
    """A module with arguments of its own, kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Unflatten(1, (2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_module_that_moves_elements_gives_them_back() -> None:
    assert directions(Unflattens(), [t(4, 6)]) == {"input_0 <- inner  (inner)": 0.0}


class Indexes(nn.Module):
    """Indexing by a permutation that is a buffer, between two couplings so that a region spans it."""

    order: Tensor

    def __init__(self, op: Any, index: Any) -> None:
        super().__init__()
        self.op = op
        self.register_buffer("order", index[1] if isinstance(index, tuple) else index)

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
            else:
                a = self.op(a, 1, self.order)
            b = b + torch.tanh(a)
        return torch.cat([a, b], -1)


OUTSIDE: list[tuple[Any, tuple[Any, ...], str]] = [
    (torch.mul, (t(3), 0.0), "factor is 0"),
    (torch.mul, (t(3), t(3)), "not bounded away from zero"),
    (torch.div, (t(3), float("inf")), "factor is inf"),
    (torch.add, (t(1, 4), t(3, 4).sum() * t(3, 4)), "broadcasts it"),
    (torch.add, (torch.arange(3), 1), "only floating-point values"),
    (torch.add, (torch.arange(3), 0.5), "only floating-point values"),
    (torch.lerp, (t(3), t(3), 1.0), "factor is 0"),
    (torch.where, (t(3) > 0, t(3), t(3)), "`where` drops"),
    ("to", (t(3), torch.float32), "loses bits"),
    ("half", (t(3),), "loses bits"),
    ("__getitem__", (t(3, 4), (slice(0, 2), slice(0, 2))), "more than one dimension"),
    ("view", (t(3, 4), torch.int64), "another dtype"),
]


@pytest.mark.parametrize(("op", "operands", "reason"), OUTSIDE)
def test_outside_its_domain_a_rule_refuses(op: Any, operands: tuple[Any, ...], reason: str) -> None:
    if op in (torch.add, torch.lerp) and operands[0].is_floating_point():  # the other operand can still be solved for
        assert not any(name.startswith("clone <-") for name in check_inverse(op, *operands))
        return
    with pytest.raises(revfx.RevfxError, match=reason):
        check_inverse(op, *operands)


def test_registering_twice_raises_and_a_users_rule_is_used(fp64: None) -> None:
    with pytest.raises(revfx.RevfxError, match="`add` has a rule already"):
        revfx.register_inverse(torch.add)(lambda node: iter(()))

    class Scale(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.tensor(3.0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = Scale()
            self.f = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))

        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            for f in self.f:
                a, b = self.scale(b), a + torch.tanh(f(b))
            return torch.cat([a, b], -1)

    @revfx.register_inverse(Scale)
    def _(node: fx.Node) -> Iterator[rules.Direction]:
        (x,) = arguments(node, "input")
        yield Inverse(x, lambda y: y / 3, factor=3.0)

    try:
        model = Model()
        converted: Any = revfx.convert(model)
        revfx.testing.assert_same_grads(converted, model, [t(5, 8).requires_grad_()])
        assert converted.revfx.plans[0].regions
        check_inverse(converted, t(5, 8).requires_grad_())
    finally:
        rules.unregister_inverse(Scale)


def test_wrong_rule_of_a_user_is_found_by_check_inverse(fp64: None) -> None:
    @revfx.register_inverse("cosh")
    def _(node: fx.Node) -> Iterator[rules.Direction]:
        yield Inverse(node.args[0], lambda y: y - 1)

    try:
        with pytest.raises(AssertionError, match="the inverse is off by"):
            check_inverse("cosh", t(3))
    finally:
        rules.unregister_inverse("cosh")

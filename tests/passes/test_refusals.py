"""The negative table: what has no inverse, or none that can be trusted, is left alone, and the reason is said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from steps import STEPS
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import D, Pairs, mlp

import revfx
from revfx.compiled.partitioner import reports
from revfx.errors import NotConvertedWarning, Reason
from revfx.info import ConversionInfo
from revfx.testing import assert_same_grads


DEPTH = 4


def conversion(model: nn.Module) -> ConversionInfo:
    return model.revfx  # type: ignore[return-value]


class Chain(nn.Module):
    """`step(x, f, g)` repeated on a tensor, or on two streams where `streams` is 2."""

    def __init__(self, step: Callable[..., object], streams: int = 2) -> None:
        super().__init__()
        self.step, self.streams = step, streams
        width = D if streams == 2 else 2 * D
        self.f = nn.ModuleList(mlp(width) for _ in range(DEPTH))
        self.g = nn.ModuleList(mlp(width) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        state: Any = x.chunk(2, -1) if self.streams == 2 else (x,)
        for f, g in zip(self.f, self.g, strict=True):
            state = self.step(*state, f, g)
        return torch.cat(list(state), -1)


def resnet(x: Tensor, f: nn.Module, g: nn.Module) -> tuple[Tensor]:
    return (x + f(x),)


def resnet_written_out(x: Tensor, f: nn.Module, g: nn.Module) -> tuple[Tensor]:
    return (x + (f(x) * 0.5 + x),)


def relu_between(a: Tensor, b: Tensor, f: nn.Module, g: nn.Module) -> tuple[Tensor, Tensor]:
    a = torch.relu(a + f(b))
    b = torch.relu(b + g(a))
    return a, b


def times_zero(a: Tensor, b: Tensor, f: nn.Module, g: nn.Module) -> tuple[Tensor, Tensor]:
    return a * 0 + f(b), b * 0 + g(a)


def squared(a: Tensor, b: Tensor, f: nn.Module, g: nn.Module) -> tuple[Tensor, Tensor]:
    return a**2 + f(b), b.square() + g(a)


def sine(a: Tensor, b: Tensor, f: nn.Module, g: nn.Module) -> tuple[Tensor, Tensor]:
    return torch.sin(a) + f(b), torch.sin(b) + g(a)


def arbitrary_product(a: Tensor, b: Tensor, f: nn.Module, g: nn.Module) -> tuple[Tensor, Tensor]:
    return a * f(b), b * g(a)


def down_cast(a: Tensor, b: Tensor, f: nn.Module, g: nn.Module) -> tuple[Tensor, Tensor]:
    return a.to(torch.float32).to(a.dtype) + f(b), b.to(torch.bfloat16).to(b.dtype) + g(a)


def broadcast(a: Tensor, b: Tensor, f: nn.Module, g: nn.Module) -> tuple[Tensor, Tensor]:
    return a.mean(0, keepdim=True) + f(b), b.mean(0, keepdim=True) + g(a)


def twice(a: Tensor, b: Tensor, f: nn.Module, g: nn.Module) -> tuple[Tensor, Tensor]:
    return (a + a) * f(b), (b + b) * g(a)


def itself_less_itself(a: Tensor, b: Tensor, f: nn.Module, g: nn.Module) -> tuple[Tensor, Tensor]:
    return (a - a) + f(b), (b - b) + g(a)


def overlapping(x: Tensor, f: nn.Module, g: nn.Module) -> tuple[Tensor]:
    return (torch.cat([x[:, :5], x[:, 3:]], -1)[:, : 2 * D] * 1.5 + 1,)


def over_determined(x: Tensor, f: nn.Module, g: nn.Module) -> tuple[Tensor]:
    return (torch.tanh(x) * 2 + f(x),)


NOTHING_FOUND = [
    (resnet, 1, Reason.NO_COUPLING, "computed from itself"),
    (resnet_written_out, 1, Reason.NO_COUPLING, "computed from itself"),
    (relu_between, 2, Reason.NON_INVERTIBLE, "`relu` maps all negative numbers to 0"),
    (times_zero, 2, Reason.ZERO_FACTOR, "the factor is 0"),
    (squared, 2, Reason.NON_INVERTIBLE, "loses the sign"),
    (sine, 2, Reason.NON_INVERTIBLE, "`sin` is periodic"),
    (broadcast, 2, Reason.NO_RULE, "`mean` has no inverse"),
    (twice, 2, Reason.NON_INVERTIBLE, "both operands of `add` are the same value"),
    (itself_less_itself, 2, Reason.NON_INVERTIBLE, "both operands of `sub` are the same value"),
    (overlapping, 1, Reason.NON_INVERTIBLE, "no inverse"),
]
WITHOUT_CODES = [
    (arbitrary_product, 2, Reason.ZERO_FACTOR, "not bounded away from zero"),
    (down_cast, 2, Reason.LOSES_BITS, "loses bits"),
    (over_determined, 1, Reason.NON_INVERTIBLE, "saturates"),
]


@pytest.mark.parametrize(("step", "streams", "kind", "text"), NOTHING_FOUND, ids=lambda v: getattr(v, "__name__", None))
def test_what_has_no_inverse_is_left_alone_and_said(
    step: Callable[..., object], streams: int, kind: Reason, text: str, fp64: None
) -> None:
    model = Chain(step, streams)
    x = torch.randn(6, 2 * D, requires_grad=True)
    converted = revfx.convert(model)
    with pytest.warns(NotConvertedWarning, match="nothing reversible was found"):
        converted(x)
    assert conversion(converted).plans == ()
    refusals = conversion(converted).refusals
    kinds = [r.kind for r in refusals if text in str(r)]
    assert kinds and set(kinds) == {kind}, refusals
    assert any(r.where.startswith(__file__) for r in refusals), refusals
    for _ in range(STEPS):
        assert_same_grads(converted, model, [x])
    with pytest.raises(revfx.NotReversibleError, match="left as it was") as raised:
        revfx.convert(model, strict=True)(x)
    assert kind in {r.kind for r in raised.value.refusals}


@pytest.mark.parametrize(("step", "streams", "kind", "text"), WITHOUT_CODES, ids=lambda v: getattr(v, "__name__", None))
def test_inverses_that_need_a_code_are_refused_in_a_compiled_graph(
    step: Callable[..., object], streams: int, kind: Reason, text: str, fp64: None
) -> None:
    torch.compiler.reset()
    with reports() as found:
        options: dict[str, Any] = {"inner": "aot_eager", "exact": False}
        torch.compile(Chain(step, streams), backend="revfx", options=options)(torch.randn(6, 2 * D, requires_grad=True))
    (report,) = found
    assert not report.regions
    assert {r.kind for r in report.refusals if text in str(r)} == {kind}, report.refusals


class Masked(Chain):
    """Residual blocks that all read a mask, and a loss that reads a target: both are known wherever one looks."""

    def forward(self, x: Tensor, mask: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        x = x.sin()
        for f in self.f:
            x = x + f(x * mask)
        return (x.tanh() - target).square().mean()


def test_reason_is_the_nearest_one_where_a_mask_and_a_target_are_known_everywhere(fp64: None) -> None:
    converted = revfx.convert(Masked(resnet, 1))
    x = torch.randn(6, 2 * D, requires_grad=True)
    with pytest.warns(NotConvertedWarning, match="nothing reversible was found"):
        converted(x, torch.rand(6, 2 * D), torch.randn(6, 2 * D))
    found = [r for r in conversion(converted).refusals if r.kind is Reason.NO_COUPLING]
    assert any(r.nodes[0] == "add" and "computed from itself" in r.detail for r in found)


# --- atoms
def relu_first(d: int = D) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d))


class ReluPairs(Pairs):
    def __init__(self, depth: int = DEPTH) -> None:
        super().__init__(depth)
        self.f = nn.ModuleList(relu_first() for _ in range(depth))
        self.g = nn.ModuleList(relu_first() for _ in range(depth))

    def couple(self, a: Tensor, b: Tensor) -> Tensor:
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            b = b + g(a)
        return torch.cat([a, b], -1)


class ZeroImages(ReluPairs):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return self.couple(a, b)


class Stem(ReluPairs):
    """A stem that ends in an operation with atoms, through `after`, before couplings whose f begins with relu."""

    def __init__(self, made: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor] = lambda t: t) -> None:
        super().__init__()
        self.linear, self.made, self.after = nn.Linear(2 * D, 2 * D), made, after
        self.bias = nn.Parameter(torch.zeros(2 * D))

    def forward(self, x: Tensor) -> Tensor:
        a, b = (self.after(self.made(self.linear(x))) + self.bias).chunk(2, -1)
        return self.couple(a, b)


class ReluInTheMiddle(ReluPairs):
    """`r = relu(..); y = r + f(b)`: r has an inverse by shape, and must not be given back by it."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            r = torch.relu(a)
            a = a + g(b)
            y = r + f(b)
            b = b + y
        return torch.cat([a, b], -1)


class EndsInRelu(ReluPairs):
    """Zeros meet zeros: inputs with exact zeros, and functions that return exact zeros."""

    def __init__(self) -> None:
        super().__init__()
        for fs in (self.f, self.g):
            for f in fs:
                f.append(nn.ReLU())  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return self.couple(a, b)


def pool(t: Tensor) -> Tensor:
    return F.max_pool1d(t.abs().unsqueeze(1), 3, 1, 1).squeeze(1) * (t > 0)


ATOMS: list[Callable[[], nn.Module]] = [
    ZeroImages,
    ReluInTheMiddle,
    EndsInRelu,
    lambda: Stem(torch.relu),
    lambda: Stem(lambda t: t.clamp(min=0)),
    lambda: Stem(torch.abs, lambda t: torch.relu(t - 0.5)),
    lambda: Stem(pool),
    lambda: Stem(lambda t: F.dropout(t, 0.5)),
    lambda: Stem(
        torch.relu,
        lambda t: t.view(-1, 2, D).transpose(0, 1).reshape(2, -1).view(2, -1, D).transpose(0, 1).reshape(-1, 2 * D),
    ),
    lambda: Stem(torch.relu, lambda t: torch.cat([t[:, D:], t[:, :D]], -1)),
    lambda: Stem(torch.relu, lambda t: t.flip(-1) * 0.5),
]


@pytest.mark.parametrize("make", ATOMS)
def test_exact_zeros_are_never_given_back_by_a_rounding_inverse(make: Callable[[], nn.Module], fp64: None) -> None:
    model = make()
    x = torch.relu(torch.randn(64, 2 * D)).requires_grad_()
    assert (x == 0).any()
    converted = revfx.convert(model)
    for _ in range(STEPS):
        assert_same_grads(converted, model, [x])
    assert conversion(converted).plans, "still found"


def test_exact_zeros_in_the_streams_of_a_block(fp64: None) -> None:
    model = ReluPairs()
    for fs in (model.f, model.g):
        for f in fs:
            f.append(nn.ReLU())  # type: ignore[operator]

    def block(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return revfx.rev_block(a, b, model.f, model.g, DEPTH)

    def plain(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        for f, g in zip(model.f, model.g, strict=True):
            a = a + f(b)
            b = b + g(a)
        return a, b

    a, b = (torch.relu(torch.randn(64, D)).requires_grad_() for _ in range(2))
    for _ in range(STEPS):
        assert_same_grads(block, plain, [a, b])

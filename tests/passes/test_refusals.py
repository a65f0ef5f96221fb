"""The negative table: what has no inverse, or none that can be trusted, is left alone, and the reason is said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import unseen
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import Additive, D, Pairs, mlp

import revfx
from revfx.compiled.partitioner import reports
from revfx.errors import NotConvertedWarning, Reason
from revfx.info import ConversionInfo
from revfx.testing import assert_same_grads, gradients, relative_error


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


def tiling(x: Tensor, f: nn.Module, g: nn.Module) -> tuple[Tensor]:
    h, w = x.shape[0] // 2, D
    top = torch.cat([x[:h, :w] + 1, x[:h, w:] + 2], 1)
    low = torch.cat([x[h:, :w] + 3, x[h:, w:] + 4], 1)
    return (torch.cat([top, low], 0) * 2,)


def over_determined(x: Tensor, f: nn.Module, g: nn.Module) -> tuple[Tensor]:
    return (torch.tanh(x) * 2 + f(x),)


def alias_read_later(a: Tensor, b: Tensor, f: nn.Module, g: nn.Module) -> tuple[Tensor, Tensor]:
    h = f(b)
    alias = h.view(-1, D)
    h += 1
    return a + alias, b + g(alias)


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
    (tiling, 1, Reason.LAYOUT, "along more than one dimension"),
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


def test_write_with_an_alias_that_is_read_later_is_never_made_functional(fp64: None) -> None:
    model = Chain(alias_read_later)
    x = torch.randn(6, 2 * D, requires_grad=True)
    converted = revfx.convert(model)
    with pytest.warns(NotConvertedWarning):
        converted(x)
    found = [r for r in conversion(converted).refusals if r.kind is Reason.WRITES_IN_PLACE]
    assert any("is read later" in str(r) for r in found)
    assert torch.equal(converted(x), model(x))
    assert_same_grads(converted, model, [x])


class WritesItsInput(Pairs):
    def forward(self, x: Tensor) -> Tensor:
        x += 1
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            b = b + g(a)
        return torch.cat([a, b], -1)


def test_write_to_an_input_of_the_model_happens_as_the_user_wrote_it(fp64: None) -> None:
    model = WritesItsInput(DEPTH)
    converted = revfx.convert(model)
    x = torch.randn(6, 2 * D)
    mine, theirs = x.clone(), x.clone()
    out = converted(mine)
    assert torch.equal(out, model(theirs)) and torch.equal(mine, theirs) and not torch.equal(mine, x)
    out.sin().sum().backward()
    got = [p.grad for p in model.parameters()]
    want = gradients(model, [x])
    assert all(
        g is not None and w is not None and relative_error(g, w) < 1e-9 for g, w in zip(got, want.values(), strict=True)
    )
    assert len(conversion(converted).regions) == 1, "the couplings after the write are reversible"


class ZerosItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        x.mul_(0.5)
        return h


def test_opaque_function_that_writes_its_input_is_never_regenerated(fp64: None) -> None:
    model = Additive(DEPTH)
    model.f[2] = ZerosItsInput()
    model.f[2].register_forward_hook(lambda *_: None)  # keeps it whole
    x = torch.randn(6, 2 * D)
    converted = revfx.convert(model)
    out = converted(x)
    found = [r for r in conversion(converted).refusals if r.kind is Reason.WRITES_IN_PLACE]
    assert any("writes to its input in place" in str(r) for r in found)
    assert torch.equal(out, model(x.clone()))


class WritesWhenArmed(nn.Module):
    """Writes its input once it is armed, which a plan does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.armed = unseen()

    def forward(self, x: Tensor) -> Tensor:
        if self.armed.values:
            x.detach().mul_(0.5)
        return torch.tanh(x)


def test_write_that_only_the_run_shows_is_noticed_in_the_forward(fp64: None) -> None:
    model = Additive(DEPTH)
    spoiled = WritesWhenArmed()
    model.f[1] = nn.Sequential(nn.Identity(), spoiled)
    converted = revfx.convert(model)
    x = torch.randn(6, 2 * D)
    converted(x)
    spoiled.armed.values.append(True)
    with pytest.raises(revfx.NotReversibleError, match=r"`f\.1` .*writes to its input in place"):
        converted(x)


# --- state changed between forward and backward
def _write(t: Tensor) -> None:
    with torch.no_grad():
        t.add_(1)


def _swap(t: Tensor) -> None:
    t.data = t.data.clone() + 1


class WithBuffer(nn.Module):
    big: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.register_buffer("big", torch.randn(4097, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.big[: x.shape[0]]


@pytest.mark.parametrize("change", [_write, _swap])
@pytest.mark.parametrize("which", ["weight", "bias", "buffer"])
def test_change_between_forward_and_backward_raises(change: Callable[[Tensor], None], which: str, fp64: None) -> None:
    model = Additive(DEPTH)
    model.f[1] = WithBuffer()
    x = torch.randn(6, 2 * D, requires_grad=True)
    out = revfx.convert(model)(x).sin().sum()
    linear = model.f[1].inner[0]  # type: ignore[union-attr,index]
    change({"weight": linear.weight, "bias": linear.bias, "buffer": model.f[1].big}[which])  # type: ignore[dict-item,arg-type]
    with pytest.raises(revfx.RevfxError, match="modified in place"):
        out.backward()


class SideInput(Pairs):
    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b + side)
            b = b + g(a)
        return torch.cat([a, b], -1)


def test_side_input_written_between_forward_and_backward_raises(fp64: None) -> None:
    model, side = SideInput(DEPTH), torch.randn(6, D)
    out = revfx.convert(model)(torch.randn(6, 2 * D, requires_grad=True), side)
    side.add_(1)
    with pytest.raises(revfx.RevfxError, match="modified in place"):
        out.sum().backward()


def test_output_written_in_place_raises(fp64: None) -> None:
    out = revfx.convert(Additive(DEPTH))(torch.randn(6, 2 * D, requires_grad=True))
    loss = out.sum()
    out.detach().add_(1)
    with pytest.raises(revfx.RevfxError, match="modified in place"):
        loss.backward()


class Moody(nn.Module):
    """Saves other tensors when run again."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.mood = mlp(), unseen()
        self.mood.good = True

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return torch.tanh(h) if self.mood.good else h


def test_function_that_saves_other_tensors_in_the_rerun_raises(fp64: None) -> None:
    model = Additive(DEPTH)
    moody = Moody()
    model.f[1] = moody
    out = revfx.convert(model)(torch.randn(6, 2 * D, requires_grad=True))
    moody.mood.good = False
    with pytest.raises(revfx.RevfxError, match="save the same tensors"):
        out.sin().sum().backward()


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
    assert_same_grads(block, plain, [a, b])

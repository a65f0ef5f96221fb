"""What rounding does to compiled regions: constant rows, factors that contract, and the checks that see it, or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled import INNERS, QUIET, check, compiled, fresh as fresh, inverted
from helpers import TOLERANCE, leaf, relative_error
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import D, Pairs, mlp

import revfx


pytestmark = QUIET


class Ends(nn.Module):
    """A function with a kink at a constant that its input may hold exactly."""

    def __init__(self, kink: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.kink, self.first, self.second = kink, nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, t: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(self.kink(t))))


class Stemmed(nn.Module):
    """A stem whose rows of zeros come out as its bias, and couplings behind it."""

    def __init__(self, kink: Callable[[Tensor], Tensor], bias: float, depth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(2 * D, 2 * D)
        nn.init.constant_(self.stem.bias, bias)
        self.f = nn.ModuleList(Ends(kink) for _ in range(depth))
        self.g = nn.ModuleList(Ends(kink) for _ in range(depth))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.stem(x).chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            b = b + g(a)
        return a, b


def padded(rows: int = 8) -> Tensor:
    x = torch.randn(rows, 2 * D)
    x[2:5] = 0
    return x.requires_grad_()


@pytest.mark.parametrize("inner", INNERS)
def test_rows_of_zeros_come_back_as_zeros(inner: str) -> None:
    assert inverted(check(Stemmed(torch.relu, 0.0), inner, padded())) >= 6


def test_constant_rows_come_back_as_they_were() -> None:
    assert inverted(check(Stemmed(lambda t: F.hardtanh(t, -0.3, 0.3), 0.3), "aot_eager", padded())) >= 6


def test_constant_rows_in_eager_mode() -> None:
    for model in (Stemmed(torch.relu, 0.0), Stemmed(lambda t: F.hardtanh(t, -0.3, 0.3), 0.3)):
        x = padded()
        got, want = (
            torch.autograd.grad(sum(y.sin().sum() for y in m(x)), [x, *model.parameters()])  # type: ignore[arg-type]
            for m in (revfx.convert(model), model)
        )
        assert relative_error(got, want) < TOLERANCE


# --- factors that make rounding grow
class Contracting(Pairs):
    """`a = a*exp(s) + f(b)` with s = `low` in two columns and 0 in all others."""

    def __init__(self, low: float, depth: int = 4) -> None:
        super().__init__(depth)
        start = torch.zeros(D)
        start[5], start[7] = low, low
        self.s = nn.ParameterList(start.clone() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g, s in zip(self.f, self.g, self.s, strict=True):
            a = a * torch.exp(s) + f(b)
            b = b + g(a)
        return torch.cat([a, b], -1)


class Saturated(Pairs):
    """Factors exp(2*tanh(.)), bounded from below, of which one column is at the bound."""

    def __init__(self) -> None:
        super().__init__(16)
        for f in self.f:
            last: Any = f[-1]  # type: ignore[index]
            last.bias.data[3:7] = -20.0

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a, b = b, a * torch.exp(2 * torch.tanh(f(b))) + g(b)
        return torch.cat([a, b], -1)


@pytest.mark.parametrize(
    "make", [lambda: Contracting(-5.0), pytest.param(Saturated, marks=pytest.mark.deep)], ids=["exp", "bounded"]
)
def test_inputs_of_contractions_are_kept(make: Callable[[], nn.Module]) -> None:
    model, x = make().float(), torch.randn(64, 2 * D, dtype=torch.float32, requires_grad=True)
    want = torch.autograd.grad(model(x).sin().sum(), [x, *model.parameters()])
    got = torch.autograd.grad(compiled(model, "aot_eager", exact=False)(x).sin().sum(), [x, *model.parameters()])
    assert relative_error(got, want) < 1e-5


class BothWays(nn.Module):
    """A factor of the data multiplies one stream and divides the other."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = (nn.ModuleList(nn.Linear(4, 4) for _ in range(3)) for _ in "fg")

    def forward(self, a: Tensor, b: Tensor, s: Tensor) -> Tensor:
        factor = s.exp()
        for f, g in zip(self.f, self.g, strict=True):
            a = a * factor + f(b).sin()
            b = b / factor + g(a).sin()
        return torch.cat([a, b], -1)


@pytest.mark.parametrize("exponent", [-17.0, 17.0])
def test_a_factor_that_multiplies_and_divides_is_looked_at_both_ways(exponent: float) -> None:
    """Only the last coupling's way was: gradients were 1 % off in fp64, silently."""
    a, b, s = (torch.randn(101, 4) for _ in range(3))
    s = s * 0.1
    s[50, 2] = exponent
    model, wanted = BothWays(), [a.requires_grad_(), b, s]
    got = torch.autograd.grad(compiled(model, "aot_eager", exact=False)(*wanted).sin().sum(), [a, *model.parameters()])
    want = torch.autograd.grad(model(*wanted).sin().sum(), [a, *model.parameters()])
    assert relative_error(got, want) < TOLERANCE


@pytest.mark.parametrize("inner", INNERS)
def test_a_little_contraction_is_let_pass(inner: str) -> None:
    assert inverted(check(Contracting(-1.0), inner, leaf(16, 2 * D))) >= 6


@pytest.mark.parametrize("inner", INNERS)
def test_whole_numbers_may_divide(inner: str) -> None:
    class Counts(Pairs):
        def forward(self, x: Tensor) -> Tensor:
            n = (x > 0).sum(-1, keepdim=True).clamp(min=1)
            a, b = x.chunk(2, -1)
            for f, g in zip(self.f, self.g, strict=True):
                a = (a + f(b)) / n
                b = b + g(a)
            return torch.cat([a, b], -1)

    assert inverted(check(Counts(3), inner, leaf(16, 2 * D))) >= 5


# --- no false alarms
class DeadColumns(nn.Module):
    """The first column of each stream is zero where the couplings begin: a sample may not consist of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(2 * D, 2 * D)
        for t in self.stem.parameters():
            t.data[[0, D]] = 0
        self.f, self.g = nn.ModuleList(mlp() for _ in range(4)), nn.ModuleList(mlp() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            b = b + g(a)
        return torch.cat([a, b], -1)


@pytest.mark.parametrize("rows", [120, 128])
def test_a_column_of_zeros_raises_no_alarm(rows: int) -> None:
    check(DeadColumns(), "aot_eager", leaf(rows, 2 * D))


def test_a_stream_that_starts_as_zeros_raises_no_alarm() -> None:
    class Zeros(Pairs):
        def forward(self, x: Tensor) -> Tensor:
            a, b = x, torch.zeros_like(x) * x
            for f, g in zip(self.f, self.g, strict=True):
                a = a + f(b)
                b = b + g(a)
            return torch.cat([a, b], -1)

    check(Zeros(4), "aot_eager", leaf(64, D))


# --- options
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": "aot_eager", "toleranc": 1e-3}, "unknown options .'toleranc'.: neither revfx"),
        ({"Inner": "aot_eager"}, "unknown options .'Inner'.: neither revfx"),
        ({"inner": "aot_eager", "max_autotune": True}, "takes no mode and no options of inductor"),
        ({"strict": "no"}, "`strict='no'` must be True or False"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    run = torch.compile(mlp(), backend="revfx", options=options)
    with pytest.raises(Exception, match=message):
        run(torch.randn(2, D))

"""Codes in graphs that eager kernels run: what comes back is what was there, to the last bit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled import QUIET, same
from helpers import leaf
from torch import Tensor, nn
from zoo import Additive, D, Pairs

from revfx.compiled import coded
from revfx.errors import NondeterminismWarning, RegenerationError, RevfxWarning
from revfx.testing import measure_memory


pytestmark = QUIET
DEPTH, ROWS = 6, 64
Couple = Callable[[Tensor, Tensor, nn.Module, nn.Module], tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


def by_eager_kernels(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="revfx", options={"inner": "aot_eager", **options})


def trained(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, steps: int = 3) -> list[Tensor]:
    """The losses of some steps of training, the gradients of their inputs, and the weights after them."""
    torch.manual_seed(1)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    found: list[Tensor] = []
    for _ in range(steps):
        x = x.detach().requires_grad_()
        optimiser.zero_grad()
        loss = run(x).float().square().mean()
        loss.backward()
        optimiser.step()
        assert x.grad is not None
        found += [loss.detach(), x.grad]
    return [*found, *(p.detach() for p in model.parameters())]


class Coupled(Pairs):
    def __init__(self, couple: Couple) -> None:
        super().__init__(DEPTH)
        self.couple = couple

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a, b = self.couple(a, b, f, g)
        return torch.cat([a, b], -1)


HARD: dict[str, Couple] = {
    "factors that underflow": lambda a, b, f, g: (a * (30 * f(b) - 60).exp() + g(b), b + f(a)),
    "huge masks": lambda a, b, f, g: (a + f(b).masked_fill(b > 1, -1e9), b + g(a)),
    "numbers told apart": lambda a, b, f, g: (a + f(b.relu().floor()), b + g((a == 0).to(a.dtype))),
    "saturation": lambda a, b, f, g: ((a + f(b)).tanh(), b + g(a).sigmoid()),
    "momentum": lambda a, b, f, g: (0.9 * a + 0.1 * f(b), b + 0.9 * a + 0.1 * f(b)),
    "a blend": lambda a, b, f, g: (b, 0.5 * a + 0.5 * b + 0.2 * f(b)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", HARD)
def test_training_is_as_by_torchs_own_eager_kernels(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Coupled(HARD[name]).to(dtype)
    x = torch.randn(ROWS, 2 * D).relu().to(dtype)
    other, plain = copy.deepcopy(model), copy.deepcopy(model)
    got = trained(by_eager_kernels(model, strict=True), model, x)
    assert same(got, trained(plain, plain, x)) or same(
        got, trained(torch.compile(other, backend="aot_eager"), other, x)
    )


class Turned(nn.Module):
    """Couplings of complex streams."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.w = nn.ParameterList(torch.randn(8, 8, dtype=dtype) for _ in range(2 * DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for w in self.w:
            a, b = b, a + (b @ w).sin().tanh()
        return torch.cat([a, b], -1)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_streams(dtype: torch.dtype) -> None:
    model, x = Turned(dtype), torch.randn(ROWS, 16, dtype=dtype, requires_grad=True)
    found = [
        torch.autograd.grad(run(x).abs().square().mean(), [x, *model.parameters()])
        for run in (by_eager_kernels(model, strict=True), model)
    ]
    assert same(*found)


def test_codes_are_all_that_grows_with_depth() -> None:
    x, kept = leaf(1024, 2 * D, dtype=torch.float32), list[int]()
    for depth in (4, 12):
        torch.compiler.reset()
        model = Additive(depth)
        run = by_eager_kernels(model)
        run(x).square().mean().backward()
        kept.append(measure_memory(lambda run=run: run(x).square().mean()).kept)
    couplings, elements = 2 * (12 - 4), 1024 * D
    assert 0.1 < (kept[1] - kept[0]) / (couplings * elements) < 0.6


# --- never silent
def off_by(much: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have values come back with a relative error."""
    decode = coded.Coder.decode
    monkeypatch.setattr(coded.Coder, "decode", lambda *args: decode(*args) * (1 + much))


@pytest.mark.parametrize(
    ("much", "message"), [(1e-6, "differs from the forward's by rounding"), (0.5, "does not match the forward's")]
)
def test_what_is_off_is_said(much: float, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    off_by(much, monkeypatch)
    model, x = Additive(DEPTH), leaf(ROWS, 2 * D, dtype=torch.float32)
    loss = by_eager_kernels(model)(x).square().mean()
    if much < 0.1:
        with pytest.warns(RevfxWarning, match=message):
            loss.backward()
        return
    with pytest.raises(RegenerationError, match=message):
        loss.backward()
    assert x.grad is None


def test_codes_that_found_no_room_are_warned_of_and_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("codes.codec", "compiled.coded"):
        monkeypatch.setattr(f"revfx.{module}.is_counted", lambda t: False)
    monkeypatch.setattr("revfx.codes.implementations.CHOICE", "aten")  # C counts
    model, x = Additive(DEPTH), leaf(1024, 2 * D, dtype=torch.float32)
    run = by_eager_kernels(model)

    def step(call: Any) -> list[Tensor]:
        return list(torch.autograd.grad(call(x).sin().mean(), [x, *model.parameters()]))

    plain = step(model)
    with monkeypatch.context() as patch:
        patch.setattr("revfx.codes.codec.CAPACITY_FACTOR", 0.5)
        patch.setattr("revfx.codes.codec.MIN_CAPACITY", 0)
        with pytest.warns(NondeterminismWarning, match="correction buffer overflowed"):
            assert not same(step(run), plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RevfxWarning)
        for _ in range(4):
            assert same(step(run), plain), "measured again"

"""Randomness in compiled couplings: a regenerated function sees the random numbers of the forward, and no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled import INNERS, QUIET, ROWS, WIDTH, compiled, fresh as fresh
from helpers import TOLERANCE, Outcome, deep_but, leaf, outcome, relative_error
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from ways import Plain

from revfx.compiled.partitioner import reports
from revfx.testing import measure_memory


pytestmark = QUIET
Noise = Callable[[Tensor], Tensor]


# --- what draws
class Noisy(nn.Module):
    """A small network with noise in the middle of it."""

    def __init__(self, noise: Noise, width: int = WIDTH) -> None:
        super().__init__()
        self.noise = noise
        self.first, self.last = nn.Linear(width, 6), nn.Linear(6, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.noise(self.first(x).tanh()))


class Convolved(nn.Module):
    """Dropout of whole channels between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, (1, 3), padding=(0, 1)), nn.Conv2d(4, 1, (1, 3), padding=(0, 1))
        self.drop = nn.Dropout2d(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.first(x.view(-1, 1, 1, WIDTH)).tanh())).view(-1, WIDTH)


class Attends(nn.Module):
    """Self-attention among the rows."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.qkv, self.dropout = nn.Linear(WIDTH, 3 * WIDTH), dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(1, -1, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout)
        return y.transpose(1, 2).reshape(-1, WIDTH)


def twice(h: Tensor) -> Tensor:
    return F.dropout(F.dropout(h, 0.3).sin(), 0.3)


def rows_dropped(h: Tensor) -> Tensor:
    return h * (torch.rand(h.shape[0], 1) < 0.6)


def of_normals(h: Tensor) -> Tensor:
    return (h + torch.randn_like(h)).tanh()


def of_integers(h: Tensor) -> Tensor:
    return h * torch.randint(1, 5, h.shape)


def permuted(h: Tensor) -> Tensor:
    return h[torch.randperm(h.shape[0])]


def from_its_own_values(h: Tensor) -> Tensor:
    return torch.bernoulli(h.detach().sigmoid()) * h


def checkpointed(h: Tensor) -> Tensor:
    result: Any = checkpoint(lambda h: F.dropout(h.sin(), 0.5).cos(), h, use_reentrant=False)
    return result


KINDS: dict[str, Callable[[], nn.Module]] = {
    "nn.Dropout": lambda: Noisy(nn.Dropout(0.5)),
    "in place": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5, inplace=True), nn.Tanh()),
    "F.dropout": lambda: Noisy(lambda h: F.dropout(h, 0.3)),
    "nothing dropped": lambda: Noisy(lambda h: F.dropout(h, 0.0)),
    "alpha": lambda: Noisy(nn.AlphaDropout(0.3)),
    "rrelu": lambda: Noisy(lambda h: F.rrelu(h, training=True)),
    "twice": lambda: Noisy(twice),
    "Dropout2d": Convolved,
    "bernoulli": lambda: Noisy(lambda h: h * torch.bernoulli(torch.full_like(h, 0.5))),
    "bernoulli of its own values": lambda: Noisy(from_its_own_values),
    "bernoulli_": lambda: Noisy(lambda h: h * torch.empty_like(h).bernoulli_(0.5)),
    "rows": lambda: Noisy(rows_dropped),
    "uniform": lambda: Noisy(lambda h: h * torch.rand_like(h)),
    "uniform_": lambda: Noisy(lambda h: h * torch.empty_like(h).uniform_(-1, 1)),
    "normals": lambda: Noisy(of_normals),
    "integers": lambda: Noisy(of_integers),
    "permutation": lambda: Noisy(permuted),
    "gumbel": lambda: Noisy(lambda h: F.gumbel_softmax(h, tau=0.7)),
    "checkpoint": lambda: Noisy(checkpointed),
    "attention": lambda: Attends(0.0),
    "attention with dropout": lambda: Attends(0.4),
}


# Compiling C++ takes long: inductor gets several kinds in one model.
FUSED = ("nn.Dropout", "rows") * 2
LIKE_OTHERS = (
    *("F.dropout", "nothing dropped", "alpha", "rrelu", "bernoulli", "bernoulli_", "uniform", "integers", "gumbel"),
    "attention",
)
BY_KERNELS = (
    "checkpoint", "attention with dropout", "alpha", "rrelu", "Dropout2d", "uniform_", "bernoulli", "attention",
)  # fmt: skip


def couplings(*kinds: str) -> Plain:
    """Couplings whose functions are of these kinds, in turn f and g."""
    return Plain([KINDS[k]() for k in kinds[::2]], [KINDS[k]() for k in kinds[1::2]])


# --- what it is compared with
def reference(model: nn.Module, inner: str, **options: Any) -> Callable[..., Any]:
    """Plain eager; where inductor's random numbers are its own, what torch compiles with it."""
    torch.compiler.reset()
    return torch.compile(model) if inner == "inductor" and not options else model


def assert_alike(got: Outcome, expected: Outcome, exact: bool) -> None:
    """Outputs (to the bit where the kernels are the same), gradients, buffers and the random state agree."""
    if exact:
        assert all(torch.equal(a, b) for a, b in zip(got.outputs, expected.outputs, strict=True))
    assert relative_error(got.outputs, expected.outputs) < TOLERANCE
    assert relative_error(got.buffers, expected.buffers) < TOLERANCE
    assert torch.equal(got.random, expected.random)
    assert relative_error(got.input_grads, expected.input_grads) < TOLERANCE
    assert relative_error(got.parameter_grads, expected.parameter_grads) < TOLERANCE


Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def check(model: nn.Module, inner: str, wrap: Wrap = lambda call: call, **options: Any) -> None:
    """A region is found, and a step gives and leaves what the reference does; `wrap` makes the program of a call."""
    x = leaf(ROWS, 2 * WIDTH)
    with reports() as found:
        call = wrap(compiled(model, inner, **options))
        got = [outcome(call, [x], model, seed) for seed in (0, 1)]
    assert [len(r.regions) for r in found] == [1], found
    assert found[0].regions[0].inverted >= 2
    plain = wrap(reference(model, inner, **options))
    for seed in (0, 1):
        assert_alike(got[seed], outcome(plain, [x], model, seed), exact=inner == "aot_eager")
    assert not torch.equal(got[0].outputs[0], got[1].outputs[0]) or not draws(model)


def draws(model: nn.Module) -> bool:
    """Whether the model's result depends on the random state."""
    x = leaf(ROWS, 2 * WIDTH)
    first, second = (outcome(model, [x], model, seed).outputs[0] for seed in (0, 1))
    return not torch.equal(first, second)


# --- one step
@pytest.mark.parametrize("kind", deep_but([k for k in KINDS if k not in LIKE_OTHERS], KINDS))
def test_eager_kernels_see_the_numbers_that_the_forward_drew(kind: str) -> None:
    check(couplings(*(kind,) * 6), "aot_eager")


@pytest.mark.parametrize("kinds", [FUSED, pytest.param(BY_KERNELS, marks=pytest.mark.deep)])
def test_inductor_sees_the_numbers_that_the_forward_drew(kinds: tuple[str, ...]) -> None:
    check(couplings(*kinds), "inductor")


@pytest.mark.deep  # as do the tests of whole models
def test_inductor_with_the_random_numbers_of_eager_is_as_eager() -> None:
    check(couplings(*FUSED), "inductor", fallback_random=True)


class Jittered(Plain):
    """Noise that is added to a stream, and a mask that all layers share."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        mask = F.dropout(torch.ones_like(a), 0.5)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b * mask) + 0.1 * torch.randn_like(a)
            b = b + g(a).sin() * mask * torch.rand_like(a)
        return torch.cat([a, b], dim=-1)


@pytest.mark.parametrize("inner", INNERS)
def test_noise_on_the_streams_and_a_mask_for_all_layers(inner: str) -> None:
    check(Jittered([Noisy(torch.tanh) for _ in range(4)], [Noisy(nn.Dropout(0.5)) for _ in range(4)]), inner)


class DropsTheStream(Plain):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        for f, g in zip(self.f, self.g, strict=True):
            a = F.dropout(a + f(b), 0.2)
            b = F.dropout(b + g(a), 0.2)
        return torch.cat([a, b], dim=-1)


def test_dropout_of_a_stream_is_left_as_it_is() -> None:
    model = DropsTheStream([Noisy(nn.Dropout(0.5)) for _ in range(3)], [Noisy(torch.tanh) for _ in range(3)])
    x = leaf(ROWS, 2 * WIDTH)
    with reports() as found:
        got = outcome(compiled(model, "aot_eager"), [x], model)
    assert found[0].regions == () and found[0].refusals
    assert_alike(got, outcome(model, [x], model), exact=True)


# --- several steps
def two_at_once(call: Callable[..., Any]) -> Callable[..., Any]:
    """Two forwards before one backward, which draws nothing that the other forward drew."""

    def program(x: Tensor) -> tuple[Tensor, Tensor]:
        first = call(x)
        torch.rand(3)
        return first, call(x.flip(0) * 0.5)

    return program


def in_a_row(call: Callable[..., Any]) -> Callable[..., Any]:
    """Two steps; numbers are drawn between forward and backward."""

    def program(x: Tensor) -> tuple[Tensor, Tensor]:
        first = call(x)
        torch.rand(3)
        first.sin().sum().backward()
        second = call(x)
        assert not torch.equal(first, second), "each step draws anew"
        return first.detach(), second

    return program


@pytest.mark.parametrize("inner", INNERS)
def test_two_forwards_before_two_backwards(inner: str) -> None:
    check(couplings("nn.Dropout", "Dropout2d", "uniform", "rows"), inner, two_at_once)


@pytest.mark.parametrize("inner", INNERS)
def test_steps_in_a_row(inner: str) -> None:
    check(couplings("rows", "nn.Dropout", "Dropout2d", "normals"), inner, in_a_row)


def test_eval_draws_nothing() -> None:
    model = couplings("nn.Dropout", "alpha", "Dropout2d", "nn.Dropout", "alpha", "Dropout2d").eval()
    assert not draws(model)
    check(model, "aot_eager")


# --- memory
def wide(depth: int) -> Plain:
    d = 16

    def function() -> nn.Module:
        return nn.Sequential(nn.Linear(d, 4 * d), nn.Dropout(0.2), nn.Tanh(), nn.Linear(4 * d, d))

    return Plain([function() for _ in range(depth)], [function() for _ in range(depth)]).float()


@pytest.mark.deep
@pytest.mark.parametrize("way", ["inductor, fallback_random", "aot_eager"])
def test_peak_memory_does_not_grow_with_depth(way: str) -> None:
    inner, _, option = way.partition(", ")
    options = {option: True} if option else {}
    x = torch.randn(4096, 32, dtype=torch.float32)
    peak: dict[tuple[str, int], int] = {}
    for depth in (3, 7):
        model = wide(depth)
        for name, make in (("plain", reference), ("revfx", compiled)):
            call = make(model, inner, **options)
            peak[name, depth] = measure_memory(lambda call=call: call(x).square().mean()).peak
    assert peak["revfx", 7] - peak["revfx", 3] < 0.03 * (peak["plain", 7] - peak["plain", 3])

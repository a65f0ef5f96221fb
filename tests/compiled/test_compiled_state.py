"""Buffers in compiled couplings: written once, and read by the backward as the forward read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from compiled import INNERS, WIDTH, check, fresh as fresh, inverted
from helpers import deep_but, mlp, mlps
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from ways import Plain


DEPTH = 3


# --- buffers that f writes
class Stateful(nn.Module):
    """`function(self, x)`, where `self` has two weights, a buffer as wide as the streams and a counter."""

    buffer: Tensor
    calls: Tensor

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.linear, self.weight = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.rand(WIDTH))
        self.register_buffer("buffer", torch.rand(WIDTH))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def counts(m: Any, x: Tensor) -> Tensor:
    m.calls += 1
    return torch.tanh(m.linear(x) * m.calls)


def reads_then_writes(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x).tanh() * m.buffer.sin()
    m.buffer.add_(1)
    return y


def writes_then_reads(m: Any, x: Tensor) -> Tensor:
    m.buffer.mul_(0.7)
    return m.linear(x).tanh() * m.buffer.sin()


def reads_before_and_after(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x).tanh() * m.buffer.sin()
    m.buffer.copy_(y.detach()[0])
    return (y * m.buffer.cos()).tanh() * m.buffer


def averages(m: Any, x: Tensor) -> Tensor:
    h = m.linear(x)
    m.buffer.lerp_(h.detach().mean(0), 0.1)
    return torch.tanh(h - m.buffer)


def replaces(m: Any, x: Tensor) -> Tensor:
    h = m.linear(x).tanh() * m.buffer
    m.buffer = m.buffer * 2 + h.detach().mean(0)
    return h.sin()


def writes_a_part(m: Any, x: Tensor) -> Tensor:
    h = m.linear(x).tanh() * m.buffer.cos()
    m.buffer[1:3] += 0.5
    return h * m.buffer.sin()


def clips_its_weight(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.weight.clamp_(0.1, 0.5)
    return torch.tanh(m.linear(x) * m.weight)


def conv_norm() -> nn.Module:
    conv = nn.Conv2d(1, 2, (1, 3), padding=(0, 1))
    return nn.Sequential(
        nn.Unflatten(0, (-1, 1, 1)), conv, nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 1, 1), nn.Flatten(0, 2)
    )


def normed(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 6), norm, nn.Tanh(), nn.Linear(6, WIDTH))


class InstanceNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = mlp(), nn.InstanceNorm1d(3, affine=True, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x).view(-1, 3, WIDTH)).view(x.shape).sin()


WRITING: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm1d": lambda: normed(nn.BatchNorm1d(6)),
    "BatchNorm2d": conv_norm,
    "BatchNorm without weights": lambda: normed(nn.BatchNorm1d(6, affine=False)),
    "BatchNorm without statistics": lambda: normed(nn.BatchNorm1d(6, track_running_stats=False)),
    "BatchNorm in eval": lambda: normed(nn.BatchNorm1d(6).eval()),
    "spectral_norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)), nn.Tanh()),
    "weight_norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)), nn.Tanh()),
    "InstanceNorm": InstanceNormed,
    **{
        f.__name__: (lambda f=f: Stateful(f))
        for f in (
            counts,
            reads_then_writes,
            writes_then_reads,
            reads_before_and_after,
            averages,
            replaces,
            writes_a_part,
            clips_its_weight,
        )
    },
}


@pytest.mark.parametrize("kind", deep_but([*WRITING][::2], WRITING))
def test_buffers_are_written_once_and_read_as_they_were(kind: str) -> None:
    model = Plain([WRITING[kind]() for _ in range(DEPTH)], [WRITING[kind]() for _ in range(DEPTH)])
    report = check(model, "aot_eager")
    assert inverted(report) >= 2 * DEPTH - 2, report.refusals


def test_batch_norm_without_momentum_reads_its_counter_and_so_is_not_compiled() -> None:
    check(Plain([normed(nn.BatchNorm1d(6, momentum=None)) for _ in range(2)], mlps(2)), "aot_eager")


NORMS = ["BatchNorm1d", "BatchNorm2d", "spectral_norm", "InstanceNorm"]
OTHERS = [k for k in WRITING if k not in NORMS]  # an even number


@pytest.mark.deep
@pytest.mark.parametrize("kinds", [NORMS, OTHERS], ids=["norms", "others"])
def test_buffers_under_inductor(kinds: Sequence[str]) -> None:
    report = check(Plain([WRITING[k]() for k in kinds[::2]], [WRITING[k]() for k in kinds[1::2]]), "inductor")
    assert inverted(report) >= len(kinds) - 2, report.refusals


@pytest.mark.parametrize("inner", INNERS)
def test_one_module_with_buffers_in_all_layers(inner: str) -> None:
    norm, writes = normed(nn.BatchNorm1d(6)), Stateful(reads_then_writes)
    report = check(Plain([norm] * DEPTH, [writes] * DEPTH), inner)
    assert report.regions


# --- a buffer that is written and that the backward reads, outside a region
class BeforeCouplings(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.first = Stateful(reads_then_writes)
        self.couplings, self.last = Plain(mlps(depth), mlps(depth)), Stateful(reads_then_writes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.first(x[:, :WIDTH]), self.first(x[:, WIDTH:])], -1)
        return self.last(self.couplings(x)[:, :WIDTH])


@pytest.mark.parametrize("depth", [0, DEPTH])
@pytest.mark.parametrize("inner", INNERS)
def test_a_buffer_that_is_written_outside_a_region_is_read_as_it_was(inner: str, depth: int) -> None:
    report = check(BeforeCouplings(depth), inner)
    assert len(report.regions) == (depth > 0)

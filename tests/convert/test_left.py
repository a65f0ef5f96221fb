"""State that a forward leaves behind: running statistics that it writes, tensors that it sets as attributes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import kept_cuts, kept_growth
from torch import Tensor, nn
from torch.nn import functional as F
from training import State, assert_same_state, assert_same_steps, state_of, twins
from zoo import D

import revfx
from revfx.errors import RevfxWarning
from revfx.testing import assert_same_grads, measure_memory


pytestmark = pytest.mark.usefixtures("fp64")
LAYERS = 6


class Norm(nn.Module):
    """Batch normalisation as flows write it; each class below leaves its statistics in another way."""

    mean: Any
    var: Any
    steps: Any

    def __init__(self) -> None:
        super().__init__()
        self.log_gamma, self.beta = nn.Parameter(torch.randn(2 * D) / 10), nn.Parameter(torch.randn(2 * D))
        self.register_buffer("mean", torch.zeros(2 * D))
        self.register_buffer("var", torch.ones(2 * D))
        self.register_buffer("steps", torch.tensor(0))

    def leave(self, mean: Tensor, var: Tensor) -> None:
        self.mean.mul_(0.9).add_(mean.detach() * 0.1)
        self.var.mul_(0.9).add_(var.detach() * 0.1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = x.mean(0), x.var(0)
        self.leave(mean, var)
        y = self.log_gamma.exp() * (x - mean) / (var + 1e-5).sqrt() + self.beta
        return y, (self.log_gamma - 0.5 * torch.log(var + 1e-5)).sum()


class Copies(Norm):
    def leave(self, mean: Tensor, var: Tensor) -> None:
        with torch.no_grad():
            self.mean.copy_(0.9 * self.mean + 0.1 * mean)
            self.var.lerp_(var, 0.1)
            self.steps += 1


class Sets(Norm):
    def leave(self, mean: Tensor, var: Tensor) -> None:
        self.mean = self.mean * 0.9 + mean.detach() * 0.1
        self.batch_var = var


class Keeps(Norm):
    """No running statistics at all."""

    def leave(self, mean: Tensor, var: Tensor) -> None:
        pass


class ReadsFirst(Norm):
    """Normalises by the running statistics, and updates them then."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.log_gamma.exp() * (x - self.mean) / (self.var + 1e-5).sqrt() + self.beta
        log_det = (self.log_gamma - 0.5 * torch.log(self.var + 1e-5)).sum()
        self.leave(x.mean(0), x.var(0))
        return y, log_det


class ReadsAfterwards(Norm):
    """The other way round, which nothing gives back."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.leave(x.mean(0), x.var(0))
        y = self.log_gamma.exp() * (x - self.mean) / (self.var + 1e-5).sqrt() + self.beta
        return y, (self.log_gamma - 0.5 * torch.log(self.var + 1e-5)).sum()


class Flow(nn.Module):
    def __init__(self, norm: type[Norm], layers: int = LAYERS) -> None:
        super().__init__()
        others = Keeps if norm is ReadsAfterwards else norm
        self.norms = nn.ModuleList([norm(), *(others() for _ in range(layers - 1))])
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 2 * D)) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        log_det = x.new_zeros(x.shape[0])
        for norm, net in zip(self.norms, self.nets, strict=True):
            x, more = norm(x)
            a, b = x.chunk(2, -1)
            t, s = net(a).chunk(2, -1)
            s = torch.tanh(s)
            x, log_det = torch.cat([b * s.exp() + t, a], -1), log_det + more + s.sum(-1)
        return x.square().sum(-1) / 2 - log_det


def assert_trains_like(converted: nn.Module, plain: nn.Module, batches: list[tuple[Tensor, ...]]) -> None:
    for seed, batch in enumerate(batches):
        assert_same_steps(converted, plain, batch, steps=(seed,), loss=torch.mean)


@pytest.mark.parametrize("norm", [Norm, Copies, Sets, Keeps, ReadsFirst, ReadsAfterwards])
def test_flows_with_batch_normalisation_leave_what_plain_ones_leave(norm: type[Norm]) -> None:
    plain = Flow(norm)
    converted: Any = revfx.convert(copy.deepcopy(plain))
    batches = [(torch.randn(rows, 2 * D),) for rows in (64, 64, 96, 64, 96)]
    assert_trains_like(converted, plain, batches)
    assert len(converted.revfx.plans) == 1 and converted.revfx.plans[0].regions
    for model in (converted, plain):
        model.eval()
    with torch.no_grad():
        x = torch.randn(8, 2 * D)
        assert torch.equal(converted(x), plain(x))


@pytest.mark.parametrize("norm", [Norm, Copies, Sets, Keeps])
def test_flows_with_batch_normalisation_keep_little_per_layer(norm: type[Norm]) -> None:
    x = torch.randn(1024, 2 * D, requires_grad=True)
    assert kept_growth(lambda layers: Flow(norm, layers), x, (LAYERS // 2, LAYERS)) < 0.05


SIZES: dict[str, Callable[[Tensor], Tensor]] = {
    "norm": lambda a: a.norm(dim=-1, keepdim=True),
    "largest": lambda a: a.abs().amax(-1, keepdim=True),
    "root mean square": lambda a: a.square().mean(-1, keepdim=True).sqrt(),
}


class Normalised(nn.Module):
    """Couplings between which a stream is divided by the size of each of its rows."""

    def __init__(self, size: str) -> None:
        super().__init__()
        self.size = size
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for net in self.nets:
            a = a + net(b)
            a, b = b, a / SIZES[self.size](a)
        return torch.cat([a, b], -1).sin().sum()


@pytest.mark.parametrize("size", SIZES)
def test_a_stream_comes_back_given_the_sizes_of_its_rows(size: str) -> None:
    x, model = torch.randn(256, 64, requires_grad=True), Normalised(size)
    converted: Any = revfx.convert(copy.deepcopy(model))
    assert_same_steps(converted, model, [x])
    ours, theirs = (measure_memory(lambda m=m: m(x)).kept for m in (converted, model))
    assert ours < 0.5 * theirs


@pytest.mark.parametrize("size", SIZES)
def test_up_to_rounding_a_row_comes_back_unless_its_size_was_selected_from_it(size: str) -> None:
    x, model = torch.randn(256, 64, requires_grad=True), Normalised(size)
    converted: Any = revfx.convert(copy.deepcopy(model), exact=False)
    with nullcontext() if size.startswith("root") else pytest.warns(RevfxWarning, match="nothing reversible"):
        for _ in range(3):
            assert_same_grads(converted, model, [x], loss=torch.Tensor.clone)


class Conditioned(nn.Module):
    """A layer whose condition its caller sets as an attribute."""

    cond: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.net(x)) * self.cond


class SetsConditions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Conditioned() for _ in range(LAYERS))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for k, layer in enumerate(self.layers):
            layer.cond = cond * (k + 1)
            a, b = b, a + layer(b)
        return torch.cat([a, b], -1)


def test_conditions_that_are_set_as_attributes_of_layers_are_those_of_the_call() -> None:
    plain = SetsConditions()
    converted: Any = revfx.convert(copy.deepcopy(plain))
    batches = [(torch.randn(n, 2 * D), torch.randn(n, D)) for n in (64, 64, 32, 64, 32)]
    assert_trains_like(converted, plain, batches)
    assert len(converted.revfx.plans) == 1 and kept_cuts(converted) == 2


class Shared(nn.Module):
    """A buffer that a layer called whole reads after it was written."""

    def __init__(self) -> None:
        super().__init__()
        self.norm: Any = nn.BatchNorm1d(D)
        self.nets = nn.ModuleList(nn.Linear(D, D) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for net in self.nets:
            a, b = b, a + F.silu(net(b))
        self.norm.running_mean.mul_(0.5)
        return torch.cat([a, self.norm(b)], -1)


def test_a_write_stays_before_a_module_that_reads_it() -> None:
    plain = Shared()
    converted: Any = revfx.convert(copy.deepcopy(plain))
    assert_trains_like(converted, plain, [(torch.randn(64, 2 * D),)] * 4)
    assert kept_cuts(converted) == 2


class Queue(nn.Module):
    """Couplings between which a buffer takes a value that is written to afterwards, or numbers that are drawn."""

    def __init__(self, draws: bool) -> None:
        super().__init__()
        self.draws = draws
        self.seen: Any
        self.register_buffer("seen", torch.zeros(16, D))
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5)) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        with torch.no_grad():
            scaled: Any = b * 2
            self.seen.uniform_() if self.draws else self.seen.copy_(scaled)
            scaled.cumsum_(0)
        for net in self.nets:
            a, b = b, a + net(b)
        return torch.cat([a, b], -1) + scaled.sum()


@pytest.mark.parametrize("draws", [True, False])
def test_a_write_stays_before_what_it_would_be_changed_by(draws: bool) -> None:
    plain = Queue(draws)
    converted: Any = revfx.convert(copy.deepcopy(plain))
    assert_trains_like(converted, plain, [(torch.randn(16, 2 * D),) for _ in range(4)])
    assert 0 < kept_cuts(converted) <= 4


class AddsUp(nn.Module):
    """Couplings that add their log-determinants to a tensor that they are given, in place."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 2 * D)) for _ in range(layers))

    def forward(self, x: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        for net in self.nets:
            a, b = x.chunk(2, -1)
            t, s = net(a).chunk(2, -1)
            s = torch.tanh(s)
            total += s.sum(-1)
            x = torch.cat([b * s.exp() + t, a], -1)
        return x, total


@pytest.mark.parametrize("needs_grad", [True, False])
def test_a_tensor_that_a_forward_adds_to_holds_the_sum_afterwards(needs_grad: bool) -> None:
    converted, plain = twins(AddsUp())
    x, start = torch.randn(256, 2 * D), torch.zeros(256, requires_grad=needs_grad)
    for _ in range(4):
        states: list[State] = []
        for model in (converted, plain):
            model.zero_grad()
            total = start * 2 if needs_grad else start.clone()
            y, given = model(x, total)
            assert given is total
            (y.square().sum() - total.sin().sum()).backward()
            states.append(state_of(model) | {"y": y.detach(), "total": total.detach()})
        assert_same_state(*states)
    ours, theirs = (measure_memory(lambda m=m: m(x, torch.zeros(256))[0].sum()).kept for m in (converted, plain))
    assert converted.revfx.plans and ours < 0.4 * theirs


class Looks(nn.Module):
    """A layer that finds what it needs at its owner, which sets it."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.net, self.owner = nn.Linear(D, D), [owner]

    def forward(self, x: Tensor) -> Tensor:
        found: Any = self.owner[0]
        return torch.tanh(self.net(x)) * found.scale


class Owner(nn.Module):
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Looks(self) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        self.scale = x.mean()
        a, b = x.chunk(2, -1)
        for layer in self.layers:
            a, b = b, a + layer(b)
        return torch.cat([a, b], -1)


def test_what_a_layer_finds_at_its_owner_is_that_of_the_call() -> None:
    plain = Owner()
    converted: Any = revfx.convert(Owner())
    converted.load_state_dict(plain.state_dict())
    assert_trains_like(converted, plain, [(torch.randn(64, 2 * D) + k,) for k in range(4)])
    assert converted.revfx.regions

"""`rev_block` and `RevBlock` leave the program as plain training does: random state, buffers, exceptions."""

# pyright: reportUnknownLambdaType=false
from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    WAYS,
    Pair,
    assert_like_lines,
    assert_same,
    assert_steps,
    block,
    both,
    deep_but,
    fp64 as fp64,
    leaf,
    lines,
    loss_of,
    mlp,
    mlps,
    outcome,
)
from steps import STEPS, Functions, assert_same_bits, assert_steps_like_lines
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from revfx import RevBlock


ways = pytest.mark.parametrize("way", WAYS)


# --- random numbers
@ways
def test_dropout_draws_the_same_mask_again_and_leaves_the_random_state_of_plain_code(way: str) -> None:
    fs, gs = (nn.ModuleList(nn.Sequential(mlp(), nn.Dropout(0.4)) for _ in range(4)) for _ in range(2))
    assert_like_lines(way, fs, gs, [leaf(3, 4), leaf(3, 4)])


@ways
def test_noise_in_some_layers_only_is_drawn_again_alike(way: str) -> None:
    def noisy(x: Tensor) -> Tensor:
        return torch.tanh(x + torch.randn_like(x)) * torch.rand(())

    assert_like_lines(way, [torch.sin, noisy, torch.sin, noisy], [noisy, torch.sin, torch.sin, noisy], [leaf(3, 4)] * 2)


@ways
def test_random_numbers_drawn_between_forward_and_backward_do_not_matter(way: str) -> None:
    def make() -> Functions:
        fs, gs = ([nn.Sequential(mlp(), nn.Dropout(0.4)) for _ in range(3)] for _ in range(2))
        return fs, gs

    def draw(*_: Any) -> None:
        torch.manual_seed(9)
        torch.randn(7)

    assert_steps_like_lines(way, make, [leaf(3, 4), leaf(3, 4)], draw)


# --- buffers
@ways
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_updates_its_running_statistics_once(way: str, training: bool, momentum: float | None) -> None:
    fs, gs = (
        nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=momentum), nn.Tanh()) for _ in range(3))
        for _ in range(2)
    )
    both(fs, gs).train(training)
    assert_like_lines(way, fs, gs, [leaf(5, 4), leaf(5, 4)])
    y = block(way, list(fs), list(gs))(leaf(5, 4), leaf(5, 4))
    assert [int(f[1].num_batches_tracked) for f in fs] == [int(training)] * 3  # type: ignore[index]
    loss_of(y).backward()
    assert [int(f[1].num_batches_tracked) for f in fs] == [int(training)] * 3  # type: ignore[index]


@ways
@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_that_a_first_batch_leaves_as_they_were_are_updated_once(way: str, momentum: float | None) -> None:
    f, g, same = nn.BatchNorm1d(4, momentum=momentum), mlp(), leaf(5, 4).detach()
    first = torch.zeros(5, 4) if momentum else same  # the mean of zeros; a cumulative mean of the same batch twice
    with torch.no_grad():
        f(first)
    plain, other = copy.deepcopy(f), copy.deepcopy(g)
    run = block(way, [f], [g])
    for x in (first, *torch.randn(2, 5, 4)):
        loss_of(run(x.clone().requires_grad_(), x)).backward()
        loss_of(lines([plain], [other])(x.clone().requires_grad_(), x)).backward()
    assert all(torch.equal(a, b) for a, b in zip(f.buffers(), plain.buffers(), strict=True))


@ways
def test_one_batch_norm_shared_by_layers_is_updated_as_often_as_plain_code_does(way: str) -> None:
    f = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert_like_lines(way, [f] * 3, [f] * 3, [leaf(5, 4), leaf(5, 4)])


@ways
def test_a_wide_batch_norm_works_too(way: str) -> None:
    fs, gs = ([nn.BatchNorm1d(5000) for _ in range(2)] for _ in range(2))
    assert_like_lines(way, fs, gs, [leaf(3, 5000), leaf(3, 5000)])


@ways
def test_buffers_keep_their_identity(way: str) -> None:
    module = RevBlock(lambda: nn.BatchNorm1d(4), lambda: nn.BatchNorm1d(4), 2)
    before = {k: id(b) for k, b in module.named_buffers()}
    call = module if way == "RevBlock" else block(way, list(module.f), list(module.g))
    for _ in range(STEPS):
        loss_of(call(leaf(5, 4), leaf(5, 4))).backward()
        assert {k: id(b) for k, b in module.named_buffers()} == before


@ways
def test_spectral_norm_iterates_once_per_forward(way: str) -> None:
    fs, gs = ([spectral_norm(nn.Linear(4, 4)) for _ in range(3)] for _ in range(2))
    assert_like_lines(way, fs, gs, [leaf(5, 4), leaf(5, 4)])


class RunningScale(nn.Module):
    """Divides by a running norm, kept as a buffer or as an attribute, written in place or replaced."""

    def __init__(self, kind: str, width: int = 4) -> None:
        super().__init__()
        self.kind = kind
        self.inner = nn.Linear(width, width)
        self.running: Tensor
        if kind.startswith("buffer"):
            self.register_buffer("running", torch.ones(width))
        else:
            self.running = torch.ones(width)

    def forward(self, x: Tensor) -> Tensor:
        now = x.detach().abs().mean(0)
        if self.kind.endswith("replaced"):
            self.running = 0.9 * self.running + 0.1 * now
        else:
            self.running.mul_(0.9).add_(0.1 * now)
        return torch.tanh(self.inner(x / self.running.clone()))


@ways
@pytest.mark.parametrize("width", deep_but((5000,), (4, 5000)))
@pytest.mark.parametrize("kind", ["buffer written", "buffer replaced", "attribute replaced"])
def test_state_that_f_updates_itself_is_updated_once(way: str, kind: str, width: int) -> None:
    def make() -> Functions:
        made = [RunningScale(kind, width) for _ in range(2)]
        for m in made:
            m.inner = nn.Identity() if width > 4 else nn.Linear(4, 4, bias=False)  # type: ignore[assignment]
        return made, [lambda x: torch.sin(x)] * 2

    x = [torch.linspace(0, 1, 2 * width).view(2, width).requires_grad_() for _ in range(2)]
    assert_steps_like_lines(way, make, x, state=lambda functions: [m.running for m in functions[0]])


@ways
def test_a_loss_that_f_leaves_as_an_attribute_gets_its_gradient(way: str) -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()
            self.extra = torch.zeros(())

        def forward(self, x: Tensor) -> Tensor:
            h = self.inner(x)
            self.extra = h.square().mean()
            return h

    fs, gs = [Auxiliary() for _ in range(3)], mlps(3)

    def program(call: Any) -> Any:
        return lambda *x: [*call(*x), *(f.extra for f in fs)]

    inputs = [leaf(3, 4), leaf(3, 4)]
    expected = outcome(program(lines(fs, gs)), inputs, both(fs, gs))
    assert_steps(program(block(way, fs, list(gs))), expected, inputs, both(fs, gs))


class Generated(nn.Module):
    """Reads a weight that something else made and set as an attribute."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.zeros(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight)


@ways
@pytest.mark.parametrize("width", [4, 70])
def test_generated_weights_set_as_attributes_get_their_gradients(way: str, width: int) -> None:
    fs, gs = [Generated(width) for _ in range(3)], [Generated(width) for _ in range(3)]

    def program(call: Any) -> Any:
        def run(x: Tensor, seed: Tensor) -> Pair:
            for i, m in enumerate((*fs, *gs)):
                m.weight = torch.sin(seed * (i + 1)) / width
            return call(x, x)

        return run

    inputs = [leaf(3, width), leaf(width, width)]
    expected = outcome(program(lines(fs, gs)), inputs)
    assert_steps(program(block(way, fs, gs)), expected, inputs)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.state = torch.zeros(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.state = torch.tanh(x + self.state)
        return self.state * 1


@ways
@pytest.mark.parametrize("layers", [2, 4])
def test_state_that_f_carries_from_layer_to_layer_with_its_gradient(way: str, layers: int) -> None:
    f = Recurrent()

    def wrap(call: Callable[..., Pair]) -> Callable[..., Pair]:
        def program(*x: Tensor) -> Pair:
            f.state = torch.zeros(3, 4)
            return call(*x)

        return program

    assert_steps_like_lines(
        way, lambda: ([f] * layers, [torch.sin] * layers), [leaf(3, 4), leaf(3, 4)], wrap=wrap, state=lambda _: f.state
    )


@ways
def test_eval_called_between_forward_and_backward_does_not_matter(way: str) -> None:
    def make() -> Functions:
        fs, gs = ([nn.Sequential(mlp(), nn.BatchNorm1d(4), nn.Dropout(0.4)) for _ in range(3)] for _ in range(2))
        return fs, gs

    assert_steps_like_lines(way, make, [leaf(5, 4), leaf(5, 4)], lambda functions, _: both(*functions).eval())
    assert_steps_like_lines(
        way, make, [leaf(5, 4), leaf(5, 4)], lambda functions, _: both(*functions).train(not functions[0][0].training)
    )


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.inner(x)
        return h if self.calls % 2 else h.sin() * self.calls


@ways
@pytest.mark.parametrize("layers", [3, 4])
def test_a_counter_of_f_is_counted_once(way: str, layers: int) -> None:
    assert_steps_like_lines(
        way,
        lambda: ([Counting()] * layers, [torch.sin] * layers),
        [leaf(3, 4), leaf(3, 4)],
        state=lambda functions: functions[0][0].calls,
    )


# --- exceptions
class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.inner = mlp()
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(self.norm(x), 0.3)
        if self.fails:
            raise KeyError("mine")
        return self.inner(x)


@ways
def test_an_exception_in_the_forward_comes_through_and_leaves_what_plain_code_leaves(way: str) -> None:
    fs, gs = [Failing() for _ in range(3)], [Failing() for _ in range(3)]
    x, call = [leaf(3, 4), leaf(3, 4)], block(way, fs, gs)
    start = [b.clone() for b in both(fs, gs).buffers()]
    for _ in range(STEPS):
        left: list[list[Tensor]] = []
        fs[2].fails = True
        for run in (call, lines(fs, gs)):
            for b, value in zip(both(fs, gs).buffers(), start, strict=True):
                b.copy_(value)
            torch.manual_seed(1)
            with pytest.raises(KeyError, match="mine"):
                run(*x)
            left.append([torch.get_rng_state(), *(b.clone() for b in both(fs, gs).buffers())])
        assert_same_bits(*left)
        fs[2].fails = False
        assert_same(outcome(call, x, both(fs, gs)), outcome(lines(fs, gs), x, both(fs, gs)), 0.0)


@ways
def test_an_exception_in_the_backward_leaves_random_state_and_buffers_as_they_were(way: str) -> None:
    fs, gs = [Failing() for _ in range(3)], [Failing() for _ in range(3)]
    call, x = block(way, fs, gs), [leaf(3, 4), leaf(3, 4)]
    armed: list[bool] = []

    def fail(g: Tensor) -> None:
        if armed:
            raise KeyError("mine")

    fs[1].norm.weight.register_hook(fail)
    for _ in range(STEPS):
        loss = loss_of(call(*x))
        torch.manual_seed(2)
        random, buffers = torch.get_rng_state(), [(id(b), b.clone()) for b in both(fs, gs).buffers()]
        armed.append(True)
        with pytest.raises(KeyError, match="mine"):
            loss.backward(retain_graph=True)
        armed.clear()
        assert torch.equal(torch.get_rng_state(), random)
        assert [id(b) for b in both(fs, gs).buffers()] == [i for i, _ in buffers]
        assert all(torch.equal(b, old) for b, (_, old) in zip(both(fs, gs).buffers(), buffers, strict=True))
        assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        assert_same(outcome(call, x, both(fs, gs)), outcome(lines(fs, gs), x, both(fs, gs)), 0.0)


# --- functions that are another one in each call
def draws_for_a_cache() -> Callable[[Tensor], Tensor]:
    drop = nn.Dropout(0.5)

    @functools.lru_cache
    def noise() -> Tensor:
        return torch.rand(4)

    return lambda x: drop(x * noise())


@ways
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_random_numbers_that_are_drawn_once_and_kept(way: str, depth: int) -> None:
    def make() -> Functions:
        return [draws_for_a_cache() for _ in range(depth)], [mlp() for _ in range(depth)]

    assert_steps_like_lines(way, make, [leaf(64, 4), leaf(64, 4)])


@ways
def test_random_numbers_of_a_generator_of_its_own_under_autocast(way: str) -> None:
    def make() -> Functions:
        generator = torch.Generator().manual_seed(0)
        layer = nn.Linear(4, 4).float()
        return [lambda x: layer(x) * torch.rand(4, generator=generator, dtype=torch.float32)] * 3, [mlp().float()] * 3

    def wrap(call: Callable[..., Pair]) -> Callable[..., Pair]:
        def program(*x: Tensor) -> Pair:
            with torch.autocast("cpu", torch.bfloat16):
                return call(*x)

        return program

    assert_steps_like_lines(way, make, [leaf(64, 4, dtype=torch.float32)] * 2, wrap=wrap)


@ways
def test_a_change_that_a_normalisation_hides_from_what_functions_give(way: str) -> None:
    scale = [1.0]

    def make() -> Functions:
        scale[0], linear = 1.0, nn.Linear(4, 4)
        return [lambda x: linear(F.layer_norm(x * scale[0], (4,)))] * 6, [mlp() for _ in range(6)]

    def change(*_: Any) -> None:
        scale[0] *= 1.5

    assert_steps_like_lines(way, make, [leaf(3, 4), leaf(3, 4)], change)

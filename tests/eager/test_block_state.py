"""`rev_block` and `RevBlock` leave the program as plain training does: random state, buffers, memory."""

# pyright: reportUnknownLambdaType=false
from __future__ import annotations

import copy
import functools
import gc
import weakref
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
    relative_error,
    unseen,
)
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils.parametrizations import spectral_norm

import revfx
from revfx import RevBlock, RevfxError, rev_block


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
    fs, gs = (nn.ModuleList(nn.Sequential(mlp(), nn.Dropout(0.4)) for _ in range(3)) for _ in range(2))
    x1, x2 = leaf(3, 4), leaf(3, 4)
    tensors = [x1, x2, *both(fs, gs).parameters()]
    torch.manual_seed(5)
    expected = torch.autograd.grad(loss_of(lines(fs, gs)(x1, x2)), tensors)
    torch.manual_seed(5)
    loss = loss_of(block(way, list(fs), list(gs))(x1, x2))
    torch.manual_seed(9)
    torch.randn(7)
    state = torch.get_rng_state()
    assert relative_error(torch.autograd.grad(loss, tensors), expected) < 1e-9
    assert torch.equal(torch.get_rng_state(), state)


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
    def run(call: Any, scales: list[RunningScale]) -> tuple[list[Any], list[Tensor]]:
        x = [torch.linspace(0, 1, 2 * width).view(2, width).requires_grad_() for _ in range(2)]
        grads = torch.autograd.grad(loss_of(call(*x)), x)
        return list(grads), [s.running for s in scales]

    def fresh() -> list[RunningScale]:
        made = [RunningScale(kind, width) for _ in range(2)]
        for m in made:
            m.inner = nn.Identity() if width > 4 else nn.Linear(4, 4, bias=False)  # type: ignore[assignment]
            for p in m.inner.parameters():
                nn.init.eye_(p)
        return made

    scales, plain = fresh(), fresh()
    got, left = run(block(way, scales, [torch.sin] * 2), scales)
    expected, plainly_left = run(lines(plain, [torch.sin] * 2), plain)
    assert relative_error(got, expected) < 1e-9
    assert all(torch.equal(a, b) for a, b in zip(left, plainly_left, strict=True))


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
    for _ in range(2):
        assert_same(outcome(program(block(way, fs, list(gs))), inputs, both(fs, gs)), expected)


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
    assert_same(outcome(program(block(way, fs, gs)), inputs), expected)


@ways
def test_state_that_f_carries_from_layer_to_layer_with_its_gradient_works_or_raises(way: str) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.state = torch.zeros(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.state = torch.tanh(x + self.state)
            return self.state * 1

    def run(call: Any) -> list[Tensor]:
        f.state = torch.zeros(3, 4)
        return list(torch.autograd.grad(loss_of(call([f] * 4, [torch.sin] * 4)), x))

    f, x = Recurrent(), [leaf(3, 4), leaf(3, 4)]
    expected = run(lambda fs, gs: lines(fs, gs)(*x))
    try:
        assert relative_error(run(lambda fs, gs: block(way, fs, gs)(*x)), expected) < 1e-9
    except RevfxError:
        assert torch.is_grad_enabled()


@ways
def test_eval_called_between_forward_and_backward_does_not_matter(way: str) -> None:
    fs, gs = (
        nn.ModuleList(nn.Sequential(mlp(), nn.BatchNorm1d(4), nn.Dropout(0.4)) for _ in range(3)) for _ in range(2)
    )
    x = [leaf(5, 4), leaf(5, 4)]
    torch.manual_seed(1)
    expected = torch.autograd.grad(loss_of(lines(fs, gs)(*x)), x)
    torch.manual_seed(1)
    loss = loss_of(block(way, fs, gs)(*x))
    both(fs, gs).eval()
    assert relative_error(torch.autograd.grad(loss, x), expected) < 1e-9
    assert not any(m.training for m in both(fs, gs)[0].modules())


@ways
def test_a_counter_of_f_is_counted_once_and_read_as_it_was(way: str) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            h = self.inner(x)
            return h if self.calls % 2 else h.sin() * self.calls

    f = Counting()
    x = [leaf(3, 4), leaf(3, 4)]
    expected = torch.autograd.grad(loss_of(lines([f] * 4, [torch.sin] * 4)(*x)), x)
    f.calls = 0
    got = torch.autograd.grad(loss_of(block(way, [f] * 4, [torch.sin] * 4)(*x)), x)
    assert relative_error(got, expected) < 1e-9
    assert f.calls == 4


# --- exceptions
class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.inner = mlp()
        self.fails = unseen()

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(self.norm(x), 0.3)
        if self.fails.values:
            raise KeyError("mine")
        return self.inner(x)


@ways
def test_an_exception_in_the_forward_comes_through_and_leaves_what_plain_code_leaves(way: str) -> None:
    fs, gs = [Failing() for _ in range(3)], [Failing() for _ in range(3)]
    fs[2].fails.values.append(True)
    x = leaf(3, 4), leaf(3, 4)
    left: list[list[Tensor]] = []
    start = [b.clone() for b in both(fs, gs).buffers()]
    for call in (block(way, fs, gs), lines(fs, gs)):
        for b, value in zip(both(fs, gs).buffers(), start, strict=True):
            b.copy_(value)
        torch.manual_seed(1)
        with pytest.raises(KeyError, match="mine"):
            call(*x)
        left.append([torch.get_rng_state(), *(b.clone() for b in both(fs, gs).buffers())])
    assert all(torch.equal(a, b) for a, b in zip(*left, strict=True))
    fs[2].fails.values.clear()
    assert_like_lines(way, fs, gs, [leaf(3, 4), leaf(3, 4)])


@ways
def test_an_exception_when_f_runs_again_leaves_random_state_and_buffers_as_they_were(way: str) -> None:
    fs, gs = [Failing() for _ in range(3)], [Failing() for _ in range(3)]
    loss = loss_of(block(way, fs, gs)(leaf(3, 4), leaf(3, 4)))
    fs[1].fails.values.append(True)
    torch.manual_seed(2)
    random, buffers = torch.get_rng_state(), [(id(b), b.clone()) for b in both(fs, gs).buffers()]
    with pytest.raises(KeyError, match="mine"):
        loss.backward(retain_graph=True)
    assert torch.equal(torch.get_rng_state(), random)
    assert [id(b) for b in both(fs, gs).buffers()] == [i for i, _ in buffers]
    assert all(torch.equal(b, old) for b, (_, old) in zip(both(fs, gs).buffers(), buffers, strict=True))
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


# --- nothing stays behind
class Remembers(nn.Module):
    """Leaves its last output as an attribute, as many models do for inspection."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.last: Tensor | None = None

    def forward(self, x: Tensor, side: Any) -> Tensor:
        last = self.last = self.inner(x)
        return last


class Token:
    pass


def kept_by(call: Callable[..., Pair], backward: bool) -> list[Any]:
    """Weak references to what one call keeps: its state, by a token among its arguments, and its outputs."""
    token = Token()
    y = call(leaf(3, 4), leaf(3, 4), [token])
    refs = [weakref.ref(token), *(StorageWeakRef(t.untyped_storage()) for t in y)]
    if backward:
        loss_of(y).backward()
    return refs


def is_gone(ref: Any) -> bool:
    return ref.expired() if isinstance(ref, StorageWeakRef) else ref() is None


@ways
@pytest.mark.parametrize("backward", [True, False])
def test_state_is_freed_without_the_garbage_collector(way: str, backward: bool) -> None:
    modules = mlps(3)
    f = [lambda x, side, m=m: m(x) for m in modules]
    call = block(way, f, list(mlps(3)))
    gc.collect()
    gc.disable()
    try:
        assert all(is_gone(ref) for ref in kept_by(call, backward))
    finally:
        gc.enable()


@ways
@pytest.mark.parametrize("backward", deep_but((False,), (True, False)))
@pytest.mark.parametrize("shared", [True, False])
def test_a_module_that_remembers_its_output_does_not_keep_the_state_of_older_calls(
    way: str, backward: bool, shared: bool
) -> None:
    f = [Remembers()] * 3 if shared else [Remembers() for _ in range(3)]
    call = block(way, f, [torch.sin] * 3)
    refs = [kept_by(call, backward) for _ in range(3)]
    gc.collect()
    assert all(is_gone(ref) for older in refs[:2] for ref in older)
    for m in f:
        m.last = None
    gc.collect()
    assert all(is_gone(ref) for ref in refs[2])


@ways
def test_regenerated_values_are_freed_with_the_backward_that_asked_for_them(way: str) -> None:
    made = unseen()

    def f(x: Tensor) -> Tensor:
        h = torch.tanh(x)
        made.values.append(StorageWeakRef(h.untyped_storage()))
        return h.exp()

    loss = loss_of(block(way, [f] * 4, [f] * 4)(leaf(3, 4), leaf(3, 4)))
    for _ in range(2):
        loss.backward(retain_graph=True)
        assert len(made.values) > 8 and all(ref.expired() for ref in made.values)


# --- state that nothing puts back
def draws_for_a_cache() -> Callable[[Tensor], Tensor]:
    drop = nn.Dropout(0.5)

    @functools.lru_cache
    def noise() -> Tensor:
        return torch.rand(4)

    return lambda x: drop(x * noise())


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_what_gives_something_else_when_it_runs_again_raises(depth: int) -> None:
    fs, gs = [draws_for_a_cache() for _ in range(depth)], mlps(depth)
    y1, y2 = revfx.rev_block(leaf(64, 4), leaf(64, 4), fs, gs, depth)
    with pytest.raises(RevfxError, match="when it is computed again"):
        (y1.sin().sum() + y2.sum()).backward()


def test_random_numbers_of_a_generator_of_its_own_raise_under_autocast_too() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(4, 4).float()

    def f(x: Tensor) -> Tensor:
        return layer(x) * torch.rand(4, generator=generator, dtype=torch.float32)

    with torch.autocast("cpu", torch.bfloat16):
        y1, y2 = revfx.rev_block(leaf(64, 4).float(), leaf(64, 4).float(), f, mlp().float(), 1)
    with pytest.raises(RevfxError, match="when it is computed again"):
        (y1.sin().sum() + y2.sum()).backward()


def test_a_change_that_a_normalisation_hides_from_what_functions_give() -> None:
    scale, linear = unseen(), nn.Linear(4, 4)
    scale.by = 1.0

    def scaled(x: Tensor) -> Tensor:
        return linear(F.layer_norm(x * scale.by, (4,)))

    y1, y2 = rev_block(leaf(3, 4), leaf(3, 4), scaled, scaled, 6)
    scale.by = 1.5
    with pytest.raises(RevfxError, match=r"of layer 5` .* when it is computed again"):
        (y1.sum() + y2.sum()).backward()

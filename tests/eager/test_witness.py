"""The backward tells where it did not regenerate what was there: always, once, and with one read of the device."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from helpers import mlp, mlps, unseen
from torch import Tensor, nn
from zoo import ZOO

import revfx
from revfx.checksum import checksum
from revfx.eager import witness
from revfx.eager.witness import Seen, Witness, judge
from revfx.errors import NondeterminismWarning, RegenerationError, RevfxWarning


WIDTH, ROWS, DEPTH = 16, 32, 3


# --- checksums
@pytest.mark.parametrize("n", [1, 3, 64, 1021, 1022, 5000, 70001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.bool, torch.complex64])
def test_a_checksum_tells_any_bit_and_the_order(n: int, dtype: torch.dtype) -> None:
    x = torch.randn(n) > 0 if dtype == torch.bool else torch.randn(n, dtype=dtype)
    before = checksum(x)
    assert before.dtype == torch.int64 and torch.equal(checksum(x.clone()), before)
    for place in {0, n // 2, n - 1}:
        other = x.clone()
        other[place] = ~x[place] if dtype == torch.bool else x[place] * (1 + torch.finfo(dtype).eps * 2)
        assert not torch.equal(checksum(other), before)
    turned = x.flip(0)
    assert torch.equal(checksum(turned), before) == torch.equal(turned, x)


def test_a_checksum_tells_samples_that_changed_places() -> None:
    for rows in (8, 64, 1000):
        x = torch.randn(rows, 128)
        for order in (torch.randperm(rows), torch.arange(rows).roll(1), torch.arange(rows - 1, -1, -1)):
            assert not torch.equal(checksum(x[order]), checksum(x))
        assert not torch.equal(checksum(-x), checksum(x))
    assert not torch.equal(checksum(torch.tensor([-0.0])), checksum(torch.tensor([0.0])))


def test_what_has_no_numbers_to_be_read_is_left_out() -> None:
    seen = Witness(True)
    seen.note(0, [torch.empty(0, 3)])
    seen.note(1, [torch.empty(3, device="meta")])
    assert not seen.then


# --- functions that are none of their inputs
def run(f: Callable[[Tensor], Tensor], x: Tensor | None = None, depth: int = DEPTH, **wishes: Any) -> None:
    """One step through couplings of which one runs `f`."""
    x = torch.randn(ROWS, 2 * WIDTH) if x is None else x
    fs: list[Any] = [mlp(WIDTH).float() for _ in range(depth)]
    fs[1] = f
    a, b = x.requires_grad_().chunk(2, -1)
    y = revfx.rev_block(a, b, fs, [m.float() for m in mlps(depth, WIDTH)], depth, **wishes)
    (y[0].sin().mean() + y[1].mean()).backward()


def counts() -> Callable[[Tensor], Tensor]:
    calls, layer = unseen(), nn.Linear(WIDTH, WIDTH)

    def f(x: Tensor) -> Tensor:
        calls.values.append(1)
        return layer(x) * len(calls.values)

    return f


def asks_the_clock() -> Callable[[Tensor], Tensor]:
    layer = nn.Linear(WIDTH, WIDTH)
    return lambda x: layer(x) * (1 + time.perf_counter_ns() % 1000)


def draws_of_its_own() -> Callable[[Tensor], Tensor]:
    generator, layer = torch.Generator().manual_seed(0), nn.Linear(WIDTH, WIDTH)
    return lambda x: layer(x) * torch.rand(WIDTH, generator=generator)


number = [1.0]


def reads_a_global() -> Callable[[Tensor], Tensor]:
    layer = nn.Linear(WIDTH, WIDTH)

    def f(x: Tensor) -> Tensor:
        number[0] += 1
        return layer(x) * sum(number)

    return f


STATEFUL = (counts, asks_the_clock, draws_of_its_own, reads_a_global)


@pytest.mark.parametrize("make", STATEFUL)
def test_what_is_no_function_of_its_inputs_raises_and_is_named(make: Any) -> None:
    with pytest.raises(RegenerationError, match=r"`f of layer 1` .* when it is computed again .* depends on what"):
        run(make())
    with pytest.raises(
        RegenerationError, match=r"when it is computed again .* rounding grew too much .* or it depends"
    ):
        run(make(), exact=False)


@pytest.mark.parametrize("make", STATEFUL)
def test_it_does_behind_a_gate_that_is_zero(make: Any) -> None:
    f, gate = make(), nn.Parameter(torch.zeros(WIDTH))
    with pytest.raises(RegenerationError, match=r"`f of layer 1`"):
        run(lambda x: f(x) * gate)


@pytest.mark.parametrize("make", [counts, asks_the_clock, reads_a_global])
def test_it_does_on_streams_of_zeros(make: Any) -> None:
    f = make()
    with pytest.raises(RegenerationError, match=r"`f of layer 1`"):
        run(lambda x: f(x), torch.zeros(ROWS, 2 * WIDTH))
    weight = nn.Parameter(torch.ones(WIDTH))  # nothing of the number shows in what is returned
    with pytest.raises(RegenerationError, match=r"`f of layer 1`"):
        run(lambda x: (x * 0.0) * (f(torch.ones_like(x)) * weight), torch.zeros(ROWS, 2 * WIDTH))


def test_it_does_under_retain_graph_in_each_backward_and_for_parts_of_gradients() -> None:
    calls, layer = unseen(), nn.Linear(WIDTH, WIDTH)

    def f(x: Tensor) -> Tensor:
        return layer(x) * (1 + len(calls.values))

    x = torch.randn(ROWS, 2 * WIDTH, requires_grad=True)
    a, b = x.chunk(2, -1)
    y1, y2 = revfx.rev_block(a, b, [f] * 3, [mlp(WIDTH).float()] * 3, 3)
    loss = (y1 + y2).square().mean()
    torch.autograd.grad(loss, x, retain_graph=True)
    calls.values.append(1)
    for _ in range(2):
        with pytest.raises(RegenerationError, match="`f of layer 2`"):
            torch.autograd.grad(loss, x, retain_graph=True)
    calls.values.clear()
    torch.autograd.grad(loss, layer.weight)


# --- kernels that jitter
def jitters(f: Callable[[Tensor], Tensor], every: int = 1) -> Callable[[Tensor], Tensor]:
    """A function of which some results are rounded up in one call, and down in the next."""
    calls = unseen()

    def jittered(x: Tensor) -> Tensor:
        calls.values.append(1)
        y = f(x)
        eps = torch.finfo(y.dtype).eps * (1 if len(calls.values) % 2 else -1)
        return y * torch.where(torch.arange(y.shape[-1]) % every == 0, 1 + eps, 1.0).to(y.dtype)

    return jittered


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_jitter_is_warned_of_once_and_gradients_are_within_it(dtype: torch.dtype) -> None:
    """Also where values cancel to zero: y = x + f(x2) with f(x2) = -x."""
    layers = [nn.Linear(WIDTH, WIDTH).to(dtype) for _ in range(4)]
    x = (torch.randint(-8, 8, (ROWS, WIDTH)) / 8).to(dtype)
    a, b = x.clone().requires_grad_(), (x / 4).requires_grad_()
    fs = [jitters(lambda t: -4 * t), *(jitters(m) for m in layers[:2])]
    gs = [nn.Identity(), *layers[2:]]
    found: list[list[Tensor]] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for training in (True, True, False):
            y1, y2 = revfx.rev_block(a, b, fs, gs, 3, is_training=training)
            loss = (y1.float().square() + y2.float()).mean()
            found.append(list(torch.autograd.grad(loss, [a, b, *(p for m in layers for p in m.parameters())])))
    texts = [str(w.message) for w in caught if issubclass(w.category, RevfxWarning)]
    assert len(texts) == 1 and "when it is recomputed for the backward: a kernel in it is not reproducible" in texts[0]
    for ours in found[:2]:
        for got, want in zip(ours, found[2], strict=True):
            assert got.isfinite().all()
            assert (got - want).norm() <= 64 * torch.finfo(dtype).eps * (want.norm() + 1e-3)


def test_what_is_more_than_rounding_raises_and_what_is_less_does_not() -> None:
    eps = torch.finfo(torch.float32).eps
    with pytest.warns(NondeterminismWarning, match="is not reproducible"):
        assert judge("f", 1e-6, eps, whole=True, warn=True)
    assert not judge("f", 1e-6, eps, whole=True, warn=False)
    for error in (1e-3, 1.0, float("inf"), float("nan")):
        with pytest.raises(RegenerationError):
            judge("f", error, eps, whole=True, warn=True)
    assert not judge("x", 8e-3, eps, whole=False, warn=True), "as rounding inverses drift"
    with pytest.raises(RegenerationError, match="rounding grew too much"):
        judge("x", 2e-2, eps, whole=False, warn=True)


def test_of_several_regions_the_first_that_differs_is_named_and_others_end() -> None:
    f, x = counts(), torch.randn(ROWS, 2 * WIDTH, requires_grad=True)
    good = [m.float() for m in mlps(2, WIDTH)]
    a, b = x.chunk(2, -1)
    a, b = revfx.rev_block(a, b, [good[0], f], good, 2)
    c, d = revfx.rev_block(a, b, good, good, 2)
    with pytest.raises(RegenerationError, match="`f of layer 1`"):
        (c + d).mean().backward()
    assert x.grad is not None, "what is found at the end comes after the gradients"


def test_codes_that_found_no_room_are_warned_of_and_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("revfx.codes.is_counted", lambda t: False)
    block, x = revfx.RevBlock(lambda: mlp(WIDTH).float(), lambda: mlp(WIDTH).float(), 4), torch.randn(1024, 2 * WIDTH)

    def step() -> list[Tensor]:
        a, b = (t.requires_grad_() for t in x.clone().chunk(2, -1))
        y1, y2 = block(a, b)
        return list(torch.autograd.grad((y1 + y2).sin().mean(), [a, b, *block.parameters()]))

    with revfx.testing.store_activations():
        plain = step()
    with monkeypatch.context() as patch:
        patch.setattr("revfx.codes.HEADROOM", 0.5)
        patch.setattr("revfx.codes.LEAST", 0)
        with pytest.warns(NondeterminismWarning, match="correction buffer overflowed"):
            lossy = step()
    assert any(not torch.equal(got, want) for got, want in zip(lossy, plain, strict=True))
    for got, want in zip(lossy, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    for _ in range(4):
        assert all(torch.equal(got, want) for got, want in zip(step(), plain, strict=True)), "measured again"


# --- what the host waits for
@contextlib.contextmanager
def waits() -> Generator[list[str]]:
    """A list of what made the host wait for a device, if the tensors were on one."""
    found: list[str] = []
    state = torch.get_rng_state().numel()
    with pytest.MonkeyPatch.context() as patch:

        def counted(owner: Any, name: str) -> None:
            own = getattr(owner, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                if not any(isinstance(a, Tensor) and a.nbytes == state for a in args):  # the generator's own
                    found.append(name)
                return own(*args, **kwargs)

            patch.setattr(owner, name, call)

        for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy", "cpu", "equal"):
            counted(Tensor, name)
        counted(torch, "equal")
        yield found


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", ["additive", "affine exp", "momentum", "transformer", "conv+BN", "dropout"])
def test_a_steady_forward_of_a_converted_model_waits_for_nothing_and_its_backward_once(name: str, exact: bool) -> None:
    make, inputs = ZOO[name]
    model = revfx.convert(make(4).float(), exact=exact)
    assert_one_wait(model, *(t.float().requires_grad_() if t.is_floating_point() else t for t in inputs(64)))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("way", ["rev_block", "RevBlock", "two blocks"])
def test_a_steady_block_waits_likewise(way: str, exact: bool) -> None:
    fs, gs = ([nn.Sequential(mlp(WIDTH).float(), nn.Dropout(0.1)) for _ in range(4)] for _ in "fg")
    block = revfx.RevBlock(fs, gs, 4, exact=exact)
    ways: dict[str, Callable[..., Any]] = {
        "rev_block": lambda a, b: revfx.rev_block(a, b, fs, gs, 4, exact=exact),
        "RevBlock": block,
        "two blocks": lambda a, b: block(*block(a, b)),
    }
    assert_one_wait(ways[way], *(torch.randn(64, WIDTH, requires_grad=True) for _ in "ab"))


def assert_one_wait(call: Callable[..., Any], *inputs: Tensor) -> None:
    for step in range(6):
        with waits() as forward:
            out = call(*inputs)
        leaves = out if isinstance(out, tuple) else (out,)
        loss = torch.stack([t.square().mean() for t in leaves]).sum()
        with waits() as backward:
            loss.backward()
        if step in (2, 4, 5):  # in calls 1, 2, 4, 8... codes are measured
            assert not forward and len(backward) == 1


def test_seen_is_compared_by_bits_but_for_nan() -> None:
    total, some = torch.tensor(1), torch.tensor([1.0, torch.nan, torch.inf])
    pairs = [(None, 0, Seen(total, some), Seen(total, other)) for other in (some.clone(), some.flip(0), -some)]
    (differs, *_), lost = witness._differences(pairs, [torch.tensor(3)])  # pyright: ignore[reportPrivateUsage]
    assert differs == [0.0, 1.0, 1.0] and lost == 3

"""The backward compares what it replays with the forward: always, once, and by one read of the device."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Generator
from typing import Any

import numpy
import pytest
import torch
from helpers import lines, mlp, mlps, relative_error
from steps import STEPS, Functions, assert_same_bits, assert_steps_like_lines, run as steps
from torch import Tensor, nn
from zoo import ZOO

import revfx
from revfx.checksum import checksum
from revfx.eager import witness
from revfx.eager.witness import Seen, Witness, judge
from revfx.errors import NondeterminismWarning, RegenerationError, RevfxWarning


WIDTH, ROWS, DEPTH = 16, 32, 3
Function = Callable[[Tensor], Tensor]


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
def counts() -> Function:
    calls, layer = list[int](), nn.Linear(WIDTH, WIDTH)

    def f(x: Tensor) -> Tensor:
        calls.append(1)
        return layer(x) * len(calls)

    return f


def draws_of_its_own() -> Function:
    generator, layer = torch.Generator().manual_seed(0), nn.Linear(WIDTH, WIDTH)
    return lambda x: layer(x) * torch.rand(WIDTH, generator=generator)


def draws_from_numpy() -> Function:
    generator, layer = numpy.random.default_rng(0), nn.Linear(WIDTH, WIDTH)
    return lambda x: layer(x) * torch.from_numpy(generator.random(WIDTH)) * float(generator.random())


number = [1.0]


def reads_a_global() -> Function:
    layer = nn.Linear(WIDTH, WIDTH)
    number[0] = 1.0

    def f(x: Tensor) -> Tensor:
        number[0] += 1
        return layer(x) * sum(number)

    return f


def writes_through_numpy() -> Function:
    layer = nn.Linear(WIDTH, WIDTH)

    def f(x: Tensor) -> Tensor:
        h = layer(x)
        h.detach().numpy()[:] *= 0.5  # no operator of torch
        return h.sin()

    return f


STATEFUL = (counts, draws_of_its_own, draws_from_numpy, reads_a_global, writes_through_numpy)
AROUND: dict[str, Callable[[Function], Function]] = {
    "alone": lambda f: f,
    "behind a gate that is zero": lambda f: lambda x: f(x) * torch.zeros(WIDTH, requires_grad=True),
    "beside zeros": lambda f: lambda x: (x * 0.0) * f(torch.ones_like(x)),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("make", STATEFUL)
def test_functions_that_are_none_of_their_inputs(make: Callable[[], Function], around: str, fp64: None) -> None:
    def functions() -> Functions:
        fs: list[Any] = [*mlps(DEPTH, WIDTH)]
        fs[1] = AROUND[around](make())
        return fs, [*mlps(DEPTH, WIDTH)]

    for x in (torch.randn(ROWS, WIDTH, requires_grad=True), torch.zeros(ROWS, WIDTH, requires_grad=True)):
        assert_steps_like_lines("rev_block", functions, [x, x])


@pytest.mark.parametrize("make", STATEFUL)
def test_functions_that_are_none_of_their_inputs_without_codes(make: Callable[[], Function], fp64: None) -> None:
    def functions() -> Functions:
        fs: list[Any] = [*mlps(DEPTH, WIDTH)]
        fs[1] = make()
        return fs, [*mlps(DEPTH, WIDTH)]

    x = [torch.randn(ROWS, WIDTH, requires_grad=True) for _ in "ab"]
    want, _ = steps(lambda functions: lines(*functions), functions, x)
    got, _ = steps(lambda functions: revfx.RevBlock(*functions, DEPTH, exact=False), functions, x)
    for g, w in zip(got, want, strict=True):
        assert relative_error(g[:-1], w[:-1]) < 1e-9
        assert torch.equal(g[-1], w[-1])


def test_a_function_that_asks_the_clock() -> None:
    """The plain couplings are given the times that the block saw."""
    times: list[int] = []
    read: list[Callable[[], int]] = [time.perf_counter_ns]

    def functions() -> Functions:
        layer, fs = nn.Linear(WIDTH, WIDTH), [*mlps(DEPTH, WIDTH)]

        def f(x: Tensor) -> Tensor:
            now = read[0]()
            times.append(now)
            return layer(x) * (1 + now % 1000)

        fs[1] = f  # type: ignore[call-overload]
        return fs, [*mlps(DEPTH, WIDTH)]

    x = [torch.randn(ROWS, WIDTH, requires_grad=True) for _ in "ab"]
    got, _ = steps(lambda functions: revfx.RevBlock(*functions, DEPTH), functions, x)
    assert len(times) == len(got)
    read[0] = iter([*times]).__next__
    want, _ = steps(lambda functions: lines(*functions), functions, x)
    for g, w in zip(got, want, strict=True):
        assert_same_bits(g, w)


# --- kernels that jitter
class Jitter:
    """`F.celu` gives `factor` times as much."""

    def __init__(self) -> None:
        self.factor = 1.0


@pytest.fixture
def jitter() -> Generator[Jitter]:
    state = Jitter()

    def celu(x: Tensor, alpha: float = 1.0) -> Tensor:
        return torch.ops.aten.elu.default(x) * state.factor

    with torch.library._scoped_library("aten", "IMPL") as library:  # pyright: ignore[reportPrivateUsage]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the kernel takes the place of another one
            library.impl("celu", celu, "CPU")
        yield state


class Jittering:
    """Steps of a chain in which one function of layer `layer` has such a kernel."""

    def __init__(self, jitter: Jitter, layer: int, dtype: torch.dtype, exact: bool = True) -> None:
        def make(activation: nn.Module) -> nn.Module:
            return nn.Sequential(nn.Linear(WIDTH, WIDTH), activation, nn.Linear(WIDTH, WIDTH)).to(dtype)

        self.jitter = jitter
        self.fs = [make(nn.CELU() if i == layer else nn.Tanh()) for i in range(DEPTH)]
        self.gs = [make(nn.Tanh()) for _ in range(DEPTH)]
        self.x = [torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True) for _ in "ab"]
        self.call = revfx.RevBlock(self.fs, self.gs, DEPTH, exact=exact)

    def gradients(self, call: Callable[..., Any], again: float = 1.0) -> list[Tensor]:
        """Return gradients; the kernel gives `again` times as much in the backward."""
        y1, y2 = call(*self.x)
        loss = (y1.float().sin() + y2.float()).mean()
        self.jitter.factor = again
        try:
            wanted = [*self.x, *(p for m in (*self.fs, *self.gs) for p in m.parameters())]
            return list(torch.autograd.grad(loss, wanted))
        finally:
            self.jitter.factor = 1.0

    def plain(self) -> list[Tensor]:
        return self.gradients(lines(self.fs, self.gs))


@pytest.mark.parametrize("layer", range(DEPTH))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_jitter_is_warned_of_and_gradients_are_within_it(jitter: Jitter, dtype: torch.dtype, layer: int) -> None:
    steps = Jittering(jitter, layer, dtype)
    want, eps = steps.plain(), torch.finfo(dtype).eps
    for _ in range(STEPS):
        assert_same_bits(steps.gradients(steps.call), want)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = steps.gradients(steps.call, 1 + eps)
        texts = [str(w.message) for w in caught if issubclass(w.category, RevfxWarning)]
        assert texts and all("a kernel is not reproducible" in text for text in texts)
        for g, w in zip(found, want, strict=True):
            assert g.isfinite().all() and (g - w).norm() <= 64 * eps * (w.norm() + 1e-3)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("layer", range(DEPTH))
@pytest.mark.parametrize("is_one", [False, True], ids=["two streams", "one tensor"])
def test_kernel_that_gives_something_else_is_noticed(jitter: Jitter, layer: int, exact: bool, is_one: bool) -> None:
    steps, tolerance = Jittering(jitter, layer, torch.float32, exact), 0.0 if exact else 1e-4
    if is_one:
        steps.x[1] = steps.x[0]
    want = steps.plain()
    for _ in range(STEPS):
        assert relative_error(steps.gradients(steps.call), want) <= tolerance
    for _ in range(2):
        try:
            found = steps.gradients(steps.call, 1.5)
        except RegenerationError as e:
            assert "when it is recomputed" in str(e)
        else:
            assert relative_error(found, want) <= tolerance, "it was kept"
    assert relative_error(steps.gradients(steps.call), want) <= tolerance


def test_it_raises_under_retain_graph_in_each_backward(jitter: Jitter) -> None:
    steps = Jittering(jitter, 2, torch.float32)
    for _ in range(STEPS):
        steps.gradients(steps.call)
    y1, y2 = steps.call(*steps.x)
    loss = (y1 + y2).square().mean()
    expected = torch.autograd.grad(loss, steps.x, retain_graph=True)
    for _ in range(2):
        jitter.factor = 1.5
        with pytest.raises(RegenerationError):
            torch.autograd.grad(loss, steps.x, retain_graph=True)
        jitter.factor = 1.0
        assert_same_bits(torch.autograd.grad(loss, steps.x, retain_graph=True), expected)


@pytest.mark.parametrize("layer", range(DEPTH))
def test_results_of_a_kernel_that_jitters_from_the_start_are_kept(jitter: Jitter, layer: int) -> None:
    """The proof finds it."""
    steps = Jittering(jitter, layer, torch.float32)
    want, runs = steps.plain(), list[int]()

    def celu(x: Tensor, alpha: float = 1.0) -> Tensor:
        runs.append(1)
        return torch.ops.aten.elu.default(x) * (1.0 + (len(runs) > 1) * 1e-3)

    with torch.library._scoped_library("aten", "IMPL") as library:  # pyright: ignore[reportPrivateUsage]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            library.impl("celu", celu, "CPU")
        for _ in range(2 * STEPS):
            runs.clear()
            assert_same_bits(steps.gradients(steps.call), want)


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


def test_of_two_blocks_one_that_differs_is_named_and_the_other_one_ends(jitter: Jitter) -> None:
    first, then = Jittering(jitter, 1, torch.float32), Jittering(jitter, DEPTH, torch.float32)
    for _ in range(STEPS):
        first.gradients(lambda *x: then.call(*first.call(*x)))
    c, d = then.call(*first.call(*first.x))
    jitter.factor = 1.5
    with pytest.raises(RegenerationError, match=r"test_witness\.py"):
        (c + d).mean().backward()
    jitter.factor = 1.0
    assert first.x[0].grad is not None, "what is found at the end comes after the gradients"


def test_codes_that_found_no_room_are_warned_of_and_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("revfx.codes.is_counted", lambda t: False)
    block, x = revfx.RevBlock(lambda: mlp(WIDTH).float(), lambda: mlp(WIDTH).float(), 4), torch.randn(1024, 2 * WIDTH)

    def step() -> list[Tensor]:
        a, b = (t.requires_grad_() for t in x.clone().chunk(2, -1))
        y1, y2 = block(a, b)
        return list(torch.autograd.grad((y1 + y2).sin().mean(), [a, b, *block.parameters()]))

    with revfx.testing.store_activations():
        plain = step()
    for _ in range(2):
        assert_same_bits(step(), plain)
    with monkeypatch.context() as patch:  # the third call measures again
        patch.setattr("revfx.codes.HEADROOM", 0.5)
        patch.setattr("revfx.codes.LEAST", 0)
        with pytest.warns(NondeterminismWarning, match="correction buffer overflowed"):
            lossy = step()
    assert any(not torch.equal(got, want) for got, want in zip(lossy, plain, strict=True))
    for got, want in zip(lossy, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    for _ in range(4):
        assert_same_bits(step(), plain)  # measured again


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
    for step in range(8):
        with waits() as forward:
            out = call(*inputs)
        leaves = out if isinstance(out, tuple) else (out,)
        loss = torch.stack([t.square().mean() for t in leaves]).sum()
        with waits() as backward:
            loss.backward()
        if step in (3, 5, 6, 7):  # the first call learns; in calls 1, 2, 4, 8... of the others codes are measured
            assert not forward and len(backward) == 1


def test_seen_is_compared_by_bits_but_for_nan() -> None:
    total, some = torch.tensor(1), torch.tensor([1.0, torch.nan, torch.inf])
    pairs = [(None, 0, Seen(total, some), Seen(total, other)) for other in (some.clone(), some.flip(0), -some)]
    (differs, *_), lost = witness._differences(pairs, [torch.tensor(3)])  # pyright: ignore[reportPrivateUsage]
    assert differs == [0.0, 1.0, 1.0] and lost == 3

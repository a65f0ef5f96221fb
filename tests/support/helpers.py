"""What several test files share: couplings by hand, losses, and comparisons with plain autograd."""

from __future__ import annotations

import os
import string
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from revfx import RevBlock, convert, rev_block
from revfx.converted import conversion_of
from revfx.modes import store_activations
from revfx.passes.regions import Region
from revfx.testing import assert_same_grads, gradients, measure_memory


TOLERANCE = 1e-9  # relative, in fp64
DEEP = bool(os.environ.get("REVFX_DEEP"))  # whether this is a run of what is left out otherwise, too
WAYS = ("rev_block", "RevBlock")
Case = TypeVar("Case")
Pair = tuple[Tensor, Tensor]
Block = Callable[..., Pair]
Wrap = Callable[[Any], Callable[..., Any]]


@pytest.fixture(autouse=True)
def fp64() -> Iterator[None]:
    """Every test of a file that imports this runs in fp64 on one core, from the same random state."""
    torch.manual_seed(0)
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # the tensors are tiny
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


def deep_but(kept: Container[Any], cases: Iterable[Any]) -> list[Any]:
    """Parameters of a test: the `cases` (tuples where it has several parameters), those not `kept` for deep runs."""
    whole = [(case, case if isinstance(case, tuple) else (case,)) for case in cases]
    return [pytest.param(*values, marks=() if case in kept else pytest.mark.deep) for case, values in whole]


def quick_but(left_out: Container[str], cases: Mapping[str, Case]) -> dict[str, Case]:
    """The `cases` of several that run together in processes, without those `left_out` in a run that is not deep."""
    return {name: case for name, case in cases.items() if DEEP or name not in left_out}


def assert_same_as_stored(model: nn.Module, inputs: Sequence[Any], loss: Callable[[Any], Tensor] | None = None) -> None:
    """Raise unless a converted model has the gradients of its own forward with ordinary storage, bit for bit."""
    got = gradients(model, inputs, loss=loss)
    with store_activations():
        want = gradients(model, inputs, loss=loss)
    assert got.keys() == want.keys()
    for name, w in want.items():
        g = got[name]
        assert g is w or (g is not None and w is not None and torch.equal(g, w)), name


def lines(fs: Any, gs: Any) -> Block:
    """(x1, x2, f_side, g_side) -> (y1, y2), the couplings written out: the oracle, under plain autograd."""

    def call(x1: Tensor, x2: Tensor, f_side: Any = None, g_side: Any = None) -> Pair:
        for f, g in zip(fs, gs, strict=True):
            x1 = x1 + (f(x2) if f_side is None else f(x2, f_side))
            x2 = x2 + (g(x1) if g_side is None else g(x1, g_side))
        return x1, x2

    return call


def block(way: str, fs: Any, gs: Any) -> Block:
    """(x1, x2, f_side, g_side) -> (y1, y2) by `rev_block` or by a `RevBlock` that uses the same functions."""
    if way == "RevBlock":
        return RevBlock(fs, gs, len(fs))

    def call(x1: Tensor, x2: Tensor, f_side: Any = None, g_side: Any = None) -> Pair:
        return rev_block(x1, x2, fs, gs, len(fs), f_side, g_side)

    return call


def assert_like_lines(way: str, fs: Any, gs: Any, inputs: Sequence[Tensor], wrap: Wrap | None = None) -> None:
    """The block gives and leaves what the lines do, bit for bit; `wrap` makes the program of `inputs` out of either."""
    module = nn.ModuleList(m for m in (*fs, *gs) if isinstance(m, nn.Module))
    wrap = wrap or (lambda call: call)
    assert_steps(wrap(block(way, fs, gs)), outcome(wrap(lines(fs, gs)), inputs, module), inputs, module)


def both(fs: Iterable[nn.Module], gs: Iterable[nn.Module]) -> nn.ModuleList:
    """The modules of f and g together."""
    return nn.ModuleList([*fs, *gs])


def mlp(width: int = 4, out: int | None = None) -> nn.Sequential:
    """A small smooth network."""
    return nn.Sequential(nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, out or width))


def mlps(count: int, width: int = 4, out: int | None = None) -> nn.ModuleList:
    """`count` small smooth networks."""
    return nn.ModuleList(mlp(width, out) for _ in range(count))


def unseen() -> Any:
    """An object with a queue of `values`, which a re-run of f finds as it is, not as it was: nothing looks into objects
    of Python's own.
    """
    item: Any = string.Formatter()
    item.values = deque[Any]()
    return item


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A random tensor that needs its gradient."""
    return torch.randn(shape, dtype=dtype).requires_grad_()


def loss_of(outputs: Tensor | Iterable[Tensor]) -> Tensor:
    """A scalar whose gradient differs from element to element and from output to output."""
    total = torch.zeros((), dtype=torch.float64)
    for k, y in enumerate((outputs,) if isinstance(outputs, Tensor) else outputs):
        weights = torch.linspace(0.5, 1.5 + k, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
        total = total + (weights * y).sum()
    return total


def relative_error(got: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """The largest relative error between two lists of tensors, in fp64; None must stand in the same places.

    A tensor whose norm is under 1e-6 of the largest one's is measured against that: it may be noise.
    """
    assert [t is None for t in got] == [t is None for t in expected], "a gradient is missing, or there is one too many"
    pairs = [(a, b) for a, b in zip(got, expected, strict=True) if a is not None and b is not None]
    for a, b in pairs:
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.isfinite().all() and b.isfinite().all()
    norms = [float(b.detach().double().norm()) for _, b in pairs]
    floor = 1e-6 * max(norms, default=0.0) or 1.0
    errors = [float((a.detach().double() - b.detach().double()).norm()) for a, b in pairs]
    return max((e / max(n, floor) for e, n in zip(errors, norms, strict=True)), default=0.0)


@dataclass(frozen=True)
class Outcome:
    """What one forward and backward gives and leaves."""

    outputs: list[Tensor]
    input_grads: list[Tensor | None]
    parameter_grads: list[Tensor | None]
    buffers: list[Tensor]
    random: Tensor


def outcome(
    function: Callable[..., Any],
    inputs: Sequence[Tensor] = (),
    module: nn.Module | None = None,
    seed: int = 0,
) -> Outcome:
    """What `function` of copies of `inputs` gives, from a fixed random state; `module` is left as it was."""
    parameters = [] if module is None else list(module.parameters())
    buffers = [] if module is None else list(module.buffers())
    before = [b.clone() for b in buffers]
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    for p in parameters:
        p.grad = None
    torch.manual_seed(seed)
    result = function(*leaves)
    outputs: list[Tensor] = [result] if isinstance(result, Tensor) else list(result)
    loss_of(outputs).backward()
    after = Outcome(
        [y.detach().clone() for y in outputs],
        [x.grad for x in leaves],
        [p.grad for p in parameters],
        [] if module is None else [b.clone() for b in module.buffers()],
        torch.get_rng_state(),
    )
    for p in parameters:
        p.grad = None
    for b, value in zip(buffers, before, strict=True):
        b.copy_(value)
    return after


def assert_same(got: Outcome, expected: Outcome, tolerance: float = TOLERANCE) -> None:
    """Outputs, buffers and random state are equal; gradients agree up to rounding."""
    assert all(torch.equal(a, b) for a, b in zip(got.outputs, expected.outputs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(got.buffers, expected.buffers, strict=True))
    assert torch.equal(got.random, expected.random)
    assert relative_error(got.input_grads, expected.input_grads) <= tolerance
    assert relative_error(got.parameter_grads, expected.parameter_grads) <= tolerance


def assert_steps(
    function: Callable[..., Any],
    expected: Outcome,
    inputs: Sequence[Tensor] = (),
    module: nn.Module | None = None,
    tolerance: float = 0.0,
) -> None:
    """`function` gives and leaves the same in each of three steps: the first learns, the second proves."""
    for _ in range(3):
        assert_same(outcome(function, inputs, module), expected, tolerance)


def assert_like_stored(
    function: Callable[..., Any],
    inputs: Sequence[Tensor] = (),
    module: nn.Module | None = None,
    tolerance: float = TOLERANCE,
) -> None:
    """`function` gives and leaves the same with and without `store_activations()`, in each of three steps."""
    with store_activations():
        expected = outcome(function, inputs, module)
    assert_steps(function, expected, inputs, module, tolerance)


def kept_growth(make: Callable[[int], nn.Module], x: Tensor, layers: tuple[int, int] = (4, 12)) -> float:
    """What a converted model keeps more with more layers, of what the plain one does; gradients are the plain ones."""
    kept: list[list[int]] = []
    for n in layers:
        model = make(n)
        converted = convert(model)
        for _ in range(2):
            assert_same_grads(converted, model, [x])
        kept.append([measure_memory(lambda m=m: m(x).sum()).kept for m in (converted, model)])
    (ours, plain), (ours_deep, plain_deep) = kept
    return (ours_deep - ours) / (plain_deep - plain)


def kept_cuts(model: Any) -> int:
    """The cuts that the latest forward of a converted model kept, over all its regions."""
    return sum(region.kept_cuts for region in model.revfx.regions)


def regions_of(converted: nn.Module) -> list[Region]:
    """Return the regions of all kinds of calls of a converted model."""
    return [region for found in conversion_of(converted).couplings for region in found.regions]

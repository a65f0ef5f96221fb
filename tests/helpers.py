"""What several test files share: couplings by hand, losses, and comparisons with plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from revfx import RevBlock, rev_block
from revfx.mode import store_activations


TOLERANCE = 1e-9  # relative, in fp64
WAYS = ("rev_block", "RevBlock")
Pair = tuple[Tensor, Tensor]
Block = Callable[..., Pair]
Function = Callable[..., Tensor]


def by_hand(
    x1: Tensor,
    x2: Tensor,
    fs: Iterable[Function],
    gs: Iterable[Function],
    f_side: Any = None,
    g_side: Any = None,
) -> Pair:
    """The couplings written out: the oracle, under plain autograd."""
    for f, g in zip(fs, gs, strict=True):
        x1 = x1 + (f(x2) if f_side is None else f(x2, f_side))
        x2 = x2 + (g(x1) if g_side is None else g(x1, g_side))
    return x1, x2


def block(way: str, fs: Sequence[Function], gs: Sequence[Function]) -> Block:
    """(x1, x2, f_side, g_side) -> (y1, y2) by `rev_block` or by a `RevBlock` that uses the same functions."""
    if way == "RevBlock":
        return RevBlock(fs, gs, len(fs))

    def call(x1: Tensor, x2: Tensor, f_side: Any = None, g_side: Any = None) -> Pair:
        return rev_block(x1, x2, list(fs), list(gs), len(fs), f_side, g_side)

    return call


def mlp(width: int = 4, out: int | None = None) -> nn.Sequential:
    """A small smooth network."""
    return nn.Sequential(nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, out or width))


def mlps(count: int, width: int = 4, out: int | None = None) -> nn.ModuleList:
    """`count` small smooth networks."""
    return nn.ModuleList(mlp(width, out) for _ in range(count))


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

    A tensor whose norm is under 1e-6 of the largest one's is measured against that: it may be rounding noise about zero.
    """
    assert [t is None for t in got] == [t is None for t in expected], (
        "a gradient is missing, or there is one too many"
    )
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
    """What `function` of fresh copies of `inputs` gives, from a fixed random state; `module` is left as it was."""
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
    assert relative_error(got.input_grads, expected.input_grads) < tolerance
    assert relative_error(got.parameter_grads, expected.parameter_grads) < tolerance


def assert_like_stored(
    function: Callable[..., Any],
    inputs: Sequence[Tensor] = (),
    module: nn.Module | None = None,
    tolerance: float = TOLERANCE,
) -> None:
    """`function` gives and leaves the same with and without `store_activations()`."""
    got = outcome(function, inputs, module)
    with store_activations():
        expected = outcome(function, inputs, module)
    assert_same(got, expected, tolerance)

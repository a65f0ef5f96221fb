"""Several steps of a program compared with those of plain autograd, bit for bit.

The first call learns, the second one proves the plan, and later ones are steady.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from helpers import block, lines, loss_of
from torch import Tensor, nn

from revfx import convert


STEPS = 3
IN_PLACE = "modified by an inplace operation"  # of autograd's error
Functions = tuple[Sequence[Any], Sequence[Any]]
Make = Callable[[], Functions]
Between = Callable[[Functions, Sequence[Tensor]], object]
Found = list[Any]


def same(a: Any, b: Any) -> bool:
    """Return whether two results are alike: tensors by dtype and elements, lists by their members."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def assert_same_bits(got: Any, want: Any) -> None:
    """Raise unless two results are alike; name the first place where they are not."""
    if isinstance(got, (list, tuple)) and isinstance(want, (list, tuple)):
        texts = [[x for x in found if isinstance(x, str)] for found in (got, want)]
        assert texts[0] == texts[1], texts
        assert len(got) == len(want)
        for number, (g, w) in enumerate(zip(got, want, strict=True)):
            assert same(g, w), f"number {number} of {len(got)}: {g} is not {w}"
    else:
        assert same(got, want), f"{got} is not {want}"


def parts(functions: Functions) -> nn.ModuleList:
    """Return the modules among the functions."""
    return nn.ModuleList(m for fs in functions for m in fs if isinstance(m, nn.Module))


def step(
    call: Callable[..., Any],
    inputs: Sequence[Tensor],
    module: nn.Module,
    between: Callable[[Sequence[Tensor]], object] | None = None,
) -> Found:
    """Run a step; return outputs, gradients, buffers and the random state.

    Args:
        call: the program.
        inputs: copies of them are given to it.
        module: its parameters and buffers count.
        between: called with the outputs before the backward.

    Returns:
        The results; the kind of the error in the place of gradients, if the backward raises.
    """
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    out = call(*leaves)
    outputs: list[Tensor] = [out] if isinstance(out, Tensor) else list(out)
    found: Found = [y.detach().clone() for y in outputs]
    loss = loss_of(outputs)
    if between is not None:
        between(outputs)
    wanted = [t for t in (*leaves, *module.parameters()) if t.requires_grad]
    try:
        found += torch.autograd.grad(loss, wanted, allow_unused=True)
    except RuntimeError as e:
        found.append(f"{type(e).__name__}: {IN_PLACE if IN_PLACE in str(e) else e}")
    return [*found, *(b.clone() for b in module.buffers()), torch.get_rng_state()]


def run(
    of: Callable[[Functions], Callable[..., Any]],
    make: Make,
    inputs: Sequence[Tensor],
    between: Between | None = None,
    count: int = STEPS,
) -> tuple[list[Found], Functions]:
    """Run some steps of fresh functions from a fixed random state.

    Args:
        of: makes the program of the functions.
        make: makes the functions; called once.
        inputs: copies of them are given to each step.
        between: called with the functions and the outputs before each backward.
        count: the number of steps.

    Returns:
        The results of each step, and the functions.
    """
    torch.manual_seed(1)
    functions = make()
    call, module, found = of(functions), parts(functions), list[Found]()
    for number in range(count):
        torch.manual_seed(number)
        found.append(step(call, inputs, module, None if between is None else lambda y: between(functions, y)))
    return found, functions


def assert_steps_like_lines(
    way: str,
    make: Make,
    inputs: Sequence[Tensor],
    between: Between | None = None,
    state: Callable[[Functions], Any] = lambda _: None,
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda call: call,
    may_raise: bool = False,
    count: int = STEPS,
) -> list[Found]:
    """Compare a block with the couplings written out in each step; return the results of its steps.

    Args:
        way: "rev_block" or "RevBlock".
        make: makes the functions of f and of g, once for either.
        inputs: x1, x2, and more for `wrap`.
        between: called with the functions and the outputs before each backward.
        state: the final state of the functions, which is compared too.
        wrap: makes the program of the couplings.
        may_raise: the block may raise autograd's error where the lines do not, as a replay reads a tensor that autograd
            does not save.
        count: the number of steps.
    """
    want, plain = run(lambda functions: wrap(lines(*functions)), make, inputs, between, count)
    got, mine = run(lambda functions: wrap(block(way, *functions)), make, inputs, between, count)
    for g, w, failed in zip(got, want, raised(got), strict=True):
        if not (failed and may_raise):
            assert_same_bits(g, w)
    assert_same_bits(state(mine), state(plain))
    return got


def assert_steps_like_plain(
    make: Callable[[], nn.Module],
    inputs: Sequence[Tensor],
    between: Callable[[Any, Sequence[Tensor]], object] | None = None,
    state: Callable[[Any], Any] = lambda _: None,
    may_raise: bool = False,
    count: int = STEPS,
) -> tuple[Any, list[Found]]:
    """Compare a converted model with the plain one in each step.

    Args:
        make: makes the model, once for either.
        inputs: its arguments.
        between: called with the model and the outputs before each backward.
        state: the state of the model in the end, which is compared too.
        may_raise: see `assert_steps_like_lines`.
        count: the number of steps.

    Returns:
        The converted model, and the results of its steps.
    """

    def spoil(functions: Functions, outputs: Sequence[Tensor]) -> None:
        if between is not None:
            between(functions[0][0], outputs)

    def plain(functions: Functions) -> Callable[..., Any]:
        return functions[0][0]

    def converted(functions: Functions) -> Callable[..., Any]:
        model = convert(functions[0][0])
        found.append(model)
        return model

    found: list[nn.Module] = []
    want, theirs = run(plain, lambda: ([make()], []), inputs, spoil, count)
    got, mine = run(converted, lambda: ([make()], []), inputs, spoil, count)
    for g, w, failed in zip(got, want, raised(got), strict=True):
        if not (failed and may_raise):
            assert_same_bits(g, w)
    assert_same_bits(state(mine[0][0]), state(theirs[0][0]))
    return found[0], got


def raised(found: Iterable[Found]) -> list[bool]:
    """Return for each step whether its backward raised autograd's error."""
    return [any(isinstance(x, str) and IN_PLACE in x for x in results) for results in found]

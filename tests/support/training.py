"""Steps of a converted model beside those of the plain one: they give and leave the same, bit for bit.

The first call learns, the second one proves what is to be dropped, later ones are steady.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import revfx


STEPS = 3
Loss = Callable[[Any], Tensor]
State = dict[str, Any]


def twins(model: nn.Module, **options: Any) -> tuple[Any, Any]:
    """Return a converted copy of a model, with weights of its own, and the model."""
    return revfx.convert(copy.deepcopy(model), **options), model


def sines(output: Any) -> Tensor:
    """Return a scalar with a gradient of its own for each element of all outputs."""
    total = torch.zeros((), dtype=torch.float64)
    for t in pytree.tree_leaves(output):
        if isinstance(t, Tensor) and t.requires_grad:
            total = total + (torch.view_as_real(t) if t.is_complex() else t).sin().sum()
    return total


def take_step(model: nn.Module, args: Sequence[Any], *, seed: int = 0, loss: Loss = sines) -> State:
    """Run a step of training from a random state; return outputs, gradients, buffers, and the random states.

    Args:
        model: its gradients are those of this step alone.
        args: tensors are copied; other arguments are given as they are.
        seed: of torch and numpy.
        loss: from the output to a scalar.
    """
    torch.manual_seed(seed)
    np.random.seed(seed)
    model.zero_grad()
    given = pytree.tree_map_only(Tensor, _copy, tuple(args))
    output = model(*given)
    found: State = {f"output {i}": _detached(t) for i, t in enumerate(pytree.tree_leaves(output))}
    value = loss(output)
    torch.rand(3)  # the backward does not depend on the state of the generator
    if value.requires_grad:
        value.backward()
    for i, t in enumerate(pytree.tree_leaves(given)):
        if isinstance(t, Tensor):
            found[f"input {i}"], found[f"input {i}.grad"] = _detached(t), t.grad if t.is_leaf else None
    return found | state_of(model) | {"torch's generator": torch.get_rng_state(), "numpy's": np.random.rand()}


def state_of(model: nn.Module) -> State:
    """Return copies of the tensors that a model holds: parameters and their gradients, buffers, attributes."""
    found: State = {}
    for name, p in model.named_parameters():
        found[name], found[f"{name}.grad"] = _detached(p), None if p.grad is None else p.grad.clone()
    for name, b in model.named_buffers():
        found[name] = _detached(b)
    for path, m in model.named_modules():
        for name, value in vars(m).items():
            if isinstance(value, Tensor):
                found[f"{path}.{name}"] = _detached(value)
    return found


def assert_same_state(got: State, want: State) -> None:
    """Raise unless two states have the same names and values, bit for bit; name those that differ."""
    assert got.keys() == want.keys(), sorted(got.keys() ^ want.keys())
    assert [name for name, value in want.items() if not _is_same(got[name], value)] == []


def assert_same_steps(
    model: Any,
    plain: nn.Module,
    args: Sequence[Any],
    *,
    steps: int | Iterable[int] = STEPS,
    loss: Loss = sines,
) -> None:
    """Raise unless two models give and leave the same in each of several steps.

    Args:
        model, plain: with weights of their own, or the same ones, of which buffers are put back in between.
        args: as for `take_step`.
        steps: how many, or the seed of each.
        loss: from the output to a scalar.
    """
    is_shared = any(a is b for a, b in zip(model.buffers(), plain.buffers(), strict=True))
    for seed in range(steps) if isinstance(steps, int) else steps:
        before = [b.clone() for b in model.buffers()] if is_shared else []
        got = take_step(model, args, seed=seed, loss=loss)
        for b, value in zip(model.buffers() if is_shared else (), before, strict=True):
            b.copy_(value)
        assert_same_state(got, take_step(plain, args, seed=seed, loss=loss))


def _copy(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_(t.requires_grad)


def _detached(t: Any) -> Any:
    return t.detach().clone() if isinstance(t, Tensor) else t


def _is_same(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return type(a) is type(b) and a == b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.is_floating_point() or a.is_complex():
        a, b = torch.nan_to_num(a), torch.nan_to_num(b)
    return torch.equal(a, b)

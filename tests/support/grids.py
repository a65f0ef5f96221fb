"""What tests and measurements of `grid` share: models that have a form on a grid, and steps compared bit by bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import D, Transformer

from revfx.testing import store_activations


class Affine(nn.Module):
    """`x1 = x1*exp(bounded) + t(x2)`, then `x2 = (x2 + t(x1)) * (sigmoid + c)`: factors from 1/4 upwards."""

    def __init__(self, depth: int, d: int = D) -> None:
        super().__init__()
        self.s = nn.ModuleList(nn.Linear(d, d) for _ in range(depth))
        self.t = nn.ModuleList(nn.Linear(d, d) for _ in range(depth))
        for p in self.parameters():
            p.data.mul_(1 / depth)  # its factors are multiplied up, and the streams need room

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for s, t in zip(self.s, self.t, strict=True):
            a = a * torch.exp(torch.tanh(s(b)) * 1.386 - 0.0001) + 0.1 * t(b)
            b = (b + 0.1 * t(a)) * (torch.sigmoid(s(a)) + 0.5)
        return torch.cat([a, b], -1)


def gradients(model: Callable[..., Any], inputs: Sequence[Any], store: bool, autocast: bool = False) -> list[Tensor]:
    """The outputs of one step and all gradients, drawn from one seed."""
    inputs = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    torch.manual_seed(1)
    with store_activations() if store else contextlib.nullcontext(), torch.autocast("cpu", enabled=autocast):
        outputs = [t for t in pytree.tree_leaves(model(*inputs)) if isinstance(t, Tensor)]
    loss = sum((t.float().sin().mean() for t in outputs), torch.zeros(()))
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    wanted = [*(x for x in inputs if x.requires_grad), *parameters]
    found: list[Any] = [*torch.autograd.grad(loss, wanted, allow_unused=True)]
    return [*outputs, *(g for g in found if g is not None)]


def assert_bitwise(model: Callable[..., Any], inputs: Sequence[Any], autocast: bool = False) -> int:
    """The number of tensors compared, all of which are equal."""
    got = gradients(model, inputs, store=False, autocast=autocast)
    want = gradients(model, inputs, store=True, autocast=autocast)
    different = [i for i, (g, w) in enumerate(zip(got, want, strict=True)) if not torch.equal(g, w)]
    assert not different, f"{len(different)} of {len(got)}"
    return len(got)


class WithDropout(Transformer):
    """The zoo's transformer with dropout in both functions."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        for name, child in list(self.named_children()):
            if isinstance(child, nn.ModuleList):
                setattr(self, name, nn.ModuleList(nn.Sequential(m, nn.Dropout(0.1)) for m in child))

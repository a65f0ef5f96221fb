"""Example inputs: a tensor, or a tuple of positional arguments, and a dict of keyword arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revfx
from revfx.arguments import normalize_arguments
from revfx.testing import assert_same_grads, check_inverse, gradients


class Scaled(nn.Module):
    """Couplings with a number and a mask that are given by name."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = (nn.ModuleList(nn.Linear(8, 8) for _ in range(4)) for _ in "fg")

    def forward(self, x: Tensor, *, memory: Tensor, measure: float = 1.0) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + measure * f(b + memory).tanh()
            b = b + g(a).tanh()
        return torch.cat([a, b], -1)


def test_one_tensor_is_one_argument() -> None:
    x = torch.ones(2)
    assert normalize_arguments(x) == ((x,), {})
    assert normalize_arguments((x, 3), {"a": x}) == ((x, 3), {"a": x})
    assert normalize_arguments([x, 3], {}) == ((x, 3), {})
    assert normalize_arguments(()) == ((), {})
    assert normalize_arguments(([x],))[0] == ([x],)


@pytest.mark.parametrize("args", [None, 3, {"x": torch.ones(2)}, "x"])
def test_anything_else_is_refused(args: Any) -> None:
    with pytest.raises(TypeError, match=r"`args` is a .*`\(x,\)` for one"):
        normalize_arguments(args)
    with pytest.raises(TypeError, match=r"`kwargs` is a .*Give a dict"):
        normalize_arguments((), torch.ones(2))  # type: ignore[arg-type]


def test_all_functions_take_keywords_of_the_model_that_are_their_own_options() -> None:
    torch.manual_seed(0)
    model, x = Scaled().double(), torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    kwargs = {"memory": torch.randn(4, 8, dtype=torch.float64, requires_grad=True), "measure": 0.5}
    converted = revfx.convert(model)
    assert_same_grads(converted, model, x, kwargs)
    assert {"input 0", "input 1"} <= gradients(model, (x,), kwargs).keys()
    assert max(check_inverse(converted, x, kwargs).values()) < 1e-10
    assert revfx.explain(model, x, kwargs).couplings == 8
    inverse = revfx.inverse(model, x, kwargs)
    torch.testing.assert_close(inverse(model(x, **kwargs), memory=kwargs["memory"]), x)

"""Streams that hold one number in whole rows, or that a first step leaves as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled import check, fresh as fresh, inverted
from helpers import TOLERANCE, leaf, relative_error
from test_kinks import ODD, WAYS, Used
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from zoo import D

import revfx
from revfx.capture.trail import Trail
from revfx.passes.atoms import atoms
from revfx.passes.kinks import NEVER, told_apart
from revfx.passes.moved import directions_of, moved
from revfx.passes.numbers import is_generic
from revfx.testing import assert_same_grads


pytestmark = pytest.mark.filterwarnings("ignore::revfx.errors.RevfxWarning")


# --- constant rows, of which normalisations and fixed kernels make zeros
class Rows(nn.Module):
    """A function whose result is dropped for whole rows, as in stochastic depth; `inner` sees constant ones."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.last = inner, nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.last(torch.relu(self.inner(x)))
        return h * torch.bernoulli(torch.full((len(x), 1), 0.5, dtype=x.dtype))


def unbiased() -> nn.Linear:
    layer = nn.Linear(D, D)
    nn.init.zeros_(layer.bias)
    return layer


class Fixed(nn.Linear):
    """Second differences, by a kernel that is no parameter, and then a layer."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__(D, D, bias=False)
        self.register_buffer("kernel", torch.eye(D) - 2 * torch.eye(D).roll(1, 0) + torch.eye(D).roll(2, 0))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(F.linear(input, self.kernel), self.weight)


class Signs(nn.Linear):
    """A binary layer: the signs of its weights, whose gradients pass straight through."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.sign() + self.weight - self.weight.detach())


class Constants(nn.Module):
    def __init__(self, inner: Callable[[], nn.Module], block: bool) -> None:
        super().__init__()
        self.f, self.g = (nn.ModuleList(Rows(inner()) for _ in range(3)) for _ in range(2))
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        if self.block:
            return torch.cat(revfx.rev_block(a, b, self.f, self.g, 3), -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            b = b + g(a)
        return torch.cat([a, b], -1)


INNER: dict[str, Callable[[], nn.Module]] = {
    "norm": lambda: nn.LayerNorm(D),
    "norm of groups": lambda: nn.GroupNorm(4, D),
    "norm, mixed": lambda: nn.Sequential(nn.LayerNorm(D), unbiased()),
    "fixed kernel": lambda: Fixed(),
    "signs": lambda: Signs(D, D, bias=False),
}


@pytest.mark.parametrize("by", ["convert", "backend", "block"])
@pytest.mark.parametrize("name", INNER)
def test_rows_of_one_number(name: str, by: str) -> None:
    x = torch.randn(32, 2 * D)
    x[::2] = 0.5 if name == "signs" else ODD
    for seed in range(2):
        torch.manual_seed(seed)
        model = Constants(INNER[name], by == "block")
        if by == "block":
            torch.manual_seed(9)
            got = torch.autograd.grad(model(x).sin().sum(), list(model.parameters()))
            with revfx.testing.store_activations():
                torch.manual_seed(9)
                want = torch.autograd.grad(model(x).sin().sum(), list(model.parameters()))
            assert relative_error(got, want) < TOLERANCE
        else:
            assert_same_grads(WAYS[by](model), model, [x.requires_grad_()])


@pytest.mark.parametrize("name", ["norm", "norm, mixed"])
def test_streams_without_constant_rows_are_inverted_behind_norms(name: str) -> None:
    converted: Any = revfx.convert(Constants(INNER[name], False))
    converted(torch.randn(32, 2 * D))
    assert converted.revfx.kept_cuts == 2


def test_explain_of_streams_behind_norms_looks_at_no_numbers() -> None:
    assert "invert" in str(revfx.explain(Constants(INNER["norm, mixed"], False), torch.randn(32, 2 * D)))


def test_relu_of_data_that_dropout_leaves_is_no_reason_to_keep_them() -> None:
    converted: Any = revfx.convert(Used(torch.relu))
    converted(torch.randn(32, 2 * D))
    assert converted.revfx.kept_cuts == 2
    assert "save       add" not in str(revfx.explain(Used(torch.relu), torch.randn(8, 2 * D)))


# --- rows to which attention adds nothing
def written_out(x: Tensor) -> Tensor:
    """Causal attention of one head, with dropout."""
    after = torch.ones(x.shape[-2], x.shape[-2]).triu(1).bool()
    scores = (x @ x.transpose(-1, -2)).masked_fill(after, -torch.inf)
    return F.dropout(scores.softmax(-1), 0.5) @ x


def by_torch(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, is_causal=True, dropout_p=0.5)


class Attending(nn.Module):
    """Couplings of which half add nothing to a sample's first row: its only weight is dropped."""

    def __init__(self, attend: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.attend, self.norms = attend, nn.ModuleList(nn.LayerNorm(D) for _ in range(6))
        self.out = nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for norm, out in zip(self.norms, self.out, strict=True):
            a, b = b, a + out(self.attend(norm(b)))
        return torch.cat([a, b], -1)


@pytest.mark.parametrize("attend", [by_torch, written_out])
def test_attention_with_dropout_tells_no_numbers_apart(attend: Callable[[Tensor], Tensor]) -> None:
    report = check(Attending(attend), "aot_eager", leaf(3, 5, 2 * D))
    assert inverted(report) == 6 - 2


aten = torch.ops.aten
ON_GPU: dict[str, Callable[[Tensor], Any]] = {
    "efficient": lambda a: aten._scaled_dot_product_efficient_attention(a, a, a, None, True, 0.5, True),
    "flash": lambda a: aten._scaled_dot_product_flash_attention(a, a, a, 0.5, True),
    "cudnn": lambda a: aten._scaled_dot_product_cudnn_attention(a, a, a, None, True, 0.5, True),
}


@pytest.mark.parametrize("kernel", ON_GPU)
def test_seeds_that_attention_on_a_gpu_returns_tell_none_either(kernel: str) -> None:
    def function(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        a = x + F.dropout(h, 0.5)
        return a, ON_GPU[kernel](a)[0]

    with FakeTensorMode():
        x, h = (torch.empty(2, 4, 8, 16, device="cuda", dtype=torch.float16) for _ in range(2))
    graph = make_fx(function)(x, h).graph
    stream = next(n for n in graph.nodes if n.op == "output").all_input_nodes[0]
    assert stream not in told_apart(graph, atoms(graph), moved(graph, directions_of))

    trail, given = Trail(), graph.find_nodes(op="placeholder")[0].meta["val"]  # in eager mode, within a module
    trail.follow(f"_scaled_dot_product_{kernel}_attention", (given,), {}, out := ON_GPU[kernel](given))
    assert {inside.bends for inside in trail.numbers([given], out[0])["inside"]} == {NEVER}


# --- parameters
def test_parameters_with_a_pattern_are_no_generic_ones() -> None:
    w = torch.randn(64, 64)
    assert is_generic(nn.Parameter(w))
    assert is_generic(nn.Parameter(torch.randn(64, 64, dtype=torch.float32)))
    assert is_generic(nn.Parameter(torch.randn(64, 64, dtype=torch.bfloat16)))
    assert is_generic(nn.Parameter(torch.zeros(64, 64)))
    assert all(is_generic(nn.Parameter(torch.randn(size))) for size in ((1, 3001), (7,), (0,), ()))
    assert is_generic(nn.Parameter(w * (torch.rand(64, 64) < 0.1)))
    assert is_generic(nn.Parameter(torch.empty(64, 64, device="meta")))
    for odd in (torch.eye(64), w.sign(), torch.full((64, 64), 1 / 9), w.round(), torch.ones(1), w.sign() * 0.3171):
        assert not is_generic(nn.Parameter(odd))
        assert not is_generic(nn.Parameter(odd.float()))
    for small in (torch.eye(3), torch.ones(4), torch.tensor([1.0, -2.0, 1.0])):  # few numbers are not few by chance
        assert not is_generic(nn.Parameter(small.float()))
    kernels = torch.randn(8, 4, 3, 3)
    assert is_generic(nn.Parameter(kernels))
    assert not is_generic(nn.Parameter(kernels - kernels.mean((1, 2, 3), keepdim=True)))
    assert not is_generic(nn.Parameter(kernels - kernels.flip(-1)))
    assert not is_generic(w)
    assert not is_generic(nn.Parameter(w.to(torch.float8_e4m3fn), requires_grad=False))

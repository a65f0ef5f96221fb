"""Programs as people write them, around couplings: steps are plain's, bit for bit, and saved tensors are dropped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import revfx
from revfx.converted import conversion_of
from revfx.errors import NotConvertedWarning


STEPS, DEPTH, WIDTH, ROWS = 6, 4, 8, 512
Block = Callable[["Net", nn.Module, Tensor], Tensor]


class Net(nn.Module):
    """Additive couplings; `block` says how a function is applied."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.fs = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(DEPTH)
        )
        self.block, self.config, self.step = block, SimpleNamespace(temperature=1.0), 0
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.gate = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f in self.fs:
            a, b = b, a + self.block(self, f, b)
        return torch.cat([a, b], -1)


def plain(net: Net, f: nn.Module, x: Tensor) -> Tensor:
    return f(x)


def temperature(net: Net, f: nn.Module, x: Tensor) -> Tensor:
    return f(x / net.config.temperature).softmax(-1)


def layer_drop(net: Net, f: nn.Module, x: Tensor) -> Tensor:
    return torch.zeros_like(x) if torch.rand([]) < 0.3 else f(x)


def stochastic_depth(net: Net, f: nn.Module, x: Tensor) -> Tensor:
    keep = torch.bernoulli(torch.full((x.shape[0], 1), 0.8)).div_(0.8)
    return f(x) * keep


def experts(net: Net, f: nn.Module, x: Tensor) -> Tensor:
    scores = net.gate(x).softmax(-1)
    out = torch.zeros_like(x)
    for k, expert in enumerate(net.experts):
        rows = (scores.argmax(-1) == k).nonzero().squeeze(-1)
        if rows.numel():
            out = out.index_add(0, rows, (expert(x[rows]) * scores[rows, k : k + 1]).to(x.dtype))
    return out + f(x)


def early_exit(net: Net, f: nn.Module, x: Tensor) -> Tensor:
    y = f(x)
    return y if y.abs().mean() < 0.3 else y + f(y)


def autocast_inside(net: Net, f: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = f(x)
    return y.float()


def autocast_as_decorator(net: Net, f: nn.Module, x: Tensor) -> Tensor:
    return torch.autocast("cpu", torch.bfloat16)(f)(x).float()


def numpy_fills(net: Net, f: nn.Module, x: Tensor) -> Tensor:
    table = torch.empty_like(x)
    table.numpy()[:] = net.step
    return f(x) * table.add(1).tanh()


def numpy_over_a_result(net: Net, f: nn.Module, x: Tensor) -> Tensor:
    factor = x.detach().mean(0) * 0
    factor.numpy()[:] = 1 + net.step
    return f(x) * factor


def cond(net: Net, f: nn.Module, x: Tensor) -> Tensor:
    return f(torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x * 3, (x,)))


def func_grad(net: Net, f: nn.Module, x: Tensor) -> Tensor:
    return f(x) + torch.func.grad(lambda y: y.square().sum())(x)


def normalized_twice(net: Net, f: nn.Module, x: Tensor) -> Tensor:
    return F.layer_norm(f(F.layer_norm(x, (WIDTH,))), (WIDTH,))


BLOCKS: list[Block] = [
    plain, temperature, layer_drop, stochastic_depth, experts, early_exit, autocast_inside, autocast_as_decorator,
    numpy_fills, numpy_over_a_result, cond, func_grad, normalized_twice,
]  # fmt: skip
KEPT = {numpy_fills, numpy_over_a_result}  # no operator of torch writes these tensors, so that replays differ


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))


def assert_equal(got: list[Tensor | None], want: list[Tensor | None]) -> None:
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        assert g is None or (w is not None and torch.equal(g, w))


def matched(model: Any) -> int:
    planned = conversion_of(model).planned
    assert planned is not None
    return max(kind.matched for kind in planned.kinds.values())


def pair(block: Block) -> tuple[Any, Net]:
    torch.manual_seed(0)
    model = Net(block)
    return revfx.convert(copy.deepcopy(model)), model


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo, for `torch.cond`
@pytest.mark.parametrize("around", [False, True], ids=["", "within autocast"])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.__name__)
def test_functions(block: Block, around: bool) -> None:
    converted, model = pair(block)
    most = 0
    for step in range(STEPS):
        x = (torch.randn(ROWS, 2 * WIDTH) * (1 + step % 2)).requires_grad_()
        found: list[list[Tensor | None]] = []
        for m in (converted, model):
            torch.manual_seed(step)
            m.step, m.config.temperature = step, 1 + step / 2
            with torch.autocast("cpu", torch.bfloat16, enabled=around):
                loss = m(x).float().square().mean()
            found.append(gradients(m, loss))
        assert_equal(*found)
        most = max(most, matched(converted))
    assert block in KEPT or most > 0


# --- what happens between steps, and around the forward
def two_forwards(m: nn.Module, x: Tensor) -> list[Tensor | None]:
    return gradients(m, (m(x) - m(-x).detach() + m(x.flip(0))).square().mean())


def gradient_penalty(m: nn.Module, x: Tensor) -> list[Tensor | None]:
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(m(x).sin().sum(), x, create_graph=True)
    return gradients(m, (slope.norm(dim=-1) - 1).square().mean())


def slices_of_a_batch(m: nn.Module, x: Tensor) -> list[Tensor | None]:
    return gradients(m, sum(m(part).square().sum() for part in x.split(128)))  # pyright: ignore[reportArgumentType]


def flattened_parameters(m: nn.Module, x: Tensor) -> list[Tensor | None]:
    flat = parameters_to_vector(m.parameters()).detach()
    vector_to_parameters(flat * 1.01, m.parameters())
    return gradients(m, m(x).square().mean())


def swapped_parameters(m: Any, x: Tensor) -> list[Tensor | None]:
    for f in m.fs:
        f[0].weight = nn.Parameter(f[0].weight.detach() * 1.01)
    return gradients(m, m(x).square().mean())


def tied_parameters(m: Any, x: Tensor) -> list[Tensor | None]:
    m.fs[0][0].weight = m.fs[1][0].weight
    return gradients(m, m(x).square().mean())


def a_module_replaced(m: Any, x: Tensor) -> list[Tensor | None]:
    m.fs[2][1] = nn.GELU() if isinstance(m.fs[2][1], nn.Tanh) else nn.Tanh()
    return gradients(m, m(x).square().mean())


STEPS_OF = [
    two_forwards, gradient_penalty, slices_of_a_batch, flattened_parameters, swapped_parameters, tied_parameters,
    a_module_replaced,
]  # fmt: skip


@pytest.mark.parametrize("step", STEPS_OF, ids=lambda s: s.__name__)
def test_steps(step: Callable[[nn.Module, Tensor], list[Tensor | None]]) -> None:
    converted, model = pair(plain)
    for seed in range(STEPS):
        torch.manual_seed(seed)
        x = torch.randn(ROWS, 2 * WIDTH)
        assert_equal(step(converted, x), step(model, x))
    assert matched(converted) > 0


class WritesAtTimes(Net):
    """A stream that some steps write to between layers, and read through another view."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for k, f in enumerate(self.fs):
            a, b = b.view_as(b), a + f(b)
            if self.step % 3 == 2 and k == DEPTH // 2:
                b.mul_(2)
                b = b.view_as(b)
        return torch.cat([a, b], -1)


def test_a_stream_that_some_steps_write_to_between_layers() -> None:
    torch.manual_seed(0)
    model: Any = WritesAtTimes(plain)
    converted: Any = revfx.convert(copy.deepcopy(model))
    most = 0
    for step in range(9):
        model.step = converted.step = step
        x = torch.randn(ROWS, 2 * WIDTH)
        assert_equal(*(gradients(m, m(x).sin().sum()) for m in (converted, model)))
        most = max(most, matched(converted))
    assert most >= DEPTH


# --- other methods than forward
class Flow(Net):
    def encode(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def log_prob(self, x: Tensor) -> Tensor:
        return -self.encode(x).square().sum(-1)


@pytest.mark.parametrize("method", ["encode", "log_prob", "forward"])
def test_methods_are_watched_like_the_forward(method: str) -> None:
    torch.manual_seed(0)
    model = Flow(plain)
    converted = revfx.convert(copy.deepcopy(model))
    for _ in range(STEPS):
        x = torch.randn(ROWS, 2 * WIDTH)
        assert_equal(*(gradients(m, getattr(m, method)(x).square().mean()) for m in (converted, model)))
    assert matched(converted) >= DEPTH


@pytest.mark.parametrize("first", [True, False], ids=["compiled first", "compiled afterwards"])
def test_the_model_is_compiled_by_its_user(first: bool) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model, twin = Net(plain), Net(plain)
    twin.load_state_dict(model.state_dict())
    if first:
        twin.compile(backend="eager")
    with pytest.warns(NotConvertedWarning, match="compiled as a whole") if first else nullcontext():
        converted: Any = revfx.convert(twin)
    call = converted if first else torch.compile(converted, backend="eager")
    for _ in range(STEPS):
        x = torch.randn(ROWS, 2 * WIDTH)
        assert_equal(gradients(converted, call(x).square().mean()), gradients(model, model(x).square().mean()))

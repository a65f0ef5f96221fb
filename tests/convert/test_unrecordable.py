"""`convert` of forwards that tracers refuse: branches on data, NumPy, compiled sub-modules, exceptions."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fit_models import segformer
from helpers import fp64, leaf, loss_of
from steps import STEPS, assert_steps_like_plain
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from zoo import Additive, Pairs

import revfx
from revfx.testing import assert_same_grads


__all__ = ["fp64"]


class Branches(Pairs):
    """Couplings behind a branch that depends on data."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        a, b = x.chunk(2, -1)
        if float(x.detach().sum()) > 1e9:
            return x * 2
        for f, g in zip(self.f, self.g, strict=True):
            a = a + scale * f(b)
            b = b + g(a)
        return torch.cat([a, b], -1)


class Averages(Branches):
    """Keeps an average of its inputs, which nothing reads."""

    average: Tensor

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.register_buffer("average", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.average.mul_(0.9).add_(x.detach().mean(), alpha=0.1)
        return super().forward(x, scale)


class Container(nn.Module):
    """A root that reads what it is given, around a sub-module with couplings."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Additive(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (2.0 if float(x.detach().sum()) > 1e9 else 1.0)


class SineByNumPy(torch.autograd.Function):
    """A sine that the dispatcher does not see: NumPy fills the memory of an empty tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        y = torch.empty_like(x)
        np.sin(x.detach().numpy(), out=y.numpy())
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad * x.cos()


class ByNumPy(Pairs):
    """Couplings of a function by NumPy."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + SineByNumPy.apply(f(b))
            b = b + SineByNumPy.apply(g(a))
        return torch.cat([a, b], -1)


def six_steps(model: nn.Module, call: Callable[..., Any], inputs: list[Any]) -> list[Tensor]:
    """Losses, gradients, and weights and buffers of six steps with SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found: list[Tensor] = []
    torch.manual_seed(1)
    for _ in range(6):
        optimizer.zero_grad()
        out = call(*inputs)
        loss = loss_of(out if isinstance(out, Tensor) else out.logits)
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
    return [*found, *model.state_dict().values()]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]]]] = {
    "a branch on data": (lambda: Branches(4), lambda: [torch.randn(8, 32)]),
    "a buffer": (lambda: Averages(2), lambda: [torch.randn(8, 32)]),
    "around a sub-module": (Container, lambda: [torch.randn(8, 32)]),
    "NumPy in an autograd.Function": (lambda: ByNumPy(2), lambda: [torch.randn(8, 32)]),
    "transformers' SegFormer": (segformer, lambda: [torch.randn(2, 3, 32, 32)]),
}


@pytest.mark.filterwarnings("ignore:.*nothing reversible was found")  # in SegFormer
@pytest.mark.parametrize("name", MODELS)
def test_training_is_plain_training_to_the_last_bit(name: str) -> None:
    make, inputs_of = MODELS[name]
    torch.manual_seed(0)
    plain, inputs = make(), inputs_of()
    model = copy.deepcopy(plain)
    got, want = six_steps(model, revfx.convert(model), inputs), six_steps(plain, plain, inputs)
    assert len(got) == len(want) and all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_couplings_of_a_sub_module_are_found(fp64: None) -> None:
    converted, _ = assert_steps_like_plain(Container, [leaf(8, 32)])
    (region,) = converted.revfx.regions
    assert region.kept_cuts == 2 and converted.revfx.refusals == ()
    assert type(converted.inner) is Additive


def test_second_derivatives_are_plains(fp64: None) -> None:
    model, x = Branches(4), leaf(8, 32)
    converted = revfx.convert(model)
    for _ in range(STEPS):
        seconds: list[Tensor] = []
        for call in (model, converted):
            (first,) = torch.autograd.grad(loss_of(call(x)), x, create_graph=True)
            seconds += torch.autograd.grad(first.square().sum(), x)
        assert torch.equal(*seconds)


@pytest.mark.parametrize("calls", range(STEPS))
def test_hooks_put_on_children_later_run(calls: int) -> None:
    converted: Any = revfx.convert(Container())
    for _ in range(calls):
        loss_of(converted(leaf(8, 32))).backward()
    seen: list[str] = []
    converted.inner.f[0].register_forward_hook(lambda *_: seen.append("forward"))
    converted.inner.f[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    for _ in range(STEPS):
        loss_of(converted(leaf(8, 32))).backward()
    assert seen == ["forward", "backward"] * STEPS


class Picky(nn.Module):
    """Raises an exception of its own for some inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Additive(2)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 3:
            raise KeyError("three rows")
        return self.inner(x)


@pytest.mark.parametrize("options", [{}, {"strict": True}, {"memory": 1.0}], ids=str)
def test_an_exception_of_the_model_comes_out_as_itself(options: dict[str, Any]) -> None:
    model, x = Picky(), leaf(8, 32)
    converted: Any = revfx.convert(model, **options)
    for _ in range(2):
        with pytest.raises(KeyError, match="three rows") as raised:
            converted(leaf(3, 32))
        assert raised.value.__cause__ is None and raised.value.__context__ is None
    for _ in range(STEPS):
        assert torch.equal(converted(x), model(x)), "and nothing is left of it"
        with pytest.raises(KeyError, match="three rows"):
            converted(leaf(3, 32))
        assert_same_grads(converted, model, [x])
    assert type(converted.inner) is Additive


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The compiler's log, as it is where nobody set TORCH_LOGS."""
    logs = [logging.getLogger(name) for name in ("torch._dynamo.convert_frame", "torch._subclasses.fake_tensor")]
    for log in logs:
        log.addHandler(caplog.handler)
    yield caplog
    for log in logs:
        log.removeHandler(caplog.handler)


@pytest.mark.filterwarnings("ignore::revfx.errors.RevfxWarning")
def test_an_error_of_the_forward_is_all_that_the_user_reads(
    logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_LOGS", raising=False)
    converted = revfx.convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
            converted(torch.randn(3, 5))
    assert [r.getMessage() for r in logged.records if r.levelno >= logging.WARNING] == []


# --- sub-modules that the user compiles
class Own(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).tanh().exp()


def _sequential(width: int) -> nn.Module:  # dynamo leaves its forward alone, and goes on to its members
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's
@pytest.mark.parametrize("make", [_sequential, Own])
def test_sub_modules_that_are_compiled(make: Any, fp64: None) -> None:
    torch.compiler.reset()
    model: Any = Additive(6)
    width = model.f[0][0].in_features
    model.f, model.g = (nn.ModuleList(make(width) for _ in range(6)) for _ in range(2))
    for f in (*model.f, *model.g):
        f.compile(backend="eager")
    converted: Any = revfx.convert(model)
    x = leaf(5, 2 * width)
    with dynamo_config.patch(fail_on_recompile_limit_hit=True, recompile_limit=4):
        for _ in range(STEPS):
            assert_same_grads(converted, model, [x])
    assert converted.revfx.plans

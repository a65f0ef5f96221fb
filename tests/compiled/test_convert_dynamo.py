"""`convert` where `torch.compile` captures the forward: asked for, or since nothing else can take it."""

from __future__ import annotations

import copy
import logging
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import TOLERANCE, deep_but, fp64, kept_cuts, leaf, loss_of, relative_error
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from zoo import Additive, Pairs

import revfx
from revfx.errors import RevfxError, RevfxWarning
from revfx.testing import assert_same_grads, measure_memory, store_activations


__all__ = ["fp64"]
CAPTURES = ("auto", "dynamo")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # dynamo's
]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Branches(Pairs):
    """Couplings behind a branch that depends on data, which nothing but dynamo takes."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        a, b = x.chunk(2, -1)
        if float(x.sum()) > 1e9:
            return x * 2
        for f, g in zip(self.f, self.g, strict=True):
            a = a + scale * f(b)
            b = b + g(a)
        return torch.cat([a, b], -1)


class Container(nn.Module):
    """A root that can't be recorded around a sub-module that can."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Additive(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (2.0 if float(x.sum()) > 1e9 else 1.0)


def quietly(model: nn.Module, capture: str) -> Any:
    """The converted model after its first call, which warns that "auto" had to use dynamo."""
    converted = revfx.convert(model, capture=capture)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RevfxWarning)
        converted(leaf(8, 32))
    return converted


def gradients(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss_of(model(x)), [x, *model.parameters()]))


def assert_like(model: nn.Module, converted: nn.Module, x: Tensor) -> None:
    assert relative_error(gradients(converted, x), gradients(model, x)) < TOLERANCE


@pytest.mark.parametrize("capture", deep_but(("auto",), CAPTURES))
def test_a_model_that_cannot_be_recorded_is_captured(capture: str) -> None:
    model, x = Branches(4), leaf(8, 32)
    converted = quietly(model, capture)
    assert [len(graph.regions) for graph in converted.revfx.compiled.graphs] == [0, 1]
    assert kept_cuts(converted) == 2
    assert_like(model, converted, x)
    assert "test_convert_dynamo.py" in converted.revfx.program
    assert torch.equal(converted(x, scale=0.5), model(x, scale=0.5))
    assert_like(model, converted, leaf(5, 32))


class Averages(Branches):
    """Keeps an average of what it is given, of which it makes no use."""

    average: Tensor

    def __init__(self, depth: int, average: Tensor) -> None:
        super().__init__(depth)
        self.register_buffer("average", average)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.average.mul_(0.9).add_(x.detach().mean(), alpha=0.1)
        return super().forward(x, scale)


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("shape", [(1,), pytest.param((), marks=pytest.mark.deep)])
@pytest.mark.filterwarnings("ignore::revfx.errors.RevfxWarning")
def test_what_is_written_to_a_buffer_is_not_lost(shape: tuple[int, ...], capture: str) -> None:
    model, x = Averages(2, torch.zeros(shape, dtype=torch.float64)), leaf(8, 32)
    converted: Any = revfx.convert(copy.deepcopy(model), capture=capture)
    for _ in range(3):
        model(x)
        converted(x)
    assert torch.equal(converted.average, model.average)


@pytest.mark.deep
@pytest.mark.parametrize("capture", CAPTURES)
def test_memory_does_not_grow_with_depth(capture: str) -> None:
    x = leaf(1024, 32)
    growth: list[int] = []
    for make in (lambda m: m, lambda m: quietly(m, capture)):
        peaks: list[int] = []
        for depth in (3, 6):
            model = make(Branches(depth))
            model(x).square().mean().backward()
            model.zero_grad()
            theirs = sum(p.nbytes for p in model.parameters())
            peaks.append(measure_memory(lambda model=model: model(x).square().mean()).peak - theirs)
        growth.append(peaks[1] - peaks[0])
    plain, ours = growth
    assert ours < 0.03 * plain


def test_auto_says_that_dynamo_captured_and_why() -> None:
    with pytest.warns(RevfxWarning, match=r"(?s)captured by `torch.compile`.*depends on the values of a tensor"):
        revfx.convert(Branches(4))(leaf(8, 32))


def test_auto_prefers_the_sub_modules_where_the_regions_lie_in_them() -> None:
    model, x = Container(), leaf(8, 32)
    converted = quietly(model, "auto")
    assert converted.revfx.compiled is None
    assert_like(model, converted, x)
    assert converted.inner.revfx.plans[0].regions


@pytest.mark.deep
@pytest.mark.parametrize("capture", CAPTURES)
def test_it_is_the_same_module_from_outside(capture: str) -> None:
    model, x = Branches(4), leaf(8, 32)
    converted = quietly(model, capture)
    assert list(converted.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(converted.parameters(), model.parameters(), strict=True))
    for other in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RevfxWarning)
            other(x)
        assert [len(graph.regions) for graph in other.revfx.compiled.graphs] == [0, 1]
        assert_like(model, other, x)
    converted.eval()
    assert_like(model, converted, x)
    with torch.no_grad():
        assert torch.equal(converted(x), model(x))
    with store_activations():
        assert_like(model, converted, x)


@pytest.mark.parametrize("capture", deep_but(("auto",), CAPTURES))
def test_a_second_derivative_raises_and_names_the_way_out(capture: str) -> None:
    model, x = Branches(4), leaf(8, 32)
    converted = quietly(model, capture)
    with pytest.raises(RevfxError, match=r"create_graph=True.*store_activations"):
        torch.autograd.grad(loss_of(converted(x)), x, create_graph=True)
    with store_activations():
        (first,) = torch.autograd.grad(loss_of(converted(x)), x, create_graph=True)
    (want,) = torch.autograd.grad(loss_of(model(x)), x, create_graph=True)
    seconds = [torch.autograd.grad(g.square().sum(), x) for g in (first, want)]
    assert relative_error(*seconds) < TOLERANCE


@pytest.mark.parametrize("capture", deep_but(("auto",), CAPTURES))
def test_hooks_put_on_children_later_run(capture: str) -> None:
    model, x = Branches(4), leaf(8, 32)
    converted = quietly(model, capture)
    seen: list[str] = []
    handle = converted.f[0].register_forward_hook(lambda *_: seen.append("forward"))
    assert_like(model, converted, x)
    handle.remove()
    assert seen[0] == "forward"
    handle = converted.f[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    assert_like(model, converted, x)
    handle.remove()
    assert seen[-1] == "backward"


def test_a_weight_written_between_forward_and_backward_raises() -> None:
    model, x = Branches(4), leaf(8, 32)
    converted = quietly(model, "dynamo")
    y = converted(x)
    with torch.no_grad():
        next(model.f[0].parameters()).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(y).backward()
    y = converted(x)
    first = next(model.f[0].parameters())
    first.data = first.data + 1
    with pytest.raises(RevfxError, match="modified in place"):
        loss_of(y).backward()


def test_strict_raises_where_dynamo_finds_nothing_either() -> None:
    class Residual(Branches):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            if float(x.sum()) > 1e9:
                return x * 2
            for f in self.f:
                x = x + scale * torch.cat([f(h) for h in x.chunk(2, -1)], -1)
            return x

    with pytest.raises(revfx.NotReversibleError, match="left as it was"):
        revfx.convert(Residual(2), capture="dynamo", strict=True)(leaf(8, 32))


def test_wrong_use_is_told_in_words() -> None:
    with pytest.raises(ValueError, match=r"capture='jit'.*use 'auto', 'fx' or 'dynamo'"):
        revfx.convert(Branches(1), capture="jit")
    with pytest.raises(ValueError, match="leave `example_inputs` out"):
        revfx.convert(Branches(1), (leaf(8, 32),), capture="dynamo")


# --- sub-modules that the user compiles
class Own(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).tanh().exp()


def _sequential(width: int) -> nn.Module:  # dynamo leaves its forward alone, and goes on to what that calls
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


@pytest.mark.parametrize("make", [_sequential, Own])
def test_what_packs_and_unpacks_is_not_compiled_with_a_sub_module(make: Any, fp64: None) -> None:
    model: Any = Additive(6)
    width = model.f[0][0].in_features
    model.f, model.g = (nn.ModuleList(make(width) for _ in range(6)) for _ in range(2))
    for f in (*model.f, *model.g):
        f.compile(backend="eager")
    converted: Any = revfx.convert(model)
    x = leaf(5, 2 * width)
    with dynamo_config.patch(fail_on_recompile_limit_hit=True, recompile_limit=4):
        assert_same_grads(converted, model, [x])
    assert converted.revfx.plans


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the compiler logs from now on, as it does where nobody set TORCH_LOGS."""
    logs = [logging.getLogger(name) for name in ("torch._dynamo.convert_frame", "torch._subclasses.fake_tensor")]
    for log in logs:
        log.addHandler(caplog.handler)
    yield caplog
    for log in logs:
        log.removeHandler(caplog.handler)


@pytest.mark.parametrize("capture", CAPTURES)
def test_an_error_of_the_forward_is_all_that_the_user_reads(
    capture: str, logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler printed 351 lines before the error that plain PyTorch raises."""
    monkeypatch.delenv("TORCH_LOGS", raising=False)
    converted = revfx.convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), capture=capture)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
            converted(torch.randn(3, 5))
    assert [r.getMessage() for r in logged.records if r.levelno >= logging.WARNING] == []


def test_who_sets_torch_logs_reads_all(logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_LOGS", "dynamo")
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        revfx.convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), capture="dynamo")(torch.randn(3, 5))
    assert any("WON'T CONVERT" in r.getMessage() for r in logged.records)

"""Compiled `rev_block`: functions that keep state, numbers that rounding would change, and what else is around."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled import fresh as fresh
from helpers import TOLERANCE, leaf, mlp, relative_error
from torch import Tensor, nn
from torch._dynamo.backends.distributed import DDPOptimizer
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import revfx
from revfx import RevBlock
from revfx.backend import revfx as revfx_backend
from revfx.partitioner import reports


REVFX: dict[str, Any] = {"backend": "revfx", "options": {"inner": "aot_eager"}}
WAYS: dict[str, dict[str, Any]] = {"default": {"backend": "aot_eager"}, "revfx": REVFX}
ways = pytest.mark.parametrize("way", WAYS)
pytestmark = pytest.mark.filterwarnings("ignore::revfx.errors.RevfxWarning")


class Stateful(nn.Module):
    """A layer that is scaled by what it keeps, and counts its calls."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.count, self.seen = nn.Linear(4, 4), 0, list[int]()
        self.register_buffer("mean", torch.ones(4))

    def scaled(self, x: Tensor, by: Any) -> Tensor:
        return self.layer(x * by).tanh()


class Written(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.5).add_(x.detach().mean(0))
        return self.scaled(x, self.mean)


class Inherited(Written):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Rebound(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean * 0.5 + x.detach().mean(0)
        return self.scaled(x, self.mean)


class Counting(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.scaled(x, self.count)


class Listing(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(1)
        return self.scaled(x, len(self.seen))


def written_out(block: RevBlock) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    fs, gs = block.get_submodule("f"), block.get_submodule("g")

    def lines(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        for f, g in zip(fs.children(), gs.children(), strict=True):
            a = a + f(b)
            b = b + g(a)
        return a, b

    return lines


def gradients(call: Callable[..., tuple[Tensor, Tensor]], block: nn.Module, *inputs: Tensor) -> list[Tensor]:
    wanted = [*dict.fromkeys(inputs), *block.parameters()]
    y1, y2 = call(*inputs)
    return [*torch.autograd.grad(y1.sin().sum() + y2.sin().sum(), wanted)]


@ways
@pytest.mark.parametrize("kind", [Written, Rebound, Counting, Listing, Inherited])
def test_what_functions_keep_is_written_once_and_read_as_it_was(kind: type[Stateful], way: str) -> None:
    block = RevBlock(kind, kind, 2)
    plain = copy.deepcopy(block)
    call, lines = torch.compile(block, **WAYS[way]), written_out(plain)
    for _ in range(2):
        inputs = leaf(3, 4), leaf(3, 4)
        got, want = gradients(call, block, *inputs), gradients(lines, plain, *inputs)
        assert relative_error(got, want) < TOLERANCE
        for a, b in zip(block.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(a, b)
    parts = [(m.count, m.seen) for m in block.modules() if isinstance(m, Stateful)]
    assert parts == [(m.count, m.seen) for m in plain.modules() if isinstance(m, Stateful)]


@ways
def test_streams_that_hold_exact_zeros_where_functions_add_none(way: str) -> None:
    f, g = (nn.Sequential(nn.ReLU(), nn.Linear(4, 4), nn.ReLU()) for _ in range(2))
    block = RevBlock(f, g, 6)
    x = leaf(64, 4).detach().relu().requires_grad_()
    got = gradients(torch.compile(block, **WAYS[way]), block, x, x)
    assert relative_error(got, gradients(written_out(block), block, x, x)) < TOLERANCE


@pytest.mark.parametrize("anchor_every, raises", [(None, True), (1, False)])
def test_sums_in_which_digits_are_lost_raise(anchor_every: int | None, raises: bool) -> None:
    block = RevBlock(mlp, mlp, 4, anchor_every=anchor_every).float()
    inputs = leaf(16, 4).detach().float().requires_grad_(), leaf(16, 4).detach().float().requires_grad_()
    with torch.no_grad():
        [*block.parameters()][-2].mul_(1e7)
    call = torch.compile(block, backend="aot_eager")
    if raises:
        with pytest.raises(RuntimeError, match="layer 3 of a rev_block adds so much that digits are lost"):
            call(*inputs)
        return
    assert relative_error(gradients(call, block, *inputs), gradients(written_out(block), block, *inputs)) < 1e-4


def test_streams_that_come_back_otherwise_raise() -> None:
    def steep() -> nn.Module:
        first, last = nn.Linear(4, 4), nn.Linear(4, 4)
        nn.init.normal_(first.weight)
        nn.init.normal_(last.weight)
        return nn.Sequential(first, nn.GELU(), last)

    block = RevBlock(steep, steep, 10).float()
    inputs = [leaf(16, 4).detach().float().requires_grad_() for _ in range(2)]
    y1, y2 = torch.compile(block, backend="aot_eager")(*inputs)
    with pytest.raises(RuntimeError, match="streams of a rev_block came back more than 1 % off"):
        (y1.sin().sum() + y2.sum()).backward()


def test_streams_in_half_precision_are_not_inverted() -> None:
    block = RevBlock(mlp, mlp, 24).bfloat16()
    inputs = [leaf(16, 4).detach().bfloat16().requires_grad_() for _ in range(2)]
    got = gradients(torch.compile(block, backend="aot_eager"), block, *inputs)
    for a, b in zip(got, gradients(written_out(block), block, *inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("given", [{"strict": True}, {"exact": True}], ids=str)
def test_the_backend_finds_a_block_as_it_finds_lines(given: dict[str, Any]) -> None:
    block = RevBlock(mlp, mlp, 8).float()
    inputs = [leaf(8, 4).detach().float().requires_grad_() for _ in range(2)]
    options = {"inner": "aot_eager", **given}
    with reports() as found:
        got = gradients(torch.compile(block, backend="revfx", options=options), block, *inputs)
        want = gradients(torch.compile(written_out(block), backend="revfx", options=options), block, *inputs)
    assert [[region.steps for region in report.regions] for report in found] == [[16], [16]]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


BACKEND = functools.partial(revfx_backend, options={"inner": "aot_eager"})


@pytest.mark.parametrize(
    "backend", [BACKEND, DDPOptimizer(2**30, BACKEND).compile_fn], ids=["partial", "by buckets of DDP"]
)
def test_a_wrapped_backend_finds_a_block(backend: Any) -> None:
    block, inputs = RevBlock(mlp, mlp, 2).float(), [leaf(8, 4).detach().float().requires_grad_() for _ in range(2)]
    with reports() as found:
        got = gradients(torch.compile(block, backend=backend), block, *inputs)
    assert relative_error(got, gradients(written_out(block), block, *inputs)) < 1e-5
    assert any(report.regions for report in found)


def test_inductor_with_the_partitioner_finds_a_block() -> None:
    block, inputs = RevBlock(mlp, mlp, 2), (leaf(8, 4), leaf(8, 4))
    options: Any = {"custom_partitioner_fn": revfx.ReversiblePartitioner()}
    with reports() as found:
        torch.compile(block, options=options)(*inputs)
    assert found[0].regions


def test_gradients_inside_of_the_compiled_function() -> None:
    block, inputs = RevBlock(lambda: nn.Sequential(mlp(), nn.Dropout(0.5)), mlp, 2), (leaf(8, 4), leaf(8, 4))

    def step(a: Tensor, b: Tensor) -> list[Tensor]:
        return gradients(block, block, a, b)

    torch.manual_seed(3)
    want = gradients(written_out(block), block, *inputs)
    torch.manual_seed(3)
    assert relative_error(torch.compile(step, **REVFX)(*inputs), want) < TOLERANCE


@pytest.mark.parametrize("around", ["checkpoint", "save_on_cpu"])
def test_hooks_on_saved_tensors_around_the_first_call(around: str) -> None:
    block, inputs = RevBlock(mlp, mlp, 2), (leaf(8, 4), leaf(8, 4))
    compiled = torch.compile(block, backend="aot_eager")

    def call(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        if around == "checkpoint":
            return checkpoint(compiled, *inputs, use_reentrant=False)
        with save_on_cpu():
            return compiled(*inputs)

    want = gradients(written_out(block), block, *inputs)
    assert relative_error(gradients(call, block, *inputs), want) < TOLERANCE
    assert relative_error(gradients(block, block, *inputs), want) < TOLERANCE  # hooks can still be set


@pytest.mark.parametrize(
    "write", [lambda y: y.mul_(1.01), lambda y: y.relu_(), lambda y: y[0].zero_()], ids=["scaled", "relu", "a row"]
)
def test_outputs_that_are_written_to_in_the_same_graph(write: Callable[[Tensor], Any]) -> None:
    block, inputs = RevBlock(mlp, mlp, 3), (leaf(5, 4), leaf(5, 4))

    def written(of: Any) -> Callable[..., tuple[Tensor, Tensor]]:
        def call(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            y1, y2 = of(a, b)
            write(y2)
            return y1, y2

        return call

    got = gradients(torch.compile(written(block), backend="aot_eager"), block, *inputs)
    assert relative_error(got, gradients(written(written_out(block)), block, *inputs)) < TOLERANCE


def test_inputs_that_are_written_to_in_the_same_graph() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front = RevBlock(lambda: nn.Sequential(nn.Tanh(), nn.Linear(4, 4)), mlp, 3)

        def forward(self, a: Tensor, b: Tensor, plain: bool = False) -> tuple[Tensor, Tensor]:
            a, b = a * 1.0, b * 1.0
            y1, y2 = written_out(self.front)(a, b) if plain else self.front(a, b)
            a.mul_(3.0)
            b.mul_(2.0)
            return y1 + b, y2 + a

    model, inputs = Shifted(), (leaf(5, 4), leaf(5, 4))
    want = gradients(functools.partial(model, plain=True), model.front, *inputs)
    assert relative_error(gradients(torch.compile(model, backend="aot_eager"), model.front, *inputs), want) < TOLERANCE


class Branching(nn.Module):
    """A layer that looks at a value, which ends the graph, and counts how often."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.count = nn.Linear(4, 4), nn.BatchNorm1d(4), 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.layer(x))
        if h.sum() > 1e9:
            h = h * 2
        self.count += 1
        return h.tanh()


@ways
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo, where a graph ends
@pytest.mark.parametrize("inside", ["alone", "in a model", "by anchors"])
def test_functions_that_end_the_graph(inside: str, way: str) -> None:
    block = RevBlock(Branching, nn.Tanh, 3, anchor_every=2 if inside == "by anchors" else None)
    plain, inputs = copy.deepcopy(block), (leaf(5, 4), leaf(5, 4))
    lines, call = written_out(plain), block
    if inside == "in a model":
        call = torch.compile(lambda a, b: block(a.sin(), b), **WAYS[way])
        want = gradients(lambda a, b: lines(a.sin(), b), plain, *inputs)
    else:
        call = torch.compile(block, **WAYS[way])
        want = gradients(lines, plain, *inputs)
    assert relative_error(gradients(call, block, *inputs), want) < TOLERANCE
    for a, b in zip(block.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert [m.count for m in block.modules() if isinstance(m, Branching)] == [1, 1, 1]

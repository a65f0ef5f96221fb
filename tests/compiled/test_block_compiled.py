"""`rev_block` and `RevBlock` in compiled models: their lines are traced, and inductor gets revfx's partitioner."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiled import fresh as fresh
from helpers import TOLERANCE, deep_but, leaf, mlp, mlps, relative_error
from torch import Tensor, nn
from torch._dynamo.backends.distributed import DDPOptimizer
from torch._inductor import config as inductor_config
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from revfx import RevBlock, ReversiblePartitioner, convert, rev_block
from revfx.compiled.backend import revfx as revfx_backend
from revfx.compiled.partitioner import reports
from revfx.testing import measure_memory
from revfx.traced import say_rounding


Pair = tuple[Tensor, Tensor]
Call = Callable[..., Pair]
REVFX: dict[str, Any] = {"backend": "revfx", "options": {"inner": "aot_eager"}}
QUICK: dict[str, Any] = {"cpp.simdlen": 1}  # which inductor compiles fast
WAYS: dict[str, dict[str, Any]] = {
    "inductor": {"fullgraph": True, "options": QUICK},
    "other compilers": {"fullgraph": True, "backend": "aot_eager"},
    "revfx": {"fullgraph": True, **REVFX},
}
others = pytest.mark.parametrize("way", ["other compilers", "revfx"])


def written_out(block: nn.Module) -> Call:
    """The couplings as lines: the oracle."""
    fs, gs = block.get_submodule("f"), block.get_submodule("g")

    def lines(a: Tensor, b: Tensor, *sides: Any) -> Pair:
        f_side, g_side = ([s] for s in sides) if sides else ([], [])
        for f, g in zip(fs.children(), gs.children(), strict=True):
            a = a + f(b, *f_side)
            b = b + g(a, *g_side)
        return a, b

    return lines


def gradients(call: Callable[..., Any], module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    wanted = [t for t in (*dict.fromkeys(inputs), *module.parameters()) if t.requires_grad]
    y1, y2 = call(*inputs)
    return [*torch.autograd.grad(y1.sin().sum() + y2.sin().sum(), wanted)]


def pair(rows: int = 3, *, dtype: torch.dtype = torch.float64) -> Pair:
    return leaf(rows, 4, dtype=dtype), leaf(rows, 4, dtype=dtype)


# --- which partitioner inductor gets
def partitioners(call: Callable[..., Any], *inputs: Tensor, wrap: Callable[[Any], Any] = lambda c: c) -> list[Any]:
    """The partitioner of each graph that `call` is compiled to."""
    found: list[Any] = []

    def compiler(gm: Any, inputs: Sequence[Tensor]) -> Any:
        found.append(inductor_config.custom_partitioner_fn)
        return gm.forward

    torch.compile(call, backend=wrap(compiler))(*inputs)
    assert inductor_config.custom_partitioner_fn is None
    return found


def by_buckets(compiler: Any) -> Any:
    return DDPOptimizer(2**30, compiler).compile_fn


@pytest.mark.parametrize("wrap", [lambda c: c, functools.partial, by_buckets], ids=["bare", "partial", "DDP's buckets"])
def test_a_block_asks_for_the_partitioner(wrap: Callable[[Any], Any]) -> None:
    block = RevBlock(mlp, mlp, 2)
    (found,) = partitioners(lambda a, b: block(a.sin(), b), *pair(), wrap=wrap)
    assert isinstance(found, ReversiblePartitioner)


def test_the_log_says_once_that_they_come_back_up_to_rounding(caplog: pytest.LogCaptureFixture) -> None:
    say_rounding.cache_clear()
    with caplog.at_level(logging.INFO, logger="revfx"):
        for model in (RevBlock(mlp, mlp, 2), convert(RevBlock(mlp, mlp, 2))):
            assert partitioners(model, *pair()) != [None]
    (line,) = (r.getMessage() for r in caplog.records if r.name == "revfx")
    assert "up to rounding" in line and "`convert(model, compile=True)`" in line


def test_no_partitioner_where_nothing_is_to_be_freed() -> None:
    fs = mlps(2)
    assert partitioners(lambda a, b: rev_block(a, b, fs, fs, 2, is_training=False), *pair()) == [None]
    assert partitioners(lambda a, b: (a + fs[0](b), b), *pair()) == [None]


def test_a_partitioner_of_the_user_s_stays() -> None:
    block, mine = RevBlock(mlp, mlp, 2), ReversiblePartitioner(strict=True)
    seen: list[Any] = []

    def compiler(gm: Any, inputs: Sequence[Tensor]) -> Any:
        seen.append(inductor_config.custom_partitioner_fn)
        return gm.forward

    with inductor_config.patch(custom_partitioner_fn=mine):
        torch.compile(block, backend=compiler)(*pair())
    assert seen == [mine]


# --- what is found, and gradients
class Attention(nn.Module):
    """A module class of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).view(1, -1, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "smooth": mlp,
    "relu": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)),
    "dropout": lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Dropout(0.5), nn.Linear(4, 4)),
    "batch norm, dropout": lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5)),
    "a class of the user's": Attention,
}


@pytest.mark.parametrize("kind", deep_but(("batch norm, dropout",), KINDS))
def test_inductor_frees_a_block_and_gives_the_gradients_of_the_lines(kind: str) -> None:
    block = RevBlock(KINDS[kind], KINDS[kind], 2)
    plain, inputs = copy.deepcopy(block), pair(8)
    with reports() as found, inductor_config.patch(fallback_random=True):
        torch.manual_seed(1)
        got = gradients(torch.compile(block, **WAYS["inductor"]), block, *inputs)
    torch.manual_seed(1)
    assert relative_error(got, gradients(written_out(plain), plain, *inputs)) < TOLERANCE
    assert [len(report.regions) for report in found] == [1]
    for a, b in zip(block.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_backend_finds_a_block_as_it_finds_lines() -> None:
    block = RevBlock(mlp, mlp, 4).float()
    inputs = pair(8, dtype=torch.float32)
    options: dict[str, Any] = {"inner": "aot_eager", "strict": True}
    with reports() as found:
        got = gradients(torch.compile(block, backend="revfx", options=options), block, *inputs)
        want = gradients(torch.compile(written_out(block), backend="revfx", options=options), block, *inputs)
    assert [[region.steps for region in report.regions] for report in found] == [[8], [8]]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_wrapped_backend_finds_a_block() -> None:
    block, inputs = RevBlock(mlp, mlp, 2), pair(8)
    with reports() as found:
        backend = functools.partial(revfx_backend, options={"inner": "aot_eager"})
        got = gradients(torch.compile(block, backend=backend), block, *inputs)
    assert relative_error(got, gradients(written_out(block), block, *inputs)) < TOLERANCE
    assert any(report.regions for report in found)


class Sided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, side: Any) -> Tensor:
        return torch.tanh(self.linear(x) + side[0] * side[1]["k"]) * side[2]


@others
def test_side_inputs_nested_shared_repeated_and_not_tensors(way: str) -> None:
    block = RevBlock(Sided, Sided, 2)

    def run(call: Callable[..., Pair]) -> Call:
        return lambda x, y, p, q: call(x, y, [p, {"k": q.sin()}, 2.0], (x, {"k": p, "unused": "text"}, 0.5))

    inputs = leaf(3, 4), leaf(3, 4), leaf(3, 4), leaf(4)
    got = gradients(torch.compile(run(block), **WAYS[way]), block, *inputs)
    assert relative_error(got, gradients(run(written_out(block)), block, *inputs)) < TOLERANCE


@others
def test_a_closure_over_a_tensor_and_a_tensor_as_both_streams(way: str) -> None:
    gs = mlps(2)

    def call(x: Tensor, w: Tensor) -> Pair:
        return rev_block(x, x, lambda z: torch.tanh(z @ w), gs, 2)

    def lines(x: Tensor, w: Tensor) -> Pair:
        a = b = x
        for g in gs:
            a = a + torch.tanh(b @ w)
            b = b + g(a)
        return a, b

    inputs = leaf(3, 4), leaf(4, 4)
    got = gradients(torch.compile(call, **WAYS[way]), gs, *inputs)
    assert relative_error(got, gradients(lines, gs, *inputs)) < TOLERANCE


class Stateful(nn.Module):
    """A layer that is scaled by what it keeps, and counts its calls."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.count = nn.Linear(4, 4), 0
        self.register_buffer("mean", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.mean.mul_(0.5).add_(x.detach().mean(0))
        return self.layer(x * self.mean * self.count).tanh()


@others
def test_what_functions_keep_is_written_once_and_read_as_it_was(way: str) -> None:
    block = RevBlock(Stateful, Stateful, 2)
    plain = copy.deepcopy(block)
    call, lines = torch.compile(block, **WAYS[way]), written_out(plain)
    for _ in range(2):
        inputs = pair()
        assert relative_error(gradients(call, block, *inputs), gradients(lines, plain, *inputs)) < TOLERANCE
        for a, b in zip(block.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(a, b)
    counts = [[m.count for m in of.modules() if isinstance(m, Stateful)] for of in (block, plain)]
    assert counts[0] == counts[1] == [2] * 4


# --- what is around
@others
def test_several_batch_sizes_share_dynamic_shapes(way: str) -> None:
    block = RevBlock(mlp, Attention, 1)
    compiled, lines = torch.compile(block, **WAYS[way]), written_out(block)
    for batch in (2, 5, 7):
        inputs = pair(batch)
        want = gradients(lines, block, *inputs)
        assert relative_error(gradients(compiled, block, *inputs), want) < TOLERANCE


def test_gradients_inside_of_the_compiled_function() -> None:
    block, inputs = RevBlock(lambda: nn.Sequential(mlp(), nn.Dropout(0.5)), mlp, 2), pair(8)

    def step(a: Tensor, b: Tensor) -> list[Tensor]:
        return gradients(block, block, a, b)

    torch.manual_seed(3)
    want = gradients(written_out(block), block, *inputs)
    torch.manual_seed(3)
    assert relative_error(torch.compile(step, **REVFX)(*inputs), want) < TOLERANCE


@others
@pytest.mark.parametrize("around", ["checkpoint", "save_on_cpu"])
def test_hooks_on_saved_tensors_around_the_first_call(around: str, way: str) -> None:
    block, inputs = RevBlock(mlp, mlp, 2), pair(8)
    compiled = torch.compile(block, **WAYS[way])

    def call(*inputs: Tensor) -> Pair:
        if around == "checkpoint":
            return checkpoint(compiled, *inputs, use_reentrant=False)
        with save_on_cpu():
            return compiled(*inputs)

    want = gradients(written_out(block), block, *inputs)
    assert relative_error(gradients(call, block, *inputs), want) < TOLERANCE
    assert relative_error(gradients(block, block, *inputs), want) < TOLERANCE  # hooks can still be set


def test_weights_and_buffers_that_are_written_to_behind_the_block_raise() -> None:
    fs = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()).eval() for _ in range(2))
    for written in (next(fs[0].parameters()), next(fs[0].buffers())):

        def call(a: Tensor, b: Tensor, written: Tensor = written) -> Pair:
            streams = rev_block(a, b, fs, fs, 2)
            with torch.no_grad():
                written.mul_(1.5)
            return streams

        with pytest.raises(Exception, match="modified by an inplace operation"):
            gradients(torch.compile(call, options=QUICK), fs, *pair(8))


@pytest.mark.parametrize("way", deep_but(("revfx",), ("revfx", "inductor")))
def test_streams_and_outputs_that_are_written_to_in_the_same_graph(way: str) -> None:
    block = RevBlock(lambda: nn.Sequential(nn.Tanh(), nn.Linear(4, 4)), mlp, 3)

    def around(of: Call) -> Call:
        def call(a: Tensor, b: Tensor) -> Pair:
            a, b = a * 1.0, b * 1.0
            y1, y2 = of(a, b)
            a.mul_(3.0)
            y2.mul_(1.01)
            return y1 + b, y2 + a

        return call

    inputs = pair(5)
    with reports() as found:
        got = gradients(torch.compile(around(block), **WAYS[way]), block, *inputs)
    assert relative_error(got, gradients(around(written_out(block)), block, *inputs)) < TOLERANCE
    assert found[0].regions


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


@others
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo, where a graph ends
@pytest.mark.filterwarnings("ignore::revfx.errors.RevfxWarning")
@pytest.mark.parametrize("inside", ["alone", "in a model"])
def test_functions_that_end_the_graph(inside: str, way: str) -> None:
    block = RevBlock(Branching, nn.Tanh, 3)
    plain, inputs = copy.deepcopy(block), pair(5)
    lines, call = written_out(plain), block
    how: dict[str, Any] = {**WAYS[way], "fullgraph": False}
    if inside == "in a model":
        call = torch.compile(lambda a, b: block(a.sin(), b), **how)
        want = gradients(lambda a, b: lines(a.sin(), b), plain, *inputs)
    else:
        call = torch.compile(block, **how)
        want = gradients(lines, plain, *inputs)
    assert relative_error(gradients(call, block, *inputs), want) < TOLERANCE
    for a, b in zip(block.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert [m.count for m in block.modules() if isinstance(m, Branching)] == [1, 1, 1]


def test_in_transforms_and_in_export_it_is_plain_code() -> None:
    block, inputs = RevBlock(mlp, mlp, 2), (torch.randn(3, 4), torch.randn(3, 4))
    exported = torch.export.export(block, inputs).module()(*inputs)
    assert relative_error(exported, written_out(block)(*inputs)) < TOLERANCE
    grad = torch.compile(torch.func.grad(lambda x: block(x, inputs[1])[0].sum()), fullgraph=True, backend="aot_eager")
    x = inputs[0].clone().requires_grad_()
    assert relative_error([grad(inputs[0])], torch.autograd.grad(block(x, inputs[1])[0].sum(), x)) < TOLERANCE


# --- memory
def peak_of(depth: int, training: bool) -> int:
    """The peak of one training step without the parameters' gradients: compiled, or of what keeps its activations."""
    make = lambda: nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 32))  # noqa: E731
    fs, gs = ([make() for _ in range(depth)] for _ in range(2))
    module = nn.ModuleList([*fs, *gs])
    x1, x2 = leaf(512, 32), leaf(512, 32)

    def call(x: Tensor, y: Tensor) -> Pair:
        return rev_block(x, y, fs, gs, depth, None, None, training)

    run = torch.compile(call, fullgraph=True, options=QUICK) if training else call

    def loss() -> Tensor:
        y1, y2 = run(x1, x2)
        return y1.sum() + (y2 * y2).sum()

    return measure_memory(loss).peak - sum(p.numel() * p.element_size() for p in module.parameters())


@pytest.mark.deep
def test_memory_does_not_grow_with_depth() -> None:
    growth = {training: peak_of(6, training) - peak_of(3, training) for training in (True, False)}
    assert growth[True] < 0.05 * growth[False], growth

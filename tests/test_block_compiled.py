"""`rev_block` and `RevBlock` under `torch.compile(fullgraph=True)`: gradients, memory, and what stays plain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import leaf, loss_of, mlp, mlps, relative_error
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.profiler import ProfilerActivity, profile

from revfx import RevBlock, rev_block
from revfx.block_compiled import CHECKPOINTED, PLAIN, SAVED, _level  # pyright: ignore[reportPrivateUsage]


Pair = tuple[Tensor, Tensor]
pytestmark = pytest.mark.filterwarnings(  # the compiler's own
    "ignore:.*should not be instantiated:DeprecationWarning", "ignore:.*torch.jit:DeprecationWarning"
)
WAYS = {"autograd_function_apply": SAVED, "tag_activation_checkpoint": CHECKPOINTED}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.compiler.reset()
    with inductor_config.patch({"cpp.simdlen": 1}):  # which compiles fast
        yield
    torch.set_default_dtype(before)
    torch.compiler.reset()


def by_hand(x1: Tensor, x2: Tensor, fs: Any, gs: Any, *sides: Any) -> Pair:
    """The couplings written out: the oracle."""
    f_side, g_side = ([s] for s in sides) if sides else ([], [])
    for f, g in zip(fs, gs, strict=True):
        x1 = x1 + f(x2, *f_side)
        x2 = x2 + g(x1, *g_side)
    return x1, x2


def gradients(function: Callable[..., Pair], inputs: Sequence[Tensor], module: nn.Module) -> list[Tensor | None]:
    """The gradients of the inputs and of the module's parameters; one that is all zeros stands as None."""
    tensors = [t for t in (*inputs, *module.parameters()) if t.requires_grad]
    grads = torch.autograd.grad(loss_of(function(*inputs)), tensors, allow_unused=True)
    found: list[Tensor | None] = list(grads)
    return [g if g is not None and g.any() else None for g in found]


def way_of(function: Callable[..., Any], inputs: Sequence[Tensor]) -> int:
    """How the layers of `function` are computed when it is compiled."""
    seen: list[str] = []

    def backend(gm: Any, example_inputs: list[Any]) -> Any:
        seen.extend(str(node.target) for node in gm.graph.nodes)
        return gm

    torch.compile(function, fullgraph=True, backend=backend)(*inputs)
    torch.compiler.reset()
    return next((level for name, level in WAYS.items() if any(name in s for s in seen)), PLAIN)


def assert_compiles(
    function: Callable[..., Pair],
    oracle: Callable[..., Pair],
    inputs: Sequence[Tensor],
    module: nn.Module,
    way: int = SAVED,
    backend: str = "aot_eager",
) -> None:
    assert way_of(function, inputs) == way
    expected = gradients(oracle, inputs, module)
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    assert relative_error(gradients(compiled, inputs, module), expected) < 1e-9
    assert relative_error(compiled(*inputs), oracle(*inputs)) < 1e-9


def assert_block_compiles(fs: Any, gs: Any, inputs: Sequence[Tensor] = (), way: int = SAVED) -> None:
    inputs = inputs or [leaf(3, 4), leaf(3, 4)]
    module = nn.ModuleList(m for m in dict.fromkeys((*fs, *gs)) if isinstance(m, nn.Module))
    assert_compiles(
        lambda x, y: rev_block(x, y, fs, gs, len(fs)), lambda x, y: by_hand(x, y, fs, gs), inputs, module, way
    )


# --- modules that a user might write
class Residual(nn.Module):
    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.drop = nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 4), nn.Dropout(p)
        self.scale, self.hidden = 0.5, [1.0]

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down(F.gelu(self.up(self.norm(x))))) * self.scale


class Attention(nn.Module):
    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.out, self.heads, self.p = nn.Linear(4, 12), nn.Linear(4, 4), 2, p

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(a.transpose(1, 2).reshape(b, t, c))


class Sided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, side: Any) -> Tensor:
        return torch.tanh(self.linear(x) + side[0] * side[1]["k"]) * side[2]


class Draws(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.up(x), 0.5, self.training)[..., :4]


class AttentionDrops(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, None, self.p if self.training else 0.0)


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.5))


def hooked() -> nn.Module:
    m = mlp()
    m[0].register_forward_hook(lambda *_: None)
    return m


def patched() -> nn.Module:
    m = nn.Linear(4, 4)
    m.forward = torch.rand_like
    return m


@pytest.mark.parametrize(
    ("make", "level"),
    [
        (mlp, SAVED),
        (lambda: torch.tanh, SAVED),
        (lambda: dropping().eval(), SAVED),
        (lambda: nn.BatchNorm1d(4).eval(), SAVED),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), CHECKPOINTED),
        (lambda: torch.relu, CHECKPOINTED),
        (lambda: nn.ELU(), CHECKPOINTED),
        (dropping, CHECKPOINTED),
        (lambda: nn.BatchNorm1d(4), CHECKPOINTED),
        (Residual, PLAIN),
        (Attention, PLAIN),
        (AttentionDrops, PLAIN),
        (lambda: nn.ReLU(inplace=True), PLAIN),
        (lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)), PLAIN),
        (lambda: lambda x: x, PLAIN),
        (lambda: torch.rand_like, PLAIN),
        (hooked, PLAIN),
        (patched, PLAIN),
        (lambda: nn.LSTM(4, 4), PLAIN),
    ],
)
def test_what_is_proven_about_a_function(make: Callable[[], Any], level: int) -> None:
    assert _level(make()) == level


# --- gradients
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.deep)])
def test_a_block_and_the_function_have_the_gradients_of_the_lines(backend: str) -> None:
    block = RevBlock(mlp, lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.GELU()), 2)
    inputs = [leaf(3, 4), leaf(3, 4)]
    assert_compiles(block, lambda x, y: by_hand(x, y, block.f, block.g), inputs, block, backend=backend)


def test_one_layer_shared_tied_and_frozen_modules() -> None:
    assert_block_compiles([mlp()], [mlp()])
    shared, frozen = mlp(), mlp().requires_grad_(False)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    assert_block_compiles([shared, shared, tied], [shared, torch.tanh, frozen])


@pytest.mark.parametrize("frozen", [True, False])
def test_streams_that_need_no_gradient(frozen: bool) -> None:
    m = nn.Sequential(*mlp()).requires_grad_(not frozen)
    inputs = [torch.randn(3, 4, requires_grad=frozen), torch.randn(3, 4)]
    assert_block_compiles([m, m], [m, m], inputs)


def test_one_tensor_as_both_streams_and_two_calls_in_a_graph() -> None:
    fs, gs = mlps(2), mlps(2)
    assert_compiles(
        lambda x: rev_block(*rev_block(x, x, fs, gs, 2), gs, fs, 2),
        lambda x: by_hand(*by_hand(x, x, fs, gs), gs, fs),
        [leaf(3, 4)],
        nn.ModuleList([*fs, *gs]),
    )


def test_side_inputs_nested_shared_repeated_and_not_tensors() -> None:
    fs = nn.ModuleList(Sided() for _ in range(2))

    def run(call: Callable[..., Pair]) -> Callable[..., Pair]:
        return lambda x, y, p, q: call(x, y, [p, {"k": q.sin()}, 2.0], (x, {"k": p, "unused": "text"}, 0.5))

    assert_compiles(
        run(lambda x, y, s, t: rev_block(x, y, fs, fs, 2, s, t)),
        run(lambda x, y, s, t: by_hand(x, y, fs, fs, s, t)),
        [leaf(3, 4), leaf(3, 4), leaf(3, 4), leaf(4)],
        fs,
        PLAIN,
    )


def test_side_input_of_the_saved_way() -> None:
    fs = nn.ModuleList(nn.Bilinear(4, 4, 4) for _ in range(2))
    assert_compiles(
        lambda x, y, s: rev_block(x, y, fs, fs, 2, s.sin(), s),
        lambda x, y, s: by_hand(x, y, fs, fs, s.sin(), s),
        [leaf(3, 4), leaf(3, 4), leaf(3, 4)],
        fs,
    )


def test_a_closure_over_a_tensor_gets_its_gradient_from_plain_code() -> None:
    gs = mlps(2)
    assert_compiles(
        lambda x, y, w: rev_block(x, y, lambda z: torch.tanh(z @ w), gs, 2),
        lambda x, y, w: by_hand(x, y, [lambda z: torch.tanh(z @ w)] * 2, gs),
        [leaf(3, 4), leaf(3, 4), leaf(4, 4)],
        gs,
        PLAIN,
    )


def test_exact_zeros_in_a_given_stream_keep_their_side_of_a_relu() -> None:
    fs = [nn.Sequential(nn.ReLU(), nn.Linear(4, 4), nn.ReLU()) for _ in range(6)]
    zeros = leaf(16, 4).detach().relu().requires_grad_()
    assert_block_compiles(fs, fs, [zeros, zeros], CHECKPOINTED)


@pytest.mark.parametrize("make", [mlp, Attention])
def test_several_batch_sizes_share_dynamic_shapes(make: Callable[[], nn.Module]) -> None:
    block = RevBlock(make, mlp, 1)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for batch in (2, 5, 7):
        inputs = [leaf(batch, 3, 4), leaf(batch, 3, 4)]
        expected = gradients(lambda x, y: by_hand(x, y, block.f, block.g), inputs, block)
        assert relative_error(gradients(compiled, inputs, block), expected) < 1e-9


def test_autocast_is_the_same_in_the_recomputation() -> None:
    torch.set_default_dtype(torch.float32)
    block = RevBlock(lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4)), mlp, 2)
    inputs = [leaf(8, 4, dtype=torch.float32), leaf(8, 4, dtype=torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        assert way_of(block, inputs) == SAVED
        expected = gradients(lambda x, y: by_hand(x, y, block.f, block.g), inputs, block)
        got = gradients(torch.compile(block, fullgraph=True, backend="aot_eager"), inputs, block)
    assert relative_error(got, expected) < 1e-3


# --- random numbers and buffers
def test_dropout_is_drawn_again_alike() -> None:
    fs = nn.ModuleList([Residual(0.5), nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))])
    x, y, direction = leaf(8, 4), leaf(8, 4), torch.randn(8, 4)
    assert way_of(lambda x, y: rev_block(x, y, fs, fs, 2), [x, y]) == CHECKPOINTED
    compiled = torch.compile(lambda x, y: rev_block(x, y, fs, fs, 2), fullgraph=True)

    def loss(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return loss_of(compiled(x, y))

    (grad,) = torch.autograd.grad(loss(x), [x])
    above, below = (loss((x + step * direction).detach().requires_grad_()) for step in (1e-5, -1e-5))
    numeric = (above - below) / 2e-5
    torch.testing.assert_close(numeric.detach(), (grad * direction).sum(), rtol=1e-7, atol=0.0)


def test_batch_norm_is_updated_once() -> None:
    fs, copies = ([nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2)] for _ in range(2))
    for m, c in zip(fs, copies, strict=True):
        c.load_state_dict(m.state_dict())
    gs, inputs = mlps(2), [leaf(8, 4), leaf(8, 4)]
    assert way_of(lambda x, y: rev_block(x, y, [f.eval() for f in fs], gs, 2), inputs) == SAVED
    for m in fs:
        m.train()
    compiled = torch.compile(lambda x, y: rev_block(x, y, fs, gs, 2), fullgraph=True, backend="aot_eager")
    got = gradients(compiled, inputs, nn.ModuleList(fs))
    assert relative_error(got, gradients(lambda x, y: by_hand(x, y, copies, gs), inputs, nn.ModuleList(copies))) < 1e-9
    for m, c in zip(fs, copies, strict=True):
        assert all(torch.allclose(a, b) for a, b in zip(m.buffers(), c.buffers(), strict=True))


# --- guards and surroundings
def test_another_mode_compiles_anew_and_another_block_does_not() -> None:
    ways: list[int] = []

    def backend(gm: Any, example_inputs: list[Any]) -> Any:
        names = [str(node.target) for node in gm.graph.nodes]
        ways.append(next((level for name, level in WAYS.items() if any(name in s for s in names)), PLAIN))
        return gm

    blocks = [RevBlock(dropping, mlp, 1) for _ in range(10)]
    x = leaf(3, 4)
    for block in blocks:
        block.compile(fullgraph=True, backend=backend)
        block(x, x)
    for block in blocks:
        block.eval()(x, x)
    assert ways == [CHECKPOINTED, SAVED]


def test_without_gradients_in_transforms_and_in_export_it_is_plain_code() -> None:
    block, inputs = RevBlock(mlp, mlp, 2), [torch.randn(3, 4), torch.randn(3, 4)]
    expected = by_hand(*inputs, block.f, block.g)
    with torch.no_grad():
        assert way_of(block, inputs) == PLAIN
    exported = torch.export.export(block, tuple(inputs)).module()(*inputs)
    assert relative_error(exported, expected) < 1e-9
    grad = torch.compile(torch.func.grad(lambda x: block(x, inputs[1])[0].sum()), fullgraph=True, backend="aot_eager")
    x = inputs[0].clone().requires_grad_()
    assert relative_error([grad(inputs[0])], torch.autograd.grad(block(x, inputs[1])[0].sum(), x)) < 1e-9


# --- memory
def peak(step: Callable[[], None]) -> int:
    """The most bytes that a step has allocated at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    results: Any = run.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


def peak_of(depth: int, training: bool) -> int:
    """The peak of one compiled training step, without the parameters' gradients."""
    make = lambda: nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 32))  # noqa: E731
    fs, gs = ([make() for _ in range(depth)] for _ in range(2))
    module = nn.ModuleList([*fs, *gs])
    x1, x2 = leaf(512, 32), leaf(512, 32)
    compiled = torch.compile(lambda x, y: rev_block(x, y, fs, gs, depth, None, None, training), fullgraph=True)

    def step() -> None:
        y1, y2 = compiled(x1, x2)
        (y1.sum() + (y2 * y2).sum()).backward()

    step()
    step()
    return peak(step) - sum(p.numel() * p.element_size() for p in module.parameters())


def test_memory_does_not_grow_with_depth() -> None:
    growth = {training: peak_of(6, training) - peak_of(3, training) for training in (True, False)}
    assert growth[True] < 0.05 * growth[False], growth

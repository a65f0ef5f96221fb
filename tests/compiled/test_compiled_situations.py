"""The compiled path where people use it: breaks, dynamic sizes, parts of models, precision, modes, and the negative
table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled import INNERS, QUIET, ROWS, WIDTH, compiled, fresh as fresh
from helpers import TOLERANCE, deep_but, leaf, loss_of, mlp, mlps, relative_error
from test_found import Unclamped, UsedElsewhere
from test_refusals import ATOMS, NOTHING_FOUND, Chain, EndsInRelu, ReluInTheMiddle, ZeroImages
from torch import Tensor, nn
from zoo import Additive, D

import revfx
from revfx.compiled.partitioner import reports
from revfx.testing import measure_memory


pytestmark = QUIET
DEPTH = 3


class Chained(Additive):
    def __init__(self) -> None:
        super().__init__(DEPTH)


def gradients(call: Callable[..., Any], module: nn.Module, *inputs: Tensor) -> list[Tensor | None]:
    """The gradients of inputs and parameters that need one, from a fixed random state."""
    torch.manual_seed(1)
    wanted = [t for t in (*inputs, *module.parameters()) if t.requires_grad]
    y = call(*inputs)
    return list(torch.autograd.grad(loss_of(y), wanted, allow_unused=True))


def right(call: Callable[..., Any], module: nn.Module, *inputs: Tensor) -> bool:
    """Whether `call` has the gradients of `module`."""
    want = gradients(module, module, *inputs)
    return relative_error(gradients(call, module, *inputs), want) < TOLERANCE


def x_of(rows: int = ROWS) -> Tensor:
    return leaf(rows, 2 * D)


# --- what dynamo makes of a model
class Broken(nn.Module):
    """Two chains, and between them something that ends a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Chained(), Chained()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        print(end="")
        return self.second(x)


@pytest.mark.parametrize("inner", INNERS)
def test_a_graph_break_leaves_a_region_on_either_side(inner: str) -> None:
    model = Broken()
    with reports() as found:
        assert right(compiled(model, inner), model, x_of())
    assert [len(report.regions) for report in found] == [1, 1]


def test_sizes_that_change_need_one_graph() -> None:
    model = Chained()
    run = torch.compile(model, backend="revfx", options={"inner": "aot_eager"}, dynamic=True)
    with reports() as found:
        for rows in (5, 6, 9, 17):
            assert right(run, model, x_of(rows))
    assert [len(report.regions) for report in found] == [1]


@pytest.mark.deep
def test_sizes_that_change_under_inductor() -> None:
    model = Additive(2)
    run = torch.compile(model, backend="revfx", dynamic=True, options={"cpp.simdlen": 1})
    with reports() as found:
        for rows in (5, 9):
            assert right(run, model, x_of(rows))
    assert [len(report.regions) for report in found] == [1]


def test_a_block_and_a_loss_function_compile_by_themselves() -> None:
    model, x = Chained(), x_of()

    @torch.compile(backend="revfx", options={"inner": "aot_eager"}, fullgraph=True)
    def loss(x: Tensor) -> Tensor:
        return model(x).square().mean()

    with reports() as found:
        got = torch.autograd.grad(loss(x), [x, *model.parameters()])
    assert relative_error(got, torch.autograd.grad(model(x).square().mean(), [x, *model.parameters()])) < TOLERANCE
    assert [len(report.regions) for report in found] == [1]
    whole = nn.Sequential(mlp(2 * D), Chained())
    want = gradients(whole, whole, x)
    whole[1].compile(backend="revfx", options={"inner": "aot_eager"})
    with reports() as found:
        assert relative_error(gradients(whole, whole, x), want) < TOLERANCE
    assert [len(report.regions) for report in found] == [1]


@pytest.mark.deep
@pytest.mark.parametrize("mode", ["max-autotune-no-cudagraphs", "reduce-overhead"])
def test_modes_of_inductor(mode: str) -> None:
    model = Chained()
    with reports() as found:
        assert right(torch.compile(model, backend="revfx", mode=mode, fullgraph=True), model, x_of())
    assert [len(report.regions) for report in found] == [1]


@pytest.mark.parametrize("inner", INNERS)
def test_autocast_around_and_inside(inner: str) -> None:
    model, x = Chained().float(), x_of().detach().float().requires_grad_()

    def casting(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return run(x).float()

        return call

    exact = gradients(model, model, x)
    theirs = relative_error(gradients(casting(model), model, x), exact)
    with reports() as found:
        got = gradients(casting(compiled(model, inner)), model, x)
    assert relative_error(got, exact) < 2 * theirs
    assert [len(report.regions) for report in found] == [1]


# --- training loops
def test_accumulation_of_gradients() -> None:
    model = Chained()
    run = compiled(model, "aot_eager")
    batches = [x_of() for _ in range(3)]
    sums: list[list[Tensor | None]] = []
    for way in (model, run):
        model.zero_grad()
        for x in batches:
            loss_of(way(x)).backward()
        sums.append([p.grad for p in model.parameters()])
    assert relative_error(sums[1], sums[0]) < TOLERANCE


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_nothing_is_rewritten_where_nothing_is_differentiated(context: Callable[[], Any]) -> None:
    model, x = Chained(), x_of().detach()
    with reports() as found, context():
        assert torch.equal(compiled(model, "aot_eager")(x), model(x))
    assert found == []


@pytest.mark.parametrize("train", ["input", "parameters", "one parameter"])
def test_what_needs_a_gradient_may_vary(train: str) -> None:
    model, x = Chained(), x_of()
    x.requires_grad_(train == "input")
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(train == "parameters" or (train == "one parameter" and i == 3))
    assert right(compiled(model, "aot_eager"), model, x)


def test_backward_twice_and_eval() -> None:
    model, x = Chained(), x_of()
    y = compiled(model.eval(), "aot_eager")(x)
    first = torch.autograd.grad(loss_of(y), x, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(loss_of(y), x)[0])


def test_a_second_derivative_raises() -> None:
    x = x_of()
    (g,) = torch.autograd.grad(loss_of(compiled(Chained(), "aot_eager")(x)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        g.sum().backward()


@pytest.mark.parametrize("what", ["weight", "output", "input"])
def test_writes_between_forward_and_backward_raise(what: str) -> None:
    model, leaf_ = Chained(), x_of()
    x = leaf_ * 1
    y = compiled(model, "aot_eager")(x)
    with torch.no_grad():
        written = {"weight": next(model.f[1].parameters()), "output": y, "input": x}[what]
        written.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(y.sin()).backward()


# --- signatures
class Signature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.chain = Chained()

    def forward(self, x: Tensor, *, n: Tensor, scale: float = 1.0) -> Any:
        y = self.chain(x[n] * scale)
        return {"y": y, "first": y[:, :1], "n": n}


def test_keywords_dictionaries_and_integers() -> None:
    model, x, n = Signature(), x_of(), torch.arange(ROWS).flip(0)
    got = compiled(model, "aot_eager")(x, n=n, scale=0.5)
    want = model(x, n=n, scale=0.5)
    assert got.keys() == want.keys() and torch.equal(got["n"], n)
    grads = [torch.autograd.grad(loss_of([o["y"], o["first"]]), [x, *model.parameters()]) for o in (got, want)]
    assert relative_error(*grads) < TOLERANCE


@pytest.mark.parametrize("inner", INNERS)
def test_closures_one_tensor_twice_and_views_of_one(inner: str) -> None:
    outside, f, g = leaf(ROWS, WIDTH), mlps(DEPTH, WIDTH), mlps(DEPTH, WIDTH)

    def chain(a: Tensor, b: Tensor) -> Tensor:
        for k, h in zip(f, g, strict=True):
            a = a + k(b) * outside
            b = b + h(a)
        return torch.cat([a, b], -1)

    run = torch.compile(chain, backend="revfx", options={"inner": inner})
    x = leaf(ROWS, 2 * WIDTH)
    a, b = x.chunk(2, -1)
    wanted = [x, outside, *f.parameters(), *g.parameters()]
    for args in ((a, a), (a, b)):
        with reports() as found:
            got = torch.autograd.grad(loss_of(run(*args)), wanted, retain_graph=True)
        want = torch.autograd.grad(loss_of(chain(*args)), wanted, retain_graph=True)
        assert relative_error(got, want) < TOLERANCE
        assert sum(len(report.regions) for report in found) == 1


def test_inner_values_that_are_returned() -> None:
    model, x = UsedElsewhere(DEPTH), leaf(ROWS, 2 * D)

    def flat(run: Callable[..., Any]) -> Callable[[Tensor], tuple[Tensor, ...]]:
        def call(x: Tensor) -> tuple[Tensor, ...]:
            y, penalty, inner = run(x)
            return (y, penalty, *inner)

        return call

    with reports() as found:
        got = gradients(flat(compiled(model, "aot_eager")), model, x)
    assert relative_error(got, gradients(flat(model), model, x)) < TOLERANCE
    assert [len(report.regions) for report in found] == [1]


# --- rev_block inside
class OfTheUser(nn.Module):
    """A class that nobody knows, with dropout and batch norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.last(self.norm(self.first(x)).tanh()), 0.2, self.training)


class Blocked(nn.Module):
    def __init__(self, depth: int, make: Callable[[int], nn.Module], width: int = WIDTH) -> None:
        super().__init__()
        fs, gs = (nn.ModuleList(make(width) for _ in range(depth)) for _ in "fg")
        self.block = revfx.RevBlock(fs, gs, depth)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.block(*x.chunk(2, -1)), -1)


@pytest.mark.deep
@pytest.mark.parametrize("make", [mlp, OfTheUser])
def test_rev_block_is_flat_in_a_compiled_model(make: Callable[[int], nn.Module]) -> None:
    model, x = Blocked(DEPTH, make), leaf(ROWS, 2 * WIDTH)
    twin = copy.deepcopy(model)
    assert relative_error(gradients(compiled(model, "aot_eager"), model, x), gradients(twin, twin, x)) < TOLERANCE
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    x, peaks = leaf(1024, 32), dict[tuple[str, int], int]()
    for depth in (3, 6):
        for way in ("plain", "revfx"):
            torch.compiler.reset()
            model = Blocked(depth, make, 16)
            with revfx.testing.store_activations() if way == "plain" else reports():
                run = model if way == "plain" else compiled(model, "aot_eager")
                run(x).square().mean().backward()
                model.zero_grad()
                theirs = sum(p.nbytes for p in model.parameters())
                peaks[way, depth] = measure_memory(lambda run=run: run(x).square().mean()).peak - theirs
    assert peaks["revfx", 6] - peaks["revfx", 3] < 0.03 * (peaks["plain", 6] - peaks["plain", 3])


# --- what can't be inverted, or not safely
@pytest.mark.parametrize(
    ("step", "streams"),
    deep_but([(step, streams) for step, streams, *_ in NOTHING_FOUND[::2]], [case[:2] for case in NOTHING_FOUND]),
    ids=lambda v: getattr(v, "__name__", None),
)
def test_what_has_no_inverse_is_left_alone_and_said(step: Callable[..., object], streams: int) -> None:
    model, x = Chain(step, streams), leaf(ROWS, 2 * D)
    with reports() as found:
        assert right(compiled(model, "aot_eager", exact=False), model, x)
    assert [report.regions for report in found] == [()]
    assert found[0].refusals


@pytest.mark.deep
def test_what_has_no_inverse_under_inductor() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.models = nn.ModuleList(Chain(step, streams) for step, streams, *_ in NOTHING_FOUND[:3])

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(m(x) for m in self.models)

    model = Several()
    assert right(compiled(model, "inductor"), model, leaf(ROWS, 2 * D))


def two_layers() -> nn.Module:
    return ZeroImages(2)


KEPT = (ReluInTheMiddle, EndsInRelu)  # streams of which every cut holds zeros, seen by the relu behind it


@pytest.mark.parametrize("make", deep_but(ATOMS[:5], ATOMS))
def test_exact_zeros_are_never_given_back_by_a_rounding_inverse(make: Callable[[], nn.Module]) -> None:
    x = torch.relu(torch.randn(64, 2 * D)).requires_grad_()
    model = make()
    with reports() as found:
        assert right(compiled(model, "aot_eager"), model, x)
    assert found[0].regions or make in KEPT, "still found, where it is worth what is kept"


@pytest.mark.deep
@pytest.mark.parametrize("make", [two_layers, *ATOMS[:4]])
def test_exact_zeros_under_inductor(make: Callable[[], nn.Module]) -> None:
    x = torch.relu(torch.randn(64, 2 * D)).requires_grad_()
    model = make()
    with reports() as found:
        assert right(compiled(model, "inductor"), model, x)
    assert found[0].regions or make in KEPT, "still found, where it is worth what is kept"


@pytest.mark.parametrize(
    ("inner", "dtype"),
    [
        ("aot_eager", torch.float32),
        ("aot_eager", torch.float64),
        *deep_but((), [("inductor", torch.float32), ("inductor", torch.float64)]),
    ],
)
def test_inputs_of_an_exp_that_underflows_are_kept(inner: str, dtype: torch.dtype) -> None:
    model = Unclamped(DEPTH).to(dtype)
    model.scale = 4000.0
    x = torch.randn(8, 2 * D, dtype=dtype, requires_grad=True)
    got = gradients(compiled(model, inner, exact=False), model, x)
    assert relative_error(got, gradients(model, model, x)) < (1e-9 if dtype == torch.float64 else 1e-3)

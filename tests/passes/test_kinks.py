"""What operations tell apart that rounding does not keep: streams that hold numbers of the input, and sums of such."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled import check, fresh as fresh
from helpers import TOLERANCE, deep_but, leaf, relative_error
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from zoo import D, Pairs

import revfx
from revfx.passes.atoms import atoms
from revfx.passes.facts import GENERIC
from revfx.passes.kinks import KNOWN, OF_NORMS, OF_SUMS, told_apart
from revfx.passes.moved import directions_of, moved
from revfx.passes.names import bare
from revfx.passes.numbers import made_numbers, repeated_numbers
from revfx.rules import op_name, registered
from revfx.testing import assert_same_grads


pytestmark = pytest.mark.filterwarnings("ignore::revfx.errors.RevfxWarning")
ODD = -0.4242128  # a number that gives nothing away by its digits
Way = Callable[[nn.Module], nn.Module]
Sum = Callable[[Tensor, Tensor, Tensor], Tensor]  # of a stream, of what a linear layer gives, and a parameter
Use = Callable[[Tensor], Tensor]
Mix = Callable[[Tensor, Tensor], Tensor]


def by_backend(model: nn.Module, **options: Any) -> nn.Module:
    compiled = copy.deepcopy(model)
    compiled.compile(backend="revfx", options={"inner": "aot_eager", **options})
    return compiled


# --- the analysis
def normed(a: Tensor, eps: float) -> Tensor:
    """As inductor spells `layer_norm`."""
    variance, mean = torch.var_mean(a, -1, correction=0, keepdim=True)
    return (a - mean) * torch.rsqrt(variance + eps)


SUMS: dict[str, tuple[Sum, bool]] = {  # under relu: whether that may be nearer to zero than rounding
    "data": (lambda x, h, w: x + h, False),
    "dropped": (lambda x, h, w: x + F.dropout(h, 0.5), False),
    "relu": (lambda x, h, w: x + torch.relu(h), False),
    "masked": (lambda x, h, w: x + h * (x > 0), False),
    "relu, dropped": (lambda x, h, w: x + F.dropout(torch.relu(h), 0.5), False),
    "chosen": (lambda x, h, w: x + torch.where(x > 0, h, 0.0), False),
    "rounded": (lambda x, h, w: x + (h * 3.3).round() / 3.3, True),
    "rounded, and mixed": (lambda x, h, w: x + (h * 3.3).round() @ w, False),
    "rounded, and mixed with data": (lambda x, h, w: x + (h * 3.3).round() @ x, True),
    "rounded, and mixed by signs": (lambda x, h, w: x + (h * 3.3).round() @ w.sign(), True),
    "rounded, to a stem": (lambda x, h, w: (x @ w) + (h * 3.3).round(), False),
    "normed, to a stem": (lambda x, h, w: (x @ w) + normed(h, 1e-5), False),
    "rounded and normed, to a stem": (lambda x, h, w: (x @ w) + normed((h * 3.3).round(), 1e-5), True),
    "rounded, to rows of a table": (lambda x, h, w: w[x.int()[0]] + (h * 3.3).round(), False),
    "straight through": (lambda x, h, w: x + (h + (h.round() - h).detach()), True),
    "whole numbers": (lambda x, h, w: x + h.int() / 3.3, True),
    "divided": (lambda x, h, w: x + torch.div(h, 0.3, rounding_mode="floor"), True),
    "signs times data": (lambda x, h, w: x + h.sign() * h, False),
    "signs times signs": (lambda x, h, w: x + h.sign() * x.sign(), True),
    "what is added to such a sum": (lambda x, h, w: x + h.round() / 3.3 + F.dropout(h, 0.5), True),
    "less a number": (lambda x, h, w: x + F.dropout(h, 0.5) - 1, True),
}
USES: dict[str, tuple[Use, bool]] = {  # of x + dropout(h): whether it tells the numbers of x from others
    "relu": (torch.relu, False),
    "abs": (torch.abs, False),
    "positive": (lambda a: a * (a > 0), False),
    "clamped at zero": (lambda a: a.clamp(min=0), False),
    "exp": (torch.exp, False),
    "softmax": (lambda a: a.softmax(-1), False),
    "norm, then a bend": (lambda a: F.relu(F.layer_norm(a, (4,))), True),
    "norms of groups": (lambda a: F.relu(F.group_norm(a, 2)), True),
    "norm of a batch": (lambda a: F.relu(F.batch_norm(a, None, None, training=True)), True),
    "norm of a batch, evaluated": (lambda a: F.relu(F.batch_norm(a, a[0], a[1].exp())), True),
    "mixed, then a bend": (lambda a: F.hardtanh(a @ a), True),
    "mixed by ones": (lambda a: F.relu(a @ torch.ones(4, 4)), True),
    "attended to": (lambda a: F.relu(F.scaled_dot_product_attention(a[None], a[None], a[None]) - 1), True),
    "differences": (lambda a: a.diff(dim=-1), False),
    "relu of differences": (lambda a: torch.relu(a.diff(dim=-1)), True),
    "other elements": (lambda a: torch.relu(a.view(2, 8).flip(0).reshape(4, 4)), False),
    "distances": (lambda a: torch.cdist(a, a), True),
    "deviations": (lambda a: a.std(-1), True),
    "hardtanh": (F.hardtanh, True),
    "relu6": (F.relu6, True),
    "hardswish": (F.hardswish, True),
    "floor": (torch.floor, True),
    "whole numbers": (lambda a: a.int() * a, True),
    "clamped": (lambda a: a.clamp(0, 2), True),
    "compared": (lambda a: a * (a >= 1), True),
    "relu elsewhere": (lambda a: torch.relu(a - 1), True),
    "scaled, then relu elsewhere": (lambda a: torch.relu(torch.exp(a * 2) - 1), True),
    "elsewhere by a parameter": (lambda a: torch.relu(a + torch.ones(4)), True),
    "other elements, then a bend": (lambda a: F.hardtanh(a.view(2, 8).flip(0)), True),
    "largest": (lambda a: a.max(0).values, True),
    "maximum": (lambda a: torch.maximum(a, a.flip(0)), True),
    "sums": (lambda a: torch.relu(a.sum(-1)), True),
    "norm, spelled out": (lambda a: normed(a, 1e-5), False),
    "norm, spelled out, then a bend": (lambda a: torch.relu(normed(a, 1e-5)), True),
    "norm, spelled out, without an epsilon to speak of": (lambda a: normed(a, 1e-20), True),
    "root mean square": (lambda a: a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + 1e-6), False),
}


MIXES: dict[str, tuple[Mix, bool, bool]] = {  # the same, by a parameter w; and but for groups that hold one number
    "norm": (lambda a, w: F.relu(F.layer_norm(a, (4,), w[0], w[1])), True, False),
    "norm of a batch": (lambda a, w: F.relu(F.batch_norm(a, None, None, w[0], w[1], training=True)), True, False),
    "mixed": (lambda a, w: F.hardtanh(a @ w), False, False),
    "mixed, and scaled": (lambda a, w: F.hardtanh(a * (a @ w)), False, False),
    "mixed and added": (lambda a, w: F.hardtanh(F.linear(a, w, w[0])), False, False),
    "convolved": (lambda a, w: F.relu(F.conv1d(a, w[:, :, None], w[0])), False, False),
    "mixed by its signs": (lambda a, w: F.relu(a @ w.sign()), True, True),
    "mixed by its signs, and added": (lambda a, w: F.relu(F.linear(a, w.sign(), w[0])), True, True),
    "mixed by its signs, less a number": (lambda a, w: F.relu6(a @ w.sign() - 1), True, True),
    "norm, mixed": (lambda a, w: F.relu(F.linear(F.layer_norm(a, (4,), w[0], w[1]), w)), True, False),
    "differences, mixed": (lambda a, w: F.relu(a.diff(dim=0) @ w), True, True),
    "mixed, norm": (lambda a, w: F.relu(F.layer_norm(a @ w, (4,))), False, False),
}


def traced(function: Callable[..., Any]) -> tuple[fx.Graph, fx.Node]:
    """The graph of a function of x, of h without a pattern and of a parameter, and the node of its first result."""
    x, h, w = (torch.randn(4, 4) for _ in range(3))
    made = make_fx(lambda x, h, w: function(x, h @ w, w), tracing_mode="fake", _allow_non_fake_inputs=True)
    graph = made(x, h, w).graph
    graph.find_nodes(op="placeholder")[2].meta["facts"] = (GENERIC,)
    return graph, graph.output_node().all_input_nodes[0]


def told(function: Callable[..., Any], rows: int = OF_NORMS) -> bool:
    """Whether the first result of a function is told apart by what reads it."""
    graph, first = traced(function)
    return first in told_apart(graph, atoms(graph), moved(graph, directions_of), rows)


@pytest.mark.parametrize("name", SUMS)
def test_sums_that_may_be_near_to_zero(name: str) -> None:
    make, expected = SUMS[name]

    def function(x: Tensor, h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        a = make(x, h, w)
        return a, torch.relu(a)

    assert told(function) is expected


@pytest.mark.parametrize("name", USES)
def test_what_operations_tell_apart(name: str) -> None:
    use, expected = USES[name]

    def function(x: Tensor, h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        a = x + F.dropout(h, 0.5)
        return a, use(a)

    assert told(function) is expected


@pytest.mark.parametrize("name", MIXES)
def test_what_is_mixed_by_parameters(name: str) -> None:
    use, by_norms, by_sums = MIXES[name]

    def function(x: Tensor, h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        a = x + F.dropout(h, 0.5)
        return a, use(a, w)

    assert told(function) is by_norms
    assert told(function, OF_SUMS) is by_sums


def test_every_operation_with_a_rule_is_known() -> None:
    assert {bare(op_name(op)) for op in registered()} - KNOWN <= {
        "Flatten",
        "Unflatten",
    }  # looked into


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.01, 1.0, 6.0, 200.0])
def test_values_without_a_pattern_hold_few_numbers_of_data(scale: float, dtype: torch.dtype) -> None:
    for t in (torch.randn(1 << 18), torch.rand(1 << 18) + 0.2):
        found, chance = made_numbers((scale * t).to(dtype))
        assert found <= chance


def test_numbers_of_data_are_counted() -> None:
    numbers = torch.tensor([0.0, 1.0, -2.0, 0.1, 0.3, -0.7, 0.125, 7.5, 255.0, 8.1, 300.0, 0.33])
    found, _ = made_numbers(numbers)
    assert found == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_without_a_pattern_repeat_few_numbers(dtype: torch.dtype) -> None:
    for t in (torch.randn(1 << 18), torch.rand(1 << 18) + 0.2, torch.randn(1 << 18).tanh()):
        found, chance = repeated_numbers(t.to(dtype).view(64, 64, -1))
        assert found <= chance


REPEATED: dict[tuple[int, ...], int] = {(0,): 56, (1,): 2 * 6 * 8, (2,): 2 * 7 * 7, (1, 2): 2 * (6 * 8 + 7 * 7)}


@pytest.mark.parametrize("dims", REPEATED)
def test_repeated_numbers_are_counted(dims: tuple[int, ...]) -> None:
    t = torch.randn(6, 7, 8)
    t[:2] = t[:2].mean(dims, keepdim=True)
    t[4:] = 0
    found, chance = repeated_numbers(t)
    assert found == REPEATED[dims]
    assert found > chance


# --- whole models
class Used(Pairs):
    """Couplings of a stream to which dropout adds nothing in places, and which `use` looks at."""

    def __init__(self, use: Use) -> None:
        super().__init__(4)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + F.dropout(f(b), 0.5)
            b = b + g(self.use(a))
        return torch.cat([a, b], -1)


class Inside(nn.Module):
    def __init__(self, use: Use, g: nn.Module) -> None:
        super().__init__()
        self.use, self.g = use, g

    def forward(self, a: Tensor) -> Tensor:
        return self.g(self.use(a))


MODELS: dict[str, Use] = {
    name: USES[name][0]
    for name in ("relu", "hardtanh", "hardswish", "clamped", "compared", "relu elsewhere", "whole numbers", "floor")
}


class Blocks(nn.Module):
    """The same by `rev_block`, whose functions nothing is known of."""

    def __init__(self, model: Used) -> None:
        super().__init__()
        self.f = nn.ModuleList(nn.Sequential(f, nn.Dropout(0.5)) for f in model.f)
        self.g = nn.ModuleList(Inside(model.use, g) for g in model.g)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat(revfx.rev_block(a, b, self.f, self.g, 4), -1)


WAYS: dict[str, Way] = {"convert": revfx.convert, "convert, in a module": revfx.convert, "backend": by_backend}


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("name", deep_but([*MODELS][::2], MODELS))
def test_streams_of_whole_numbers(name: str, by: str) -> None:
    inside, way, use = "module" in by, WAYS[by], MODELS[name]
    model = Used((lambda a: a) if inside else use)
    if inside:
        model.g = nn.ModuleList(Inside(use, g) for g in model.g)
    x = torch.randint(1, 8, (32, 2 * D)).double()
    assert_same_grads(way(model), model, [x.requires_grad_()])


@pytest.mark.parametrize("name", MODELS)
def test_blocks_of_whole_numbers(name: str) -> None:
    model = Blocks(Used(MODELS[name]))
    x = torch.randint(1, 8, (32, 2 * D)).double() / 10
    x[::2] *= 10
    x[::3] = torch.randint(9, 255, (11, 2 * D)).double()
    x.requires_grad_()
    torch.manual_seed(1)
    out = model(x)
    got = torch.autograd.grad(out.sin().sum(), [x, *model.parameters()])
    with revfx.testing.store_activations():
        torch.manual_seed(1)
        expected = torch.autograd.grad(model(x).sin().sum(), [x, *model.parameters()])
    assert relative_error(got, expected) < TOLERANCE


class Clips(torch.autograd.Function):
    """The identity, whose own backward looks at the numbers."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.save_for_backward(args[0])
        return args[0].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        return grads[0] * (ctx.saved_tensors[0].abs() <= 3)


@pytest.mark.parametrize("by", WAYS)
def test_a_backward_that_looks_at_the_numbers(by: str) -> None:
    inside, use = "module" in by, lambda a: Clips.apply(a)
    model = Used((lambda a: a) if inside else use)
    if inside:
        model.g = nn.ModuleList(Inside(use, g) for g in model.g)
    x = torch.randint(1, 8, (32, 2 * D)).double()
    assert_same_grads(WAYS[by](model), model, [x.requires_grad_()])


class Padded(Pairs):
    """Functions that give zeros for zeros, of a stream that starts as zeros: at first the other one is left alone."""

    def __init__(self, use: Use = F.relu6) -> None:
        super().__init__(4)
        self.use = use
        self.f, self.g = (nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            b = b + g(self.use(a))
        return torch.cat([a, b], -1)


def test_streams_padded_with_zeros() -> None:
    model = Padded()
    x = torch.randint(1, 8, (32, 2 * D)).double()
    x[:, D:] = 0
    assert_same_grads(revfx.convert(model), model, [x.requires_grad_()])
    assert check(model, "aot_eager", leaf(32, 2 * D)).regions


@pytest.mark.parametrize("dynamic", [False, True])
def test_padded_streams_of_one_number(dynamic: bool) -> None:
    model = Padded(lambda a: F.relu(F.layer_norm(a, (D,))))
    x = torch.randn(32, 2 * D)
    x[:, D:] = 0
    x[::2, :D] = ODD
    assert_same_grads(revfx.convert(model), model, [x.requires_grad_()])
    compiled: Any = torch.compile(model, backend="revfx", options={"inner": "aot_eager"}, dynamic=dynamic)
    assert_same_grads(compiled, model, [leaf(32, 2 * D)])


class Blank(nn.Module):
    """Functions of a stream that starts as zeros leave the other one alone at first; `add` puts the two together."""

    def __init__(self, add: Callable[[Tensor, Tensor], Tensor], use: Use) -> None:
        super().__init__()
        self.f, self.g = (nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(3)) for _ in range(2))
        self.add, self.use = add, use

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = self.add(a, f(b))
            b = b + g(self.use(a))
        return torch.cat([a, b], -1)


ADDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "as it is": torch.add,
    "sigmoid less a number": lambda a, h: a + (2 * torch.sigmoid(h) - 1),
    "exp less a number": lambda a, h: a + (torch.exp(torch.tanh(h)) - 1),
}


@pytest.mark.parametrize("name", ADDS)
@pytest.mark.parametrize("scale", [1.0, 1 / 255], ids=["whole", "pixels"])
def test_numbers_that_a_first_step_leaves(name: str, scale: float) -> None:
    x = torch.randint(1, 255, (32, 2 * D)) * scale
    x[:, D:] = 0
    model = Blank(ADDS[name], lambda a: a * ((a >= 17 * scale).double() + (a >= 100 * scale) + (a >= 150 * scale)))
    assert_same_grads(revfx.convert(model), model, [x.requires_grad_()])


def test_a_stream_that_starts_as_zeros_is_not_taken_for_data() -> None:
    model = Blank(torch.add, F.relu6)
    x = torch.randn(32, 2 * D)
    x[:, :D] = 0
    assert check(model, "aot_eager", x.requires_grad_()).regions


class PutTogether(Pairs):
    def forward(self, x: Tensor) -> Tensor:
        for f, g in zip(self.f, self.g, strict=True):
            a, b = x.chunk(2, -1)
            a = a + f(F.relu6(b))
            b = b + g(F.relu6(a))
            x = torch.cat([b, a], -1).flip(-1)
        return x


@pytest.mark.parametrize("couplings", ["apart", "together"])
def test_a_stream_that_is_changed_everywhere_is_inverted_whatever_it_was(couplings: str) -> None:
    """The first cut is kept, since nobody knows what its step left of the input; those after it are not."""
    kept: list[int] = []
    for depth in (4, 8):
        converted: Any = revfx.convert((WithoutDropout if couplings == "apart" else PutTogether)(depth))
        converted(torch.rand(32, 2 * D))
        kept.append(converted.revfx.kept_cuts)
    assert kept[0] == kept[1] <= 4


class WithoutDropout(Pairs):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(F.relu6(b))
            b = b + g(F.relu6(a))
        return torch.cat([a, b], -1)


class StartsAsZeros(Pairs):
    """Functions of normalised streams, whose last layers start as zeros."""

    def __init__(self) -> None:
        super().__init__(4)
        for name, p in self.named_parameters():
            if ".2." in name:
                nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(F.relu(F.layer_norm(b, (D,))))
            b = b + g(F.relu(F.layer_norm(a, (D,))))
        return torch.cat([a, b], -1)


def test_numbers_that_come_back_exactly_are_no_reason_to_raise() -> None:
    x = torch.randn(32, 2 * D)
    x[::2] = ODD
    model = StartsAsZeros()
    compiled = by_backend(model)
    for _ in range(2):
        assert_same_grads(compiled, model, [x.requires_grad_()])
        with torch.no_grad():
            for p, q in zip(model.parameters(), compiled.parameters(), strict=True):
                q.copy_(p.add_(0.1 * torch.randn_like(p)))


class Tokens(Pairs):
    """Streams of table rows and positions, as those of language models, with dropout."""

    def __init__(self) -> None:
        super().__init__(4)
        self.table, self.places = nn.Embedding(11, 2 * D), nn.Parameter(torch.randn(5, 2 * D))
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(8))

    def forward(self, ids: Tensor) -> Tensor:
        a, b = (self.table(ids) * D**0.5 + self.places).chunk(2, -1)
        for i, (f, g) in enumerate(zip(self.f, self.g, strict=True)):
            a = a + F.dropout(f(F.relu6(self.norms[2 * i](b))), 0.1)
            b = b + F.dropout(g(F.relu6(self.norms[2 * i + 1](a))), 0.1)
        return torch.cat([a, b], -1)


def test_a_language_models_streams_are_inverted() -> None:
    report = check(Tokens(), "aot_eager", torch.randint(0, 11, (3, 5)))
    assert report.regions
    converted: Any = revfx.convert(Tokens())
    converted(torch.randint(0, 11, (3, 5)))
    assert converted.revfx.kept_cuts == 2

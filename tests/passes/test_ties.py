"""Values that equal each other where nothing was added in between are told apart by what compares them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import deep_but
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import revfx
from revfx.passes.atoms import atoms
from revfx.testing import assert_same_grads


N, D = 8, 6
Compared = Callable[[Tensor, Tensor], Tensor]

# Of a stream and of what it was before zeros were added to it in places.
COMPARED: dict[str, Compared] = {
    "the difference": lambda a, b: F.relu(a - b),
    "the larger one": torch.maximum,
    "whether larger": lambda a, b: (a > b).to(a.dtype) * a,
    "the smallest of several": lambda a, b: torch.stack([a, b]).amin(0),
    "the larger half": lambda a, b: torch.maximum(*torch.cat([a, b], -1).chunk(2, -1)),
    "the order": lambda a, b: torch.cat([a, b], -1).argsort(-1)[..., :D] * a,
    "the distance": lambda a, b: F.l1_loss(a, b, reduction="none"),
    "distances": lambda a, b: torch.cdist(a, b).diagonal()[:, None] + a * 0,
    "a limit": lambda a, b: a.clamp(min=b),
    "the ratio": lambda a, b: F.relu(a / b - 1),
    "logarithms": lambda a, b: F.relu(a.abs().log() - b.abs().log()),
    "squares": lambda a, b: F.relu(a * a - b * b),
    "norms": lambda a, b: F.relu(F.layer_norm(a, (D,)) - F.layer_norm(b, (D,))),
    "sums of rows": lambda a, b: F.relu(a.sum(-1, keepdim=True) - b.sum(-1, keepdim=True)) + a * 0,
    "what is put together": lambda a, b: F.relu(torch.stack([a, -b]).sum(0)),
    "what follows": lambda a, b: F.relu(torch.stack([b, a]).diff(dim=0)[0]),
    "a product with signs": lambda a, b: F.relu(torch.stack([a, b], -1) @ a.new_tensor([1.0, -1.0])),
    "a factor of both": lambda a, b: torch.maximum(a.exp() * a, b * b.exp()),
    "the difference, scaled": lambda a, b: F.relu((a - b) * a),
    "the ratio, scaled": lambda a, b: F.relu((a / b - 1) * b.exp()),
    "each with all": lambda a, b: (a[:, None] - b[None]).abs().amin(1),
    "a norm of both": lambda a, b: F.layer_norm(torch.stack([a, b]), (D,)).amax(0),
    "parts": lambda a, b: torch.maximum(a.view(N, 2, 3).mT, b.view(N, 2, 3).transpose(1, 2)).reshape(N, D),
    "a product taken off": lambda a, b: F.relu(torch.addcmul(a, b, torch.ones(1).to(a), value=-1)),
}
COMPILED = ("the larger one", "whether larger", "the order", "distances", "the ratio", "norms", "sums of rows")
LAYERS: dict[str, Callable[[Compares, Tensor], Tensor]] = {
    "a layer": lambda m, a: m.layers[9](a),
    "noise": lambda m, a: a + torch.randn_like(a),
}


class Compares(nn.Module):
    """A stream of generic numbers, to which rows of zeros, and zeros between, are added."""

    def __init__(self, compared: str, layer: str) -> None:
        super().__init__()
        layers = [nn.Linear(D, D) for _ in range(10)]
        nn.init.constant_(layers[1].bias, -1.5)
        self.layers, self.compared, self.layer = nn.ModuleList(layers), COMPARED[compared], LAYERS[layer]

    def forward(self, x: Tensor) -> Tensor:
        b, a = x.chunk(2, -1)
        a = a + torch.tanh(self.layers[0](b))
        b = b + torch.tanh(self.layers[2](a))
        a = before = self.layer(self, a)
        b = b + torch.tanh(self.layers[7](a))
        a = a + F.relu(self.layers[1](b)) * (torch.arange(N) % 2).view(N, 1)
        b = b + torch.tanh(self.layers[8](a))
        b = b + self.layers[3](self.compared(a, before.detach()))
        for layer in self.layers[4:7]:
            a = a + torch.tanh(layer(b))
            b = b + torch.tanh(layer(a))
        return torch.cat([a, b], -1)


def check(ours: nn.Module, model: nn.Module) -> None:
    assert_same_grads(ours, model, [torch.randn(N, 2 * D, requires_grad=True)])


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("compared", COMPARED)
def test_what_compares_a_stream_with_what_it_was(compared: str) -> None:
    model = Compares(compared, "a layer")
    check(revfx.convert(copy.deepcopy(model)), model)


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("layer", deep_but(("a layer",), LAYERS))
@pytest.mark.parametrize("compared", deep_but(COMPILED, COMPARED))
def test_compiled_graphs_that_compare(compared: str, layer: str) -> None:
    model = Compares(compared, layer)
    compiled = copy.deepcopy(model)
    torch.compiler.reset()
    compiled.compile(backend="revfx", options={"inner": "aot_eager", "unbounded": "store"})
    check(compiled, model)


# --- the numbering
# Of a, and of z that may be zero: two values; whether they equal each other in places.
PAIRS: dict[str, tuple[Callable[[Tensor, Tensor], tuple[Tensor, ...]], bool]] = {
    "what zeros were added to": (lambda a, z: (a + z, a), True),
    "in the other order": (lambda a, z: (z + a, a), True),
    "less zeros": (lambda a, z: (a - z, a), True),
    "twice": (lambda a, z: (a + z + z.flip(0), a), True),
    "a product that may be zero": (lambda a, z: (torch.addcmul(a, z, z), a), True),
    "a multiple": (lambda a, z: (2 * (a + z), a), True),
    "a factor that may be one": (lambda a, z: (a * (1 + z), a), True),
    "a factor that is not one": (lambda a, z: (a * a.exp(), a), False),
    "what is chosen": (lambda a, z: (torch.where(z > 0, a.exp(), a), a), True),
    "halves": (lambda a, z: ((a + a) / 2, a), True),
    "a factor of other numbers": (lambda a, z: (a * z.exp(), a), True),
    "a part that is left": (lambda a, z: (torch.cat([a[:, :2] + a[:, 2:].sin(), a[:, 2:]], -1), a), True),
    "put together, and taken apart": (lambda a, z: (torch.cat([z, a + z]).chunk(2)[1], a), True),
    "put together, and the other taken": (lambda a, z: (torch.cat([a.exp(), a + z]).chunk(2)[0], a), False),
    "no part of it": (lambda a, z: (torch.cat([a[:, :2].sin(), a.sin()[:, 2:]], -1), a), False),
    "what is written into": (lambda a, z: (torch.slice_scatter(a, a[:, :1].sin(), 1, 0, 1), a), True),
    "somewhere between": (lambda a, z: (torch.lerp(a, a.sin(), z), a), True),
    "half way": (lambda a, z: (torch.lerp(a, a.sin(), 0.5), a), False),
    "numbers of zero": (lambda a, z: (a + 0 * a.exp(), a), True),
    "rows of zeros, mixed": (lambda a, z: (a + (z @ a).tanh(), a), True),
    "moved, and moved back": (lambda a, z: ((a.t() + z).t(), a), True),
    "other words for a part": (lambda a, z: ((a + z).chunk(2)[0], a[:2]), True),
    "each with all": (lambda a, z: ((a + z)[:, None], a[None]), True),
    "in other orders": (lambda a, z: ((a + z) * a.exp(), a.exp() * a), True),
    "the difference of parts": (lambda a, z: (F.relu(a[1:] - a[:-1]), z[1:]), False),
    "times a factor": (lambda a, z: ((a + z) * a.exp(), a * a.exp()), True),
    "a multiple of itself": (lambda a, z: (a, 0.1 * a), False),
    "what is filled": (lambda a, z: (a.masked_fill(z > 0, 1.0), a), True),
    "functions": (lambda a, z: (torch.exp(a + z), torch.exp(a)), True),
    "other functions": (lambda a, z: (torch.exp(a + z), torch.sin(a)), False),
    "what is no zero": (lambda a, z: (a + torch.addmm(a, z, z.t()), a), False),
    "with what else is added": (lambda a, z: (a + z + a.exp(), a), False),
    "one function of both": (lambda a, z: (torch.cat([a + z, a]) @ a.exp()).chunk(2), True),
    "a function that mixes both": (lambda a, z: (torch.cat([a + z, a], 1) @ torch.cat([a, a.exp()])).chunk(2), False),
    "more and less of what may be zero": (lambda a, z: (a.add(z, alpha=2), a.add(z, alpha=3)), True),
    "along the same dimension": (lambda a, z: ((a + z).sum(-1), a.sum(1)), True),
    "along another one": (lambda a, z: (a.sum(0), a.sum(1)), False),
    "squares": (lambda a, z: ((a + z).square(), a * a), True),
    "positive parts": (lambda a, z: (F.relu(a + z), a.clamp(min=0)), True),
    "largest elements": (lambda a, z: ((a + z).amax(1), a.max(-1).values), True),
    "other words for a shape": (lambda a, z: ((a + z).reshape(-1), a.flatten()), True),
    "put together in another shape": (lambda a, z: torch.stack([(a + z).flatten(), a.view(-1)]).exp().unbind(), True),
    "sums and means": (lambda a, z: ((a + z).sum(-1) / 4, a.mean(-1)), True),
    "other parts of both": (lambda a, z: ((a + z)[:, 0].exp(), a[:, 1].exp()), False),
    "both with it": (lambda a, z: (a + z + a.exp(), a + a.exp()), True),
}


def test_sums_with_a_factor_are_not_the_same_in_another_order() -> None:
    def function(x: Tensor) -> Tensor:
        a, b = torch.addmm(x[0], x, x.t()), torch.addmm(x[1], x, x.t())
        return torch.add(a, b, alpha=2) * (torch.add(b, a, alpha=2) - 2 * a)

    graph = make_fx(function, tracing_mode="fake")(torch.randn(4, 4)).graph
    atoms(graph)
    (last,) = graph.find_nodes(op="call_function", target=torch.ops.aten.sub.Tensor)
    assert last.meta["cancels"]


@pytest.mark.parametrize("name", PAIRS)
def test_values_that_equal_each_other_in_places(name: str) -> None:
    pair, expected = PAIRS[name]

    def function(x: Tensor) -> Tensor:
        a, z = torch.addmm(x[0], x, x.t()), F.relu(x)
        return torch.maximum(*pair(a, z))

    graph = make_fx(function, tracing_mode="fake")(torch.randn(4, 4)).graph
    atoms(graph)
    (last,) = graph.find_nodes(op="call_function", target=torch.ops.aten.maximum.default)
    assert last.meta["tie"].meets == expected


def test_a_tie_is_carried_to_where_zeros_were_added_and_not_beyond() -> None:
    def function(x: Tensor) -> Tensor:
        first = torch.addmm(x[0], x, x.t())
        a = first + F.relu(x)
        b = torch.addmm(x[0], a, x.t())
        return torch.maximum(torch.exp(b + F.relu(x)), torch.exp(b))

    graph = make_fx(function, tracing_mode="fake")(torch.randn(4, 4)).graph
    atoms(graph)
    one, other = graph.find_nodes(op="call_function", target=torch.ops.aten.exp.default)
    (after,), (before,) = one.all_input_nodes, other.all_input_nodes
    assert one.meta["tie"].carried == {after} and other.meta["tie"].carried == {before}
    assert not after.meta["tie"].carried and not before.meta["tie"].carried

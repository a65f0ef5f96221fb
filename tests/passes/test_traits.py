"""The table of traits is right about the operations that it names; what follows from it is kept where it must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from revfx.passes.traits import TRAITS, Atoms, Kind, Kinks, atoms_of, find_barred, trait_of


aten = torch.ops.aten
OWN = frozenset(
    """getitem _low_memory_max_pool_with_offsets inductor_random inductor_seeds inductor_lookup_seed
    inductor_force_stride_order wait_tensor all_gather_into_tensor all_to_all_single broadcast all_reduce
    reduce_scatter_tensor""".split()
)


def named(name: str) -> Any:
    for namespace in (aten, torch.ops.prims):
        if hasattr(namespace, name):
            return getattr(namespace, name)
    return None


@pytest.mark.parametrize("name", [n for n in TRAITS if n not in OWN])
def test_every_row_names_an_operator(name: str) -> None:
    assert named(name) is not None


def unary(kinds: tuple[Kind, ...]) -> list[str]:
    """The operations of one tensor of numbers, and nothing else."""
    found: list[str] = []
    for name, trait in TRAITS.items():
        overload = getattr(named(name), "default", None) if trait.kind in kinds and name not in OWN else None
        given = [] if overload is None else [a for a in overload._schema.arguments if not a.has_default_value()]
        if overload is not None and [str(a.type) for a in given] == ["Tensor"]:
            found.append(name)
    return found


MAPS = [name for name in unary((Kind.MAP,)) if name != "clamp"]  # which needs a limit


def result(name: str, x: Tensor) -> Tensor:
    out: Any = named(name)(x)
    return out if isinstance(out, Tensor) else out[0]


@pytest.mark.parametrize("name", MAPS)
def test_what_a_function_gives_of_zero_and_of_numbers_that_differ(name: str) -> None:
    trait = TRAITS[name]
    zero = result(name, torch.zeros(3, dtype=torch.float64))
    assert bool((zero == 0).all()) == trait.at_zero or trait.makes == Atoms.ANY
    y = result(name, torch.randn(4096, dtype=torch.float64))
    if not y.is_floating_point():
        return
    y = y[y.isfinite()]
    if trait.makes == Atoms.NONE:
        assert len(y.unique()) >= 0.99 * len(y), "as good as no number twice"
    if trait.makes == Atoms.ZERO:
        assert (y == 0).sum() > 100 and len(y[y != 0].unique()) == (y != 0).sum()


@pytest.mark.parametrize("name", [n for n in MAPS if TRAITS[n].kinks == Kinks.NONE and TRAITS[n].makes == Atoms.NONE])
def test_functions_without_kinks_have_a_derivative_that_does_not_jump(name: str) -> None:
    for at in (0.0, 0.5, 1.0, 2.0) if TRAITS[name].at_zero else (0.5, 1.5, 2.5):  # others may have a pole at zero
        sides = torch.tensor([at - 1e-7, at + 1e-7], dtype=torch.float64, requires_grad=True)
        y = result(name, sides)
        (slope,) = torch.autograd.grad(y.sum(), sides)
        if slope.isfinite().all() and y.isfinite().all():
            assert abs(slope[0] - slope[1]) < 1e-3 * (1 + abs(slope[0]))


def graph_of(function: Callable[..., Any], *inputs: Tensor) -> fx.Graph:
    return make_fx(function, tracing_mode="fake")(*inputs).graph


def kept(function: Callable[..., Any], trained: bool = False) -> list[bool]:
    """Whether each input of a function of tensors (8, 4) may not come back up to rounding; `w` is a weight."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    graph = graph_of(function, *(torch.randn(4 if name == "w" else 8, 4) for name in names))
    places = [n for n in graph.nodes if n.op == "placeholder"]
    found = find_barred(graph, [n for n, name in zip(places, names, strict=True) if trained or name == "w"])
    return [n in found for n, name in zip(places, names, strict=True) if name != "w"]


CASES: dict[str, tuple[Callable[..., Any], list[bool]]] = {
    "relu of data": (lambda x: x.relu(), [True]),
    "floor of data": (lambda x: x.floor() + x, [True]),
    "gelu of data": (lambda x: F.gelu(x), [False]),
    "relu behind a layer": (lambda x, w: (x @ w).relu(), [False]),
    "relu of a sum with what is mixed": (lambda x, w: (x + x @ w).relu(), [False]),
    "relu of a sum with data": (lambda x, y: (x + y).relu(), [True, True]),
    "relu of a product with data": (lambda x, y: (x * y).relu(), [True, True]),
    "behind a view": (lambda x: x.view(4, 8).t().relu(), [True]),
    "compared with one": (lambda x: torch.where(x >= 1, x, 2 * x), [True]),
    "clamped": (lambda x: x.clamp(-1, 1), [True]),
    "the largest": (lambda x: x.amax(-1), [True]),
    "normalised": (lambda x: F.layer_norm(x, (4,)).relu(), [False]),
    "squared": (lambda x: x**2, [False]),
    "a root": (lambda x: x.abs().sqrt(), [True]),
    "softmax": (lambda x: x.softmax(-1), [False]),
}


@pytest.mark.parametrize("name", CASES)
def test_data_is_kept_where_something_tells_its_numbers_apart(name: str) -> None:
    function, expected = CASES[name]
    assert kept(function) == expected


@pytest.mark.parametrize("name", CASES)
def test_numbers_without_atoms_never_are(name: str) -> None:
    function, _ = CASES[name]
    assert not any(kept(function, trained=True))


def between(function: Callable[[Tensor], Any]) -> dict[str, bool]:
    """Whether what lies between a layer and the result of `function` is kept, by the name of the operation."""
    graph = graph_of(lambda x, w: function(x @ w), torch.randn(8, 4), torch.randn(4, 4))
    found = find_barred(graph, [n for n in graph.nodes if n.op == "placeholder"][1:])
    return {n.name: n in found for n in graph.nodes if n.op == "call_function"}


def test_zeros_that_relu_made_are_kept_where_something_asks_for_zero() -> None:
    assert between(lambda x: x.relu().relu())["relu"]
    assert between(lambda x: (0.5 * x.relu().t()).abs())["relu"]
    assert between(lambda x: (x.relu() * x).relu())["relu"]
    assert not between(lambda x: x.relu() + 1)["relu"], "nothing tells them"
    assert not between(lambda x: (x.relu() + x).relu())["relu"], "they are lost in the sum"
    assert not between(lambda x: (x.relu() @ x.t()).relu())["relu"], "and among others"
    assert not between(lambda x: F.gelu(x.relu()))["relu"]
    assert between(lambda x: (x.relu() + 1).floor())["relu"], "elsewhere by a number"
    assert between(lambda x: x.relu().exp().clamp(max=1.0))["relu"], "elsewhere by a function"


def test_zeros_come_from_dropout_masks_and_padding() -> None:
    zeros: dict[str, Callable[[Tensor], Tensor]] = {
        "mul": lambda x: x * (torch.rand(8, 4) > 0.5),
        "where": lambda x: torch.where(x > 100, x, 0.0),
        "masked_fill": lambda x: x.masked_fill(x > 100, 0.0),
        "constant_pad_nd": lambda x: F.pad(x, (1, 1)),
        "tril": lambda x: x.tril(),
    }
    for name, make in zeros.items():
        assert between(lambda x, make=make: make(x).relu())[name], name
    assert not between(lambda x: (x * torch.rand(8, 4)).relu())["mul"]


def test_a_part_has_the_atoms_of_the_part_that_it_was_put_together_of() -> None:
    def function(x: Tensor, w: Tensor) -> Any:
        y = x @ w
        whole = torch.cat([y, x.relu()], 1)
        return whole[:, :4].relu(), whole[:, 4:].relu(), whole[:, 2:6].relu()

    graph = graph_of(function, torch.randn(8, 4), torch.randn(4, 4))
    found = atoms_of(graph, [n for n in graph.nodes if n.op == "placeholder"][1:])
    read = [n.args[0] for n in graph.nodes if n.target is aten.relu.default][1:]  # the first one is of the data
    assert [found[n] for n in read] == [Atoms.NONE, Atoms.ANY, Atoms.ANY]


def test_what_the_table_does_not_name_is_told_by_its_schema_or_kept() -> None:
    def trait(function: Callable[..., Any], target: Any) -> Any:
        graph = graph_of(function, torch.rand(8, 4) + 0.5)
        return trait_of(next(n for n in graph.nodes if n.target is target))

    assert trait(lambda x: x.t(), aten.t.default).kind is Kind.MOVE
    assert trait(lambda x: torch.special.bessel_j0(x), aten.special_bessel_j0.default).kinks == Kinks.ANYWHERE
    assert kept(lambda x: torch.special.bessel_j0(x)) == [True]


def test_the_reason_names_the_operation() -> None:
    graph = graph_of(lambda x, w: ((x @ w).relu().relu(), x.floor()), torch.randn(8, 4), torch.randn(4, 4))
    reasons = {n.name: why for n, why in find_barred(graph, [n for n in graph.nodes if n.name.startswith("w")]).items()}
    assert reasons["relu"].startswith("it can hold exact zeros, which `relu`")
    assert reasons["x_1"] == "`floor` may tell its numbers from those that an inverse returns"

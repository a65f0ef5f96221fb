"""Programs that were once wrong: values that change between calls, and rules met outside of their domain."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from coupled import Coupled, additive, x_
from helpers import kept_cuts
from torch import Tensor, nn
from training import assert_same_state, assert_same_steps, take_step, twins
from zoo import D, mlp

import revfx
from revfx.errors import RevfxWarning


pytestmark = pytest.mark.usefixtures("fp64")
SCALE, MEMO = 1.0, dict[int, Tensor]()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A refusal is as good as a plan here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RevfxWarning)
        yield


# --- values that change between calls
class Config:
    def __init__(self, scale: float) -> None:
        self.scale = scale


def _config(m: Any) -> None:
    m.config.scale = 2.0


def _list(m: Any) -> None:
    m.long[0] = 3.0


def _array(m: Any) -> None:
    m.array[1] = 4.0


def _nested(m: Any) -> None:
    m.deep["a"][0]["b"]["c"][0] = 5.0


def test_object_list_array_or_nested_container_that_changes_is_seen() -> None:
    def couple(m: Any, a: Tensor, b: Tensor, f: Any, g: Any) -> tuple[Tensor, Tensor]:
        a = a + m.config.scale * m.long[0] * f(b)
        return a, b + float(m.array[1]) * m.deep["a"][0]["b"]["c"][0] * g(a)

    model: Any = Coupled(couple)
    model.config, model.long, model.array = Config(1.0), [1.0] * 300, np.ones(3)
    model.deep = {"a": [{"b": {"c": [1.0]}}]}
    converted = revfx.convert(model)
    assert_same_steps(converted, model, [x_()])
    for change in (_config, _list, _array, _nested):
        change(model)
        assert_same_steps(converted, model, [x_()])
    assert kept_cuts(converted) == 2


def test_global_closure_and_class_attribute_that_change_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    box = {"scale": 1.0}

    def couple(m: Any, a: Tensor, b: Tensor, f: Any, g: Any) -> tuple[Tensor, Tensor]:
        return a + SCALE * box["scale"] * m.strength * f(b), b + g(a)

    model = Coupled(couple)
    converted = revfx.convert(model)
    assert_same_steps(converted, model, [x_()])
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    assert_same_steps(converted, model, [x_()])
    box["scale"] = 3.0
    assert_same_steps(converted, model, [x_()])
    monkeypatch.setattr(Coupled, "strength", 4.0)
    assert_same_steps(converted, model, [x_()])
    assert kept_cuts(converted) == 2


def test_arguments_that_compare_equal_are_told_apart() -> None:
    def couple(m: Any, a: Tensor, b: Tensor, f: Any, g: Any, kind: Any) -> tuple[Tensor, Tensor]:
        scale = 2 if isinstance(kind, bool) else 3 if isinstance(kind, int) else float(np.copysign(1.0, kind))
        return a + f(b) * scale, b + g(a)

    model = Coupled(couple)
    converted = revfx.convert(model)
    for _ in range(3):
        for kind in (1, 1.0, True, 0.0, -0.0):
            assert_same_steps(converted, model, [x_(), kind], steps=1)


def test_function_given_as_an_argument_is_not_confused_with_one_that_is_gone() -> None:
    def couple(m: Any, a: Tensor, b: Tensor, f: Any, g: Any, act: Any) -> tuple[Tensor, Tensor]:
        return a + act(f(b)), b + g(a)

    model = Coupled(couple)
    converted, x = revfx.convert(model), x_()
    for k in range(4):
        got = take_step(converted, [x, eval(f"lambda t: t * {k}")])
        assert_same_state(got, take_step(model, [x, lambda t, k=k: t * k]))


class Part(nn.Module):
    """Never called itself: its couplings are written in the root."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.scale, self.weight = mlp(), mlp(), 1.0, nn.Parameter(torch.rand(D))
        self.f.strength = 1.0  # type: ignore[assignment]


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Part() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for p in self.parts:
            a = a + p.scale * p.f.strength * p.weight * p.f(b)  # type: ignore[operator]
            b = b + p.g(a)  # type: ignore[operator]
        return torch.cat([a, b], -1)


def _scale(m: Any) -> None:
    m.parts[1].scale = 2.5


def _strength(m: Any) -> None:
    m.parts[1].f.strength = 2.5


def _function(m: Any) -> None:
    m.parts[1].f = Part().f


def _part(m: Any) -> None:
    m.parts[2] = Part()


def _more(m: Any) -> None:
    m.parts.append(Part())


def _weight(m: Any) -> None:
    m.parts[0].weight = nn.Parameter(torch.rand(1, D))


@pytest.mark.parametrize("change", [_scale, _strength, _function, _part, _more, _weight])
def test_change_below_the_root_is_seen(change: Callable[[nn.Module], None]) -> None:
    model = Parts()
    converted = revfx.convert(model)
    assert_same_steps(converted, model, [x_()])
    change(model)
    assert_same_steps(converted, model, [x_()])


def test_permutation_that_is_replaced_is_read_again() -> None:
    def couple(m: Any, a: Tensor, b: Tensor, f: Any, g: Any) -> tuple[Tensor, Tensor]:
        return (a + f(b))[:, m.order], b + g(a)

    model: Any = Coupled(couple)
    converted = revfx.convert(model)
    assert_same_steps(converted, model, [x_()])
    model.order = torch.zeros(D, dtype=torch.long)
    assert_same_steps(converted, model, [x_()])


def test_parameters_that_were_tied_and_are_not_any_more() -> None:
    def couple(m: Any, a: Tensor, b: Tensor, f: Any, g: Any) -> tuple[Tensor, Tensor]:
        return a + m.tied_a * f(b), b + m.tied_b * g(a)

    model: Any = Coupled(couple)
    converted: Any = revfx.convert(model)
    assert_same_steps(converted, model, [x_()])
    converted.tied_b = nn.Parameter(torch.rand(D))  # the tables are shared
    assert_same_steps(converted, model, [x_()])


def test_default_dtype_that_changes_is_seen() -> None:
    def couple(m: Any, a: Tensor, b: Tensor, f: Any, g: Any) -> tuple[Tensor, Tensor]:
        a = a.to(torch.get_default_dtype())
        return (a + f(b.double())), b + g(a.double())

    model = Coupled(couple)
    converted, x = revfx.convert(model), x_()
    assert_same_steps(converted, model, [x])
    torch.set_default_dtype(torch.float32)
    assert_same_steps(converted, model, [x])


# --- random numbers, lists and tables
def _numpys(m: Any, a: Tensor, b: Tensor, f: Any, g: Any) -> tuple[Tensor, Tensor]:
    return (a + f(b), b + g(a)) if np.random.rand() < 0.5 else (a, b)


def _seeds(m: Any, a: Tensor, b: Tensor, f: Any, g: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    return a + f(b) * torch.rand(D), b + g(a)


def _forks(m: Any, a: Tensor, b: Tensor, f: Any, g: Any) -> tuple[Tensor, Tensor]:
    with torch.random.fork_rng():
        noise = torch.rand_like(a)
    return a + f(b) * noise, b + g(a)


@pytest.mark.parametrize("couple", [_numpys, _seeds, _forks])
def test_generators_that_are_drawn_from_or_seeded_outside_operations(couple: Callable[..., Any]) -> None:
    model = Coupled(couple)
    assert_same_steps(revfx.convert(model), model, [x_()], steps=(7, 7, 7, 8, 9, 7))


class Remembers(nn.Module):
    """Keeps a list of what it returned and a table of constants by size, in itself and in a global."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.seen: list[Tensor] = []
        self.table: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        for table in (self.table, MEMO):
            if len(x) not in table:
                table[len(x)] = torch.arange(1.0 * len(x)).unsqueeze(1)
        y = self.inner(x) * (self.table[len(x)] + MEMO[len(x)])
        self.seen.append(y.detach().mean())
        return y


def test_lists_and_tables_hold_the_tensors_of_the_forward_and_no_others() -> None:
    model = Coupled(additive, Remembers)
    converted, plain = twins(model)
    tables: list[dict[int, Tensor]] = []
    for m in (converted, plain):
        MEMO.clear()
        torch.manual_seed(0)
        for _ in range(3):
            m(x_()).sum().backward()
        tables.append(dict(MEMO))
    assert all(map(same_tensors, tables, tables[::-1]))
    for f, other in zip((*converted.f, *converted.g), (*plain.f, *plain.g), strict=True):
        assert same_tensors(f.table, other.table)
        assert len(f.seen) == 3 and all(map(torch.equal, f.seen, other.seen))
        assert {type(t) for t in (*f.seen, *f.table.values(), *MEMO.values())} == {Tensor}


def same_tensors(a: dict[int, Tensor], b: dict[int, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- what is called, and what autograd saves
class OwnCall(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2 + 1

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_overridden_call_runs_once() -> None:
    model = Coupled(additive, OwnCall)
    assert_same_steps(revfx.convert(model), model, [x_()])


def test_code_that_asks_whether_a_result_requires_grad() -> None:
    def couple(m: Any, a: Tensor, b: Tensor, f: Any, g: Any) -> tuple[Tensor, Tensor]:
        h = f(b)
        return a + (h if h.requires_grad else 2 * h), b + g(a)

    model = Coupled(couple)
    assert_same_steps(revfx.convert(model), model, [x_()])


class Conjugates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(D, dtype=torch.complex128) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x.conj()


def test_complex_streams_lazy_conjugates_and_complex_factors() -> None:
    def couple(m: Any, a: Tensor, b: Tensor, f: Any, g: Any) -> tuple[Tensor, Tensor]:
        a = a * 1j + f(b)
        return a, torch.add(b, g(a), alpha=2) / 1j

    model = Coupled(couple, Conjugates)
    converted: Any = revfx.convert(model)
    assert_same_steps(converted, model, [torch.randn(6, 2 * D, dtype=torch.complex128, requires_grad=True)])
    assert converted.revfx.plans[0].regions

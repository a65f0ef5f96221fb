"""Programs that were once wrong: what a recorded graph would not repeat, and rules met outside their domain."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zoo import D, Pairs, mlp

import revfx
from revfx.errors import RevfxWarning
from revfx.testing import assert_same_grads


pytestmark = pytest.mark.usefixtures("fp64")
SCALE, MEMO = 1.0, dict[int, Tensor]()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A refusal is as good as a plan here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RevfxWarning)
        yield


def x_() -> Tensor:
    return torch.randn(6, 2 * D, requires_grad=True)


class Coupled(Pairs):
    """`couple(self, a, b, f, g, *more)` repeated; a class attribute and some attributes for it to read."""

    strength = 1.0

    def __init__(
        self, couple: Callable[..., tuple[Tensor, Tensor]], make: Callable[[], nn.Module] = mlp, depth: int = 4
    ) -> None:
        super().__init__(depth)
        self.couple = couple
        self.f, self.g = (nn.ModuleList(make() for _ in range(depth)) for _ in range(2))
        self.register_buffer("order", torch.randperm(D))
        self.tied_a = self.tied_b = nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a, b = self.couple(self, a, b, f, g, *more)
        return torch.cat([a, b], -1)


def additive(m: Any, a: Tensor, b: Tensor, f: Any, g: Any) -> tuple[Tensor, Tensor]:
    a = a + f(b)
    return a, b + g(a)


# --- what the recorded code read changes between calls
class Config:
    def __init__(self, scale: float) -> None:
        self.scale = scale


def test_object_list_array_or_nested_container_that_changes_is_seen() -> None:
    def couple(m: Any, a: Tensor, b: Tensor, f: Any, g: Any) -> tuple[Tensor, Tensor]:
        a = a + m.config.scale * m.long[0] * f(b)
        return a, b + float(m.array[1]) * m.deep["a"][0]["b"]["c"][0] * g(a)

    model: Any = Coupled(couple)
    model.config, model.long, model.array = Config(1.0), [1.0] * 300, np.ones(3)
    model.deep = {"a": [{"b": {"c": [1.0]}}]}
    converted, x = revfx.convert(model), x_()

    def check() -> None:
        assert torch.equal(converted(x), model(x))

    check()
    model.config.scale = 2.0
    check()
    model.long[0] = 3.0
    check()
    model.array[1] = 4.0
    check()
    model.deep["a"][0]["b"]["c"][0] = 5.0
    check()


def test_global_closure_and_class_attribute_that_change_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    box = {"scale": 1.0}

    def couple(m: Any, a: Tensor, b: Tensor, f: Any, g: Any) -> tuple[Tensor, Tensor]:
        return a + SCALE * box["scale"] * m.strength * f(b), b + g(a)

    model = Coupled(couple)
    converted: Any = revfx.convert(model)
    x = x_()
    assert torch.equal(converted(x), model(x))
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    assert torch.equal(converted(x), model(x))
    box["scale"] = 3.0
    assert torch.equal(converted(x), model(x))
    monkeypatch.setattr(Coupled, "strength", 4.0)
    assert torch.equal(converted(x), model(x))
    converted(x)
    assert len(converted.revfx.plans) == 4


def test_arguments_that_compare_equal_are_told_apart() -> None:
    def couple(m: Any, a: Tensor, b: Tensor, f: Any, g: Any, kind: Any) -> tuple[Tensor, Tensor]:
        scale = 2 if isinstance(kind, bool) else 3 if isinstance(kind, int) else float(np.copysign(1.0, kind))
        return a + f(b) * scale, b + g(a)

    model = Coupled(couple)
    converted, x = revfx.convert(model), x_()
    for kind in (1, 1.0, True, 0.0, -0.0):
        assert torch.equal(converted(x, kind), model(x, kind))


def test_function_given_as_an_argument_is_not_confused_with_one_that_is_gone() -> None:
    def couple(m: Any, a: Tensor, b: Tensor, f: Any, g: Any, act: Any) -> tuple[Tensor, Tensor]:
        return a + act(f(b)), b + g(a)

    model = Coupled(couple)
    converted, x = revfx.convert(model), x_()
    got = [converted(x, eval(f"lambda t: t * {k}")) for k in range(4)]
    assert all(torch.equal(y, model(x, lambda t, k=k: t * k)) for k, y in enumerate(got))


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
    converted, x = revfx.convert(model), x_()
    assert_same_grads(converted, model, [x])
    change(model)
    assert torch.equal(converted(x), model(x))
    assert_same_grads(converted, model, [x])


def test_permutation_that_is_replaced_is_read_again() -> None:
    def couple(m: Any, a: Tensor, b: Tensor, f: Any, g: Any) -> tuple[Tensor, Tensor]:
        return (a + f(b))[:, m.order], b + g(a)

    model: Any = Coupled(couple)
    converted, x = revfx.convert(model), x_()
    assert_same_grads(converted, model, [x])
    model.order = torch.zeros(D, dtype=torch.long)
    assert_same_grads(converted, model, [x])


def test_parameters_that_were_tied_and_are_not_any_more() -> None:
    def couple(m: Any, a: Tensor, b: Tensor, f: Any, g: Any) -> tuple[Tensor, Tensor]:
        return a + m.tied_a * f(b), b + m.tied_b * g(a)

    model: Any = Coupled(couple)
    converted: Any = revfx.convert(model)
    x = x_()
    assert torch.equal(converted(x), model(x))
    converted.tied_b = nn.Parameter(torch.rand(D))  # the tables are shared
    assert torch.equal(converted(x), model(x))


def test_default_dtype_that_changes_makes_another_plan() -> None:
    def couple(m: Any, a: Tensor, b: Tensor, f: Any, g: Any) -> tuple[Tensor, Tensor]:
        a = a.to(torch.get_default_dtype())
        return (a + f(b.double())), b + g(a.double())

    model = Coupled(couple)
    converted, x = revfx.convert(model), x_()
    converted(x)
    torch.set_default_dtype(torch.float32)
    assert torch.equal(converted(x), model(x))


# --- what running the code leaves behind
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
    converted, x = revfx.convert(model), x_()
    for _ in range(3):
        seen = []
        for m in (converted, model):
            torch.manual_seed(7)
            np.random.seed(7)
            seen.append((m(x), torch.get_rng_state(), np.random.rand()))
        (y, after, drawn), (want, after_, drawn_) = seen
        assert torch.equal(y, want) and torch.equal(after, after_) and drawn == drawn_


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


def test_lists_and_tables_hold_what_the_forward_put_there_and_nothing_else() -> None:
    MEMO.clear()
    model = Coupled(additive, Remembers)
    converted = revfx.convert(model)
    converted(x_()).sum().backward()
    for f in (*model.f, *model.g):
        assert [type(t) for t in (*f.seen, *f.table.values())] == [Tensor, Tensor]  # type: ignore[union-attr,misc,operator]
    assert [type(t) for t in MEMO.values()] == [Tensor]


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
    x = x_()
    assert torch.equal(revfx.convert(model)(x), model(x))
    assert_same_grads(revfx.convert(model), model, [x])


def test_code_that_asks_whether_a_result_requires_grad() -> None:
    def couple(m: Any, a: Tensor, b: Tensor, f: Any, g: Any) -> tuple[Tensor, Tensor]:
        h = f(b)
        return a + (h if h.requires_grad else 2 * h), b + g(a)

    model = Coupled(couple)
    assert_same_grads(revfx.convert(model), model, [x_()])


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
    x = torch.randn(6, 2 * D, dtype=torch.complex128, requires_grad=True)
    wanted = [x, *model.f.parameters(), *model.g.parameters()]
    got, want = (torch.autograd.grad(torch.view_as_real(m(x)).sin().sum(), wanted) for m in (converted, model))
    assert all((g - w).norm() <= 1e-9 * w.norm() for g, w in zip(got, want, strict=True))
    assert converted.revfx.plans[0].regions


# --- rules
def _by_name(m: Any, a: Tensor, b: Tensor, f: Any, g: Any) -> tuple[Tensor, Tensor]:
    a = torch.add(input=a, other=f(b))
    b = torch.add(b, other=g(a), alpha=2)
    a = torch.permute(input=torch.transpose(input=a, dim0=0, dim1=1), dims=(-1, -2))
    a, b = torch.split(tensor=torch.cat(tensors=[a, b], dim=1), split_size_or_sections=D, dim=1)
    return torch.roll(input=torch.flip(input=a, dims=(0,)), shifts=1, dims=-1), torch.reshape(input=b, shape=a.shape)


def _arrays(m: Any, a: Tensor, b: Tensor, f: Any, g: Any) -> tuple[Tensor, Tensor]:
    a = a + f(b)
    b = b + g(a) + a[:, np.int64(1)].unsqueeze(1) + a[:, np.arange(D)] + a[:, tuple(range(D))]
    return a, b


def _empties(m: Any, a: Tensor, b: Tensor, f: Any, g: Any) -> tuple[Tensor, Tensor]:
    a = torch.cat([torch.empty(0), a + f(b)], 1)
    return a, b + g(a)


def _mixed(m: Any, a: Tensor, b: Tensor, f: Any, g: Any) -> tuple[Tensor, Tensor]:
    b = b + g(a.double())
    a, b = torch.cat([a.float(), b], -1).chunk(2, -1)
    return a + f(b), b


@pytest.mark.parametrize("couple", [_by_name, _arrays, _empties, _mixed])
def test_rules_met_in_other_spellings_and_outside_their_domain(couple: Callable[..., Any]) -> None:
    model = Coupled(couple)
    assert_same_grads(revfx.convert(model), model, [x_()])


def test_value_that_only_an_untrusted_inverse_gave_first_is_recomputed() -> None:
    """Relu's zeros bar `h <- y - r` and `r <- y - h`; h, which f ends in, is wanted in the backward."""

    def couple(m: Any, a: Tensor, b: Tensor, f: Any, g: Any) -> tuple[Tensor, Tensor]:
        a = torch.cat([a, b], -1)[:, :D] + f(b)
        r = torch.relu(a).flip(-1) * 0.5 + torch.relu(g(b))
        return r, b * 1.5

    model = Coupled(couple, lambda: nn.Sequential(mlp(), nn.ReLU()), 6)
    assert_same_grads(revfx.convert(model), model, [x_()])


@pytest.mark.parametrize("masked", [False, True])
def test_part_without_zeros_says_nothing_of_the_whole(masked: bool) -> None:
    """One half of what is put together has exact zeros, the other none; where they meet moves from step to step."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start = nn.Sequential(nn.Linear(D, D), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            b = self.start(b)
            for _ in range(4):
                a, b = a + b, b * 1.5
                a = torch.where(b > 0, a, a * 0.5) if masked else a + torch.relu(b) + 2 * (b > 0)
                u, v, w = torch.cat([a, b], -1).split([2, D, D - 2], -1)
                a, b = v, torch.cat([w, u], -1)
            return torch.cat([a, b], -1)

    model = Halves()
    assert_same_grads(revfx.convert(model), model, [x_()])


def test_converted_models_inside_a_converted_model_work_at_the_first_step() -> None:
    class Feed(nn.Module):
        def __init__(self, d: int) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

        def forward(self, t: Tensor) -> Tensor:
            return self.down(nn.functional.gelu(self.up(t)))

    class Couplings(nn.Module):
        def __init__(self, d: int, depth: int, inner: bool = False) -> None:
            super().__init__()
            make = (lambda: Couplings(d // 2, 4)) if inner else (lambda: Feed(d))
            self.f = nn.ModuleList(make() for _ in range(depth))
            self.g = nn.ModuleList(Feed(d) for _ in range(depth))

        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            for f, g in zip(self.f, self.g, strict=True):
                a = a + f(b)
                b = b + g(a)
            return torch.cat([a, b], -1)

    plain = Couplings(6, 2, inner=True)
    nested = copy.deepcopy(plain)
    nested.f = nn.ModuleList(revfx.convert(m) for m in nested.f)
    assert_same_grads(revfx.convert(nested), plain, [torch.randn(8, 12, requires_grad=True)])

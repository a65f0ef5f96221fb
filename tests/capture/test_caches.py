"""Caches that user code fills for the first time while it runs on fake tensors: none may keep one."""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from helpers import deep_but, fp64 as fp64, mlp
from torch import Tensor, nn

import revfx
from revfx import _fake, _torch
from revfx.capture import effects
from revfx.capture.effects import let_go
from revfx.testing import assert_same_grads


Table = Callable[[int], Tensor]


def make(n: int) -> Tensor:
    return torch.arange(n).to(torch.float64).cos()


@functools.lru_cache(maxsize=4)
def bounded(n: int) -> Tensor:
    return make(n)


@functools.lru_cache(maxsize=None)  # noqa: UP033
def unbounded(n: int) -> Tensor:
    return make(n)


@functools.cache
def pairs(n: int) -> tuple[Tensor, dict[str, Tensor]]:
    return make(n), {"sin": make(n).sin()}


def in_a_pair(n: int) -> Tensor:
    cos, others = pairs(n)
    return cos + others["sin"]


@dataclass(frozen=True)
class Frozen:
    table: Tensor


@functools.lru_cache
def frozen(n: int) -> Frozen:
    return Frozen(make(n))


def in_a_frozen_object(n: int) -> Tensor:
    return frozen(n).table


def default(n: int, known: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006
    if n not in known:
        known[n] = make(n)
    return known[n]


class OfAClass:
    known: ClassVar[dict[int, Tensor]] = {}
    latest: ClassVar[Tensor | None] = None

    @classmethod
    def get(cls, n: int) -> Tensor:
        if n not in cls.known:
            cls.known[n] = make(n)
        return cls.known[n]


def class_attribute(n: int) -> Tensor:
    if OfAClass.latest is None:
        OfAClass.latest = make(n)
    return OfAClass.latest


IN_DICT: dict[int, Tensor] = {}
IN_LIST: list[Tensor] = []
DEEP: dict[str, dict[int, tuple[Tensor, ...]]] = {"tables": {}}
latest: Tensor | None = None
HIDDEN: dict[str, Any] = {"dict": {}, "deque": collections.deque[Any](maxlen=2)}


def global_dict(n: int) -> Tensor:
    if n not in IN_DICT:
        IN_DICT[n] = make(n)
    return IN_DICT[n]


def global_list(n: int) -> Tensor:
    if not IN_LIST:
        IN_LIST.append(make(n))
    return IN_LIST[0]


def global_deep(n: int) -> Tensor:
    if n not in DEEP["tables"]:
        DEEP["tables"][n] = (make(n), make(n).sin())
    return DEEP["tables"][n][0]


def global_name(n: int) -> Tensor:
    global latest
    if latest is None:
        latest = make(n)
    return latest


class Rope:
    def __init__(self) -> None:
        self.table: Tensor | None = None

    def __call__(self, n: int) -> Tensor:
        if self.table is None:
            self.table = make(n)
        return self.table

    @functools.cached_property
    def fixed(self) -> Tensor:
        return make(4)


ROPE = Rope()


def global_object(n: int) -> Tensor:
    return ROPE(n)


def computed_property(n: int) -> Tensor:
    return globals()["ROPE"].fixed


def hidden_object(n: int) -> Tensor:
    return globals()["ROPE"](n)


def hidden_dict(n: int) -> Tensor:  # where no one can see from the code which container it is
    known = globals()["HIDDEN"]["dict"]
    if n not in known:
        known[n] = [make(n)]
    return known[n][0]


def hidden_deque(n: int) -> Tensor:
    known = globals()["HIDDEN"]["deque"]
    if not known:
        known.append((make(n), n))
    return known[0][0]


def closure() -> Table:
    found: Tensor | None = None

    def get(n: int) -> Tensor:
        nonlocal found
        if found is None:
            found = make(n)
        return found

    return get


TABLES: list[Table] = [
    bounded, unbounded, in_a_pair, in_a_frozen_object, default, OfAClass.get, class_attribute,
    global_dict, global_list, global_deep, global_name, global_object, computed_property, hidden_dict, hidden_deque,
]  # fmt: skip


def clear() -> None:
    global latest
    for cached in (bounded, unbounded, pairs, frozen):
        cached.cache_clear()
    defaults: Any = default.__defaults__
    for held in defaults[0], OfAClass.known, IN_DICT, IN_LIST, DEEP["tables"], *HIDDEN.values():
        held.clear()
    OfAClass.latest = latest = ROPE.table = None
    vars(ROPE).pop("fixed", None)


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    clear()
    yield
    clear()


class Uses(nn.Module):
    def __init__(self, table: Table) -> None:
        super().__init__()
        self.inner, self.table = mlp(4), table

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.table(x.shape[-1])


class InF(nn.Module):
    """The table is used in f, which is called whole."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.f, self.g = nn.ModuleList(Uses(table) for _ in range(3)), nn.ModuleList(mlp(4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            b = b + g(a)
        return torch.cat([a, b], -1)


class InRoot(InF):
    """The table is used in the code that is recorded."""

    def __init__(self, table: Table) -> None:
        super().__init__(table)
        self.f, self.table = nn.ModuleList(mlp(4) for _ in range(3)), table

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b) * self.table(4)
            b = b + g(a)
        return torch.cat([a, b], -1)


@contextlib.contextmanager
def silent() -> Generator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", revfx.errors.RevfxWarning)
        yield


def assert_trains(model: nn.Module, plain: nn.Module, steps: int = 2) -> None:
    """`model` gives real tensors where it fills the caches itself, and the gradients of `plain`."""
    x = torch.randn(3, 8, requires_grad=True)
    with silent():
        assert type(model(x)) is Tensor
    for _ in range(steps):
        with silent():
            assert_same_grads(model, plain, [x])
    assert type(plain(x)) is Tensor


LIKE_OTHERS = [global_list, hidden_deque, in_a_pair, global_deep, computed_property, global_object]
ALL = [(kind, table) for kind in (InF, InRoot) for table in TABLES]
SOME = [*((InF, t) for t in TABLES if t not in LIKE_OTHERS), (InRoot, global_name)]


@pytest.mark.parametrize("kind, table", deep_but(SOME, ALL))
def test_convert_leaves_no_fake_tensor(kind: type[InF], table: Table) -> None:
    model = kind(table)
    assert_trains(revfx.convert(model), model)


@pytest.mark.parametrize("kind, table", deep_but(SOME[::2], ALL))
def test_explain_leaves_no_fake_tensor(kind: type[InF], table: Table) -> None:
    model, x = kind(table), torch.randn(3, 8)
    revfx.explain(model, x)
    assert type(model(x)) is Tensor
    assert type(table(4)) is Tensor


class Loop:
    """An object that only the collector can free."""

    itself: Loop


@pytest.mark.parametrize("frozen", [True, False])
def test_what_the_collector_was_told_to_leave_alone_is_found(frozen: bool) -> None:
    before = gc.get_freeze_count()
    gc.unfreeze()
    try:
        bounded.cache_clear()
        if frozen:
            gc.freeze()
        gc.disable()
        garbage = Loop()
        garbage.itself = garbage
        alive = weakref.ref(garbage)
        del garbage
        model = InF(bounded)
        assert_trains(revfx.convert(model), model)
        assert (gc.get_freeze_count() > 0) == frozen
        gc.collect()
        assert alive() is None
    finally:
        gc.enable()
        gc.unfreeze()
        if before:
            gc.freeze()


@pytest.mark.parametrize("table", [t for t in TABLES[::2] if t not in (global_object, global_name, class_attribute)])
def test_what_f_caches_costs_no_region(table: Table) -> None:
    model: Any = revfx.convert(InF(table))
    with silent():
        model(torch.randn(3, 8, requires_grad=True))
    assert len(model.revfx.plans) == 1


@pytest.mark.parametrize("kind", [InF, InRoot])
def test_variable_of_a_closure(kind: type[InF]) -> None:
    model = kind(closure())
    assert_trains(revfx.convert(model), model)


def test_attribute_that_can_not_be_put_back_is_refused() -> None:
    model = InF(hidden_object)
    converted: Any = revfx.convert(model)
    x = torch.randn(3, 8, requires_grad=True)
    with silent():
        assert type(converted(x)) is Tensor
    assert any("leaves a tensor in `Rope.table`" in r.detail for r in converted.revfx.refusals)
    assert_trains(converted, model)


def test_hook_that_collects_what_a_module_gives() -> None:
    seen: list[Tensor] = []
    model: Any = InF(make)
    model.f[1].inner[0].register_forward_hook(lambda m, args, out: seen.append(out.detach()))
    converted, x = revfx.convert(model), torch.randn(3, 8, requires_grad=True)
    converted(x)
    assert [type(t) for t in seen] == [Tensor]


class Appends(nn.Module):
    """Collects what its own code makes, behind a name that is looked up at run time."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = mlp(4), mlp(4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        a = a + self.f(b)
        globals()["HIDDEN"]["deque"].append(a.detach())
        b = b + self.g(a)
        return torch.cat([a, b], -1)


def test_what_a_recorded_graph_would_not_add_to_a_list_is_refused() -> None:
    converted: Any = revfx.convert(Appends())
    with silent():
        converted(torch.randn(3, 8, requires_grad=True))
    assert [type(t) for t in HIDDEN["deque"]] == [Tensor]
    assert any("leaves a tensor in a deque" in r.detail for r in converted.revfx.refusals)


def test_forward_that_raises_leaves_none_either() -> None:
    class Raises(InF):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x) * hidden_dict(8)
            return y * y.sum().item()

    model, x = Raises(default), torch.randn(3, 8, requires_grad=True)
    with silent():
        assert_same_grads(revfx.convert(model), model, [x])
    clear()
    revfx.explain(model, x)  # says that there is no prediction
    assert type(model(x)) is Tensor


def test_interrupt_leaves_none_either() -> None:
    class Interrupted(InF):
        stop = True

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x) * hidden_dict(8)
            if self.stop:
                raise KeyboardInterrupt
            return y

    model, x = Interrupted(unbounded), torch.randn(3, 8, requires_grad=True)
    converted = revfx.convert(model)
    with pytest.raises(KeyboardInterrupt):
        converted(x)
    Interrupted.stop = False
    assert type(model(x)) is Tensor


def test_nothing_is_searched_where_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Any:
        raise AssertionError("the heap was searched")

    monkeypatch.setattr(effects, "_take_out", fails)
    model, x = InF(make), torch.randn(3, 8, requires_grad=True)
    revfx.explain(model, x)
    assert_same_grads(revfx.convert(model), model, [x])
    with torch.autocast("cpu", torch.bfloat16):  # whose cache would hold casts of fake parameters
        converted: Any = revfx.convert(InF(functools.partial(torch.ones, dtype=torch.float32)).float())
        converted(x.float())
    assert converted.revfx.plans


class Deque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.latest = mlp(4), collections.deque[Tensor](maxlen=4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        self.latest.append(y.detach().mean(0))
        return y


def test_deque_of_a_module_holds_one_entry_per_step() -> None:
    model = InF(make)
    model.f = nn.ModuleList(Deque() for _ in range(3))
    converted, x = revfx.convert(model), torch.randn(3, 8, requires_grad=True)
    for step in range(1, 7):
        converted(x).sin().sum().backward()
        for f in model.f:
            assert isinstance(f, Deque) and [type(t) for t in f.latest] == [Tensor] * min(step, 4)
            assert f.latest.maxlen == 4


# --- `let_go` by itself
class Pair(NamedTuple):
    first: Tensor
    second: int


class Slots:
    __slots__ = ("table",)

    def __init__(self, table: Any) -> None:
        self.table = table


def fake() -> tuple[_fake.FakeMode, Tensor]:
    mode = _fake.FakeMode()
    with mode:
        return mode, torch.ones(3)


def test_entries_that_lead_to_it_are_removed() -> None:
    mode, t = fake()
    kept: dict[Any, Any] = {"a": [t, 1], "b": (2, Pair(t, 1)), "c": {t}, "d": 3, t: 4, "e": collections.deque([t, 5])}
    kept["f"] = functools.partial(print, t)
    del t
    assert let_go(mode) is None and not mode.alive()
    assert kept == {"a": [1], "c": set(), "d": 3, "e": collections.deque([5])}


def test_attributes_are_set_to_none_and_told() -> None:
    for owner in (Slots(None), Rope(), Rope):
        mode, t = fake()
        setattr(owner, "table", t)  # noqa: B010
        del t
        left = let_go(mode)
        assert left is not None and left.endswith(".table`") and not mode.alive()
        assert getattr(owner, "table", 0) is None
    del Rope.table  # type: ignore[attr-defined]


def test_global_name_is_set_to_none_and_told() -> None:
    mode, t = fake()
    globals()["latest"] = t
    del t
    left = let_go(mode)
    assert left is not None and left.endswith("latest`") and "latest" in globals() and latest is None


def test_what_nothing_can_be_done_about_is_told() -> None:
    mode, t = fake()
    it = iter((t, 1))
    del t
    assert let_go(mode) == "a tuple"
    assert _torch.is_fake(next(it))


def test_its_history_goes_with_it() -> None:
    mode = _fake.FakeMode()
    kept = list[Tensor]()
    with mode:
        y = torch.ones(3, requires_grad=True)
        for _ in range(200):
            y = y.sin()
        kept.append(y)
    del y
    assert let_go(mode) is None and not mode.alive() and not kept

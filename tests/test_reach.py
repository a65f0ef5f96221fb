"""Whatever f reads, however it gets at it, is as it was when f runs again, and afterwards as it was before that."""

from __future__ import annotations

import argparse
import functools
import importlib
import operator
import sys
import types
import weakref
from array import array
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from helpers import TOLERANCE, fp64 as fp64, leaf, loss_of, mlp, relative_error
from pytest import approx
from torch import Tensor, nn
from ways import BUILD, Plain

import revfx
from revfx.errors import RegenerationError
from revfx.reach import CODES, LONG, MOST, reads_of


pytestmark = pytest.mark.usefixtures("fp64")
ways = pytest.mark.parametrize("way", ["convert", "rev_block"])


class Item:
    value = 1.0

    def __init__(self) -> None:
        self.own, self.tensor = 1.0, torch.ones(4)

    @property
    def seen(self) -> float:
        return self.own

    def asked(self) -> float:
        return self.own


class Easy(dict[str, Any]):
    __getattr__ = dict.__getitem__


class WithList(list[float]):
    pass


class Meta(type):
    of_meta = 1.0


class OfMeta(metaclass=Meta):
    pass


class Scaling(torch.autograd.Function):
    by = 1.0

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.by = Scaling.by
        return h * Scaling.by

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.by


NUMBER, LIST, TENSOR = 1.0, [1.0], torch.ones(4)
OBJECT, SPACE, NAMESPACE = Item(), types.SimpleNamespace(v=1.0), argparse.Namespace(v=1.0)
EASY, LONGER = Easy(v=1.0), WithList([1.0])
USER, VIEWED, BYTES = UserDict(v=1.0), array("d", [1.0]), bytearray(b"\x01")
VIEWS = memoryview(VIEWED), memoryview(BYTES)
SETTINGS: Any = types.ModuleType("settings_")
sys.modules["settings_"] = SETTINGS
BY_NAME = operator.attrgetter("value")
WRITTEN: Any = {}
exec("def written():\n    return number[0]", WRITTEN)


def act(h: Tensor) -> Tensor:
    return h * 1.0


def with_attribute() -> float:
    return vars(with_attribute)["v"]


def _reset() -> None:
    known = globals()
    known["NUMBER"], LIST[0], OBJECT.own, SPACE.v, NAMESPACE.v = 1.0, 1.0, 1.0, 1.0, 1.0
    EASY["v"], LONGER[0], USER["v"], VIEWED[0], BYTES[0] = 1.0, 1.0, 1.0, 1.0, 1
    vars(SETTINGS)["v"], vars(with_attribute)["v"], Item.value, Meta.of_meta, Scaling.by = 1.0, 1.0, 1.0, 1.0, 1.0
    known["act"] = lambda h: h * 1.0
    Reader.kind, Reader.helped = 1.0, _helped
    WRITTEN["number"] = [1.0]
    for owner, name in ((known, "LATER"), (vars(SETTINGS), "later"), (vars(with_attribute), "later")):
        owner.pop(name, None)
    for kind in (Reader, Parent, Item):
        if "later" in vars(kind):
            delattr(kind, "later")
    TENSOR.fill_(1.0)
    OBJECT.tensor.fill_(1.0)


def _helped(self: Any) -> float:
    return NUMBER


@functools.lru_cache(1)
def _cached() -> float:
    return NUMBER


def _forget(f: Any) -> None:
    globals()["NUMBER"] = 2.0
    _cached.cache_clear()


def _later() -> float:
    try:
        return globals()["LATER"]
    except KeyError:
        return 1.0


class Parent(nn.Module):
    held: Any

    def forward(self, x: Tensor) -> Tensor:
        return x * NUMBER


class Reader(Parent):
    """`mlp(x)`, of which `use(self, h)` makes something."""

    kind = 1.0
    helped = _helped

    def __init__(self, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.m, self.use, self.act = mlp(), use, act
        self.part = functools.partial(torch.mul, other=1.0)

    @property
    def number(self) -> float:
        return NUMBER

    @staticmethod
    def listed() -> float:
        return LIST[0]

    def added(self) -> Tensor:
        return TENSOR

    def _times(self, by: float) -> float:
        return NUMBER * by

    once = functools.partialmethod(_times, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, self.m(x))


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    _reset()
    yield
    _reset()


def _set(name: str, value: Any) -> Callable[[Any], None]:
    return lambda f: globals().update({name: value})


READ: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Any], object]]] = {
    "method": (lambda f, h: h * f.helped(), _set("NUMBER", 2.0)),
    "static method": (lambda f, h: h * f.listed(), lambda f: LIST.insert(0, 2.0)),
    "property": (lambda f, h: h * f.number, _set("NUMBER", 2.0)),
    "super": (lambda f, h: super(Reader, cast(Reader, f)).forward(h), _set("NUMBER", 2.0)),
    "name in a text": (lambda f, h: h * getattr(f, "number", 1.0), _set("NUMBER", 2.0)),
    "global object": (lambda f, h: h * OBJECT.own, lambda f: setattr(OBJECT, "own", 2.0)),
    "its property": (lambda f, h: h * OBJECT.seen, lambda f: setattr(OBJECT, "own", 2.0)),
    "its method": (lambda f, h: h * OBJECT.asked(), lambda f: setattr(OBJECT, "own", 2.0)),
    "SimpleNamespace": (lambda f, h: h * SPACE.v, lambda f: setattr(SPACE, "v", 2.0)),
    "Namespace": (lambda f, h: h * NAMESPACE.v, lambda f: setattr(NAMESPACE, "v", 2.0)),
    "kind of dict": (lambda f, h: h * EASY.v, lambda f: EASY.update(v=2.0)),
    "kind of list": (lambda f, h: h * LONGER[0], lambda f: LONGER.insert(0, 2.0)),
    "UserDict": (lambda f, h: h * USER["v"], lambda f: USER.update(v=2.0)),
    "array that is viewed": (lambda f, h: h * VIEWED[0], lambda f: VIEWED.__setitem__(0, 2.0)),
    "bytes that are viewed": (lambda f, h: h * BYTES[0], lambda f: BYTES.__setitem__(0, 2)),
    "own class": (lambda f, h: h * f.kind, lambda f: setattr(Reader, "kind", 2.0)),
    "global class": (lambda f, h: h * Item.value, lambda f: setattr(Item, "value", 2.0)),
    "class of a class": (lambda f, h: h * OfMeta.of_meta, lambda f: setattr(Meta, "of_meta", 2.0)),
    "replaced method": (lambda f, h: h * f.helped(), lambda f: setattr(Reader, "helped", lambda self: 2.0)),
    "instead of the class": (lambda f, h: h * f.kind, lambda f: setattr(f, "kind", 2.0)),
    "replaced function": (lambda f, h: f.act(h), lambda f: setattr(f, "act", torch.exp)),
    "replaced partial": (lambda f, h: f.part(h), lambda f: setattr(f, "part", functools.partial(torch.mul, other=2.0))),
    "replaced global": (lambda f, h: act(h), _set("act", torch.exp)),
    "replaced module": (lambda f, h: h, lambda f: setattr(f, "m", mlp())),
    "added module": (lambda f, h: h, lambda f: f.m.append(nn.Linear(4, 4))),
    "of a function": (lambda f, h: h * with_attribute(), lambda f: vars(with_attribute).update(v=2.0)),
    "Python module": (lambda f, h: h * SETTINGS.v, lambda f: setattr(SETTINGS, "v", 2.0)),
    "autograd function": (lambda f, h: cast(Tensor, Scaling.apply(h)), lambda f: setattr(Scaling, "by", 2.0)),
    "class, later": (lambda f, h: h * getattr(f, "later", 1.0), lambda f: setattr(Reader, "later", 2.0)),
    "its base, later": (lambda f, h: h * getattr(f, "later", 1.0), lambda f: setattr(Parent, "later", 2.0)),
    "its class, later": (lambda f, h: h * getattr(OBJECT, "later", 1.0), lambda f: setattr(Item, "later", 2.0)),
    "global, later": (lambda f, h: h * _later(), _set("LATER", 2.0)),
    "module, later": (lambda f, h: h * getattr(SETTINGS, "later", 1.0), lambda f: setattr(SETTINGS, "later", 2.0)),
    "function, later": (
        lambda f, h: h * getattr(with_attribute, "later", 1.0),
        lambda f: setattr(with_attribute, "later", 2.0),
    ),
    "made-up name": (lambda f, h: h * getattr(Item, f"val{'ue'}"), lambda f: setattr(Item, "value", 2.0)),
    "attrgetter": (lambda f, h: h * BY_NAME(Item), lambda f: setattr(Item, "value", 2.0)),
    "partial method": (lambda f, h: h * f.once(), _set("NUMBER", 2.0)),
    "cached function": (lambda f, h: h * _cached(), _forget),
    "table of globals": (lambda f, h: h * globals()["NUMBER"], _set("NUMBER", 2.0)),
    "executed text": (lambda f, h: h * WRITTEN["written"](), lambda f: WRITTEN.update(number=[2.0])),
    "module by name": (
        lambda f, h: h * importlib.import_module("settings_").v,
        lambda f: setattr(SETTINGS, "v", 2.0),
    ),
    "hook": (lambda f, h: h, lambda f: f.m[0].register_forward_hook(lambda m, i, o: o * 2.0)),
    "hook before": (lambda f, h: h, lambda f: f.m[0].register_forward_pre_hook(lambda m, i: (i[0] * 2.0,))),
}


def gradients(way: str, use: Callable[[Any, Tensor], Tensor], change: Callable[[Any], object]) -> list[Tensor | None]:
    _reset()
    torch.manual_seed(0)
    fs, gs = [Reader(use), mlp(), mlp()], [mlp() for _ in range(3)]
    parameters = [*nn.ModuleList([*fs, *gs]).parameters()]
    torch.manual_seed(1)
    loss = loss_of((BUILD[way](fs, gs) if way in BUILD else Plain(fs, gs))(leaf(5, 8)))
    change(fs[0])
    return list(torch.autograd.grad(loss, parameters))


@ways
@pytest.mark.filterwarnings("ignore::revfx.errors.RevfxWarning")  # of what only dynamo captures
@pytest.mark.parametrize("name", READ)
def test_what_f_reads_changes_before_the_backward(way: str, name: str) -> None:
    want = gradients("plain", *READ[name])
    assert relative_error(gradients(way, *READ[name]), want) < TOLERANCE


def test_what_was_put_back_is_then_as_it_was_before() -> None:
    def change(f: Any) -> None:
        handles.append(f.m[0].register_forward_hook(lambda m, i, o: o * 2.0))
        Item.value, OBJECT.own, SETTINGS.v, f.kind, f.act = 2.0, 3.0, 4.0, 5.0, torch.exp
        BUILT.append(f)

    BUILT: list[Any] = []
    handles: list[Any] = []
    gradients("rev_block", lambda f, h: f.act(h) * Item.value * OBJECT.own * SETTINGS.v * f.kind, change)
    assert (Item.value, OBJECT.own, SETTINGS.v, BUILT[0].kind, BUILT[0].act) == (2.0, 3.0, 4.0, 5.0, torch.exp)
    assert len(vars(BUILT[0].m[0])["_forward_hooks"]) == 1


@ways
def test_a_hook_that_is_gone_in_the_backward(way: str) -> None:
    def run(way: str) -> list[Tensor | None]:
        torch.manual_seed(0)
        fs, gs = [mlp() for _ in range(2)], [mlp() for _ in range(2)]
        handle = fs[1].register_forward_hook(lambda m, args, kwargs, out: out * 2.0, with_kwargs=True)
        loss = loss_of((BUILD[way](fs, gs) if way in BUILD else Plain(fs, gs))(leaf(5, 8)))
        handle.remove()
        return list(torch.autograd.grad(loss, [*nn.ModuleList([*fs, *gs]).parameters()]))

    assert relative_error(run(way), run("plain")) < TOLERANCE


def _counts(f: Any, h: Tensor) -> Tensor:
    Item.value += 1
    vars(with_attribute)["v"] += 1
    return h * Item.value * with_attribute()


@ways
def test_what_f_counts_in_a_class_and_on_a_function_is_counted_once(way: str) -> None:
    want = gradients("plain", _counts, lambda f: None)
    counted = Item.value
    assert relative_error(gradients(way, _counts, lambda f: None), want) < TOLERANCE
    assert (way == "convert" or Item.value == counted) and Item.value == with_attribute()


def _makes(x: Tensor) -> Tensor:
    global LATER
    LATER = globals().get("LATER", 0) + 1
    owners: list[Any] = [Item, SETTINGS, with_attribute]
    for owner in owners:
        owner.later = getattr(owner, "later", 0) + 1
    return torch.tanh(x)


def test_names_that_f_makes_are_as_its_calls_in_the_forward_left_them() -> None:
    y = revfx.rev_block(leaf(5, 4), leaf(5, 4), _makes, torch.sin, 3)
    loss_of(y).backward()
    assert LATER == 3 and all(vars(o)["later"] == 3 for o in (Item, SETTINGS, with_attribute))


class Unlike(type):
    __hash__: Any = None

    def __eq__(cls, other: object) -> bool:
        return cls is other


class Shy:
    __module__: Any = None

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)


class Unmeasured(list[int]):
    def __len__(self) -> int:
        raise RuntimeError("how long?")


def _dead() -> Any:
    return weakref.proxy(Item())


STRANGE: dict[str, Callable[[], Any]] = {
    "dead proxy": _dead,
    "unhashable class": lambda: Unlike("C", (), {}),
    "of an unhashable class": lambda: Unlike("C", (), {})(),
    "raises when asked": Shy,
    "length that raises": Unmeasured,
    "scripted": lambda: torch.jit.script(nn.ReLU()),
}


@ways
@pytest.mark.filterwarnings("ignore::revfx.errors.RevfxWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("where", [lambda x: x, lambda x: [x], lambda x: {"a": (x,)}], ids=["itself", "list", "dict"])
@pytest.mark.parametrize("name", STRANGE)
def test_what_can_not_be_looked_at_does_no_harm(way: str, name: str, where: Callable[[Any], Any]) -> None:
    strange = where(STRANGE[name]())

    def use(f: Any, h: Tensor) -> Tensor:
        return h * (1.0 if strange is f else NUMBER)

    want = gradients("plain", use, _set("NUMBER", 2.0))
    assert relative_error(gradients(way, use, _set("NUMBER", 2.0)), want) < TOLERANCE


@ways
@pytest.mark.filterwarnings("ignore::revfx.errors.RevfxWarning")
@pytest.mark.parametrize("use", [lambda f, h: h + f.added(), lambda f, h: h * f.added()])
def test_a_tensor_that_a_method_reads_is_written(way: str, use: Callable[[Any, Tensor], Tensor]) -> None:
    with pytest.raises(RegenerationError, match="was modified in place"):
        gradients(way, use, lambda f: TENSOR.fill_(2.0))


# --- long containers
class Long(nn.Module):
    def __init__(self, words: int) -> None:
        super().__init__()
        self.words, self.items = {f"w{i}": i for i in range(words)}, [Item()]
        self.m = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.m(x) * self.items[0].own * len(self.words)


@pytest.mark.parametrize("words", [LONG, 2 * LONG, MOST - 1, MOST, 2 * MOST])
def test_long_containers_leave_room_for_others(words: int) -> None:
    found = reads_of(f := Long(words))
    noted = [id(c) for c, _ in found.contents]
    assert id(vars(f.items[0])) in noted and (id(f.words) in noted) == (words < MOST - LONG)


def test_the_longest_are_looked_at_last() -> None:
    item = Item()
    lists = [[*range(MOST // 2)], [*range(MOST // 3)], [[[item]]], [*range(MOST // 2)]]
    noted = [id(c) for c, _ in reads_of((torch.sin, lists)).contents]
    assert [id(x) in noted for x in lists] == [True, True, True, False] and id(vars(item)) in noted
    assert noted.index(id(vars(item))) < noted.index(id(lists[0]))


def test_a_block_whose_f_holds_many_words() -> None:
    def run(training: bool) -> Any:
        torch.manual_seed(0)
        f, g, x = Long(MOST // 2), mlp(), leaf(5, 4)
        y = revfx.rev_block(x, x * 2.0, f, g, is_training=training)
        f.items[0].own = 2.0
        f.words["w1"] = f.words.pop("w2")
        return torch.autograd.grad(loss_of(y), [x, *f.parameters(), *g.parameters()])

    assert relative_error(run(True), run(False)) < TOLERANCE


# --- code
def _approximately(x: Any) -> Any:
    return approx(x)


def test_installed_packages_are_not_looked_through_from_module_to_module() -> None:
    read = [id(table) for table, _ in reads_of(_approximately).names]
    assert read == [id(globals())] and approx.__globals__ is not globals()


def _scaled(k: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x * NUMBER * k


def test_the_code_of_so_many_functions_is_looked_at() -> None:
    functions = tuple(_scaled(k) for k in range(2 * CODES))
    assert len(reads_of((torch.sin, functions)).names) == CODES

"""What `convert` makes of the model's class and object: another view of the same model, by the class's own rules."""

from __future__ import annotations

import abc
import copy
import io
import types
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from helpers import kept_cuts, mlp
from steps import STEPS, assert_same_bits
from torch import Tensor, fx, nn

import revfx
from revfx.converted import conversion_of
from revfx.errors import RevfxError


pytestmark = pytest.mark.usefixtures("fp64")


class Net(nn.Module):
    """Three couplings, in training or not, as a method says that is bound when the model is made."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.fs, self.scale = nn.ModuleList(mlp(4) for _ in range(3)), scale
        self.step: Callable[[nn.Module, Tensor, Tensor], Tensor] = self.stepped
        self.seen: Callable[[], float] = lambda: self.scale

    def stepped(self, f: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        return b + (self.scale if self.training else 0.5) * f(a)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f in self.fs:
            a, b = self.step(f, a, b), a
        return torch.cat([a, b], -1) * self.seen()


def assert_alike(model: nn.Module, plain: nn.Module, exact: bool = True) -> None:
    """Both give the same, and the same gradients, in some steps."""
    for _ in range(STEPS):
        x = torch.randn(5, 8)
        found, expected = model(x), plain(x)
        assert torch.equal(found, expected)
        grads = torch.autograd.grad(found.sin().sum(), list(model.parameters()))
        wanted = torch.autograd.grad(expected.sin().sum(), list(plain.parameters()))
        if exact:
            assert_same_bits(grads, wanted)
        else:
            torch.testing.assert_close(grads, wanted)


def changed(model: Any) -> Any:
    model.eval()
    model.scale = 3.0
    return model


def patched() -> Net:
    model = Net()
    model.forward = types.MethodType(doubled, model)
    return model


def doubled(self: Net, x: Tensor) -> Tensor:
    return Net.forward(self, x) * 2.0


COPIES: dict[str, Callable[[Any], Any]] = {
    "itself": lambda model: model,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("make", [Net, patched])
def test_what_is_bound_to_the_model_sees_what_becomes_of_it(make: Callable[[], nn.Module], way: str) -> None:
    plain = make()
    model = revfx.convert(copy.deepcopy(plain))
    model(torch.randn(5, 8))
    model, plain = COPIES[way](model), COPIES[way](plain)
    assert_alike(model, plain)
    assert_alike(changed(model), changed(plain))
    assert kept_cuts(model) > 0


class Branches(nn.Module):
    """A model that reads what it computes, of whose sub-modules one has couplings."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale = Net(), 1.0
        self.by = self.scaled

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.by(self.net(x)) if float(x.detach().sum()) < 1e9 else x


def test_methods_of_a_model_that_reads_what_it_computes_see_what_becomes_of_it() -> None:
    plain: Any = Branches()
    model: Any = revfx.convert(copy.deepcopy(plain))
    for scale in (1.0, 3.0):
        plain.scale = model.scale = scale
        assert_alike(model, plain)
        assert kept_cuts(model) > 0


def test_the_model_and_its_conversion_have_one_state() -> None:
    plain: Any = Net()
    model: Any = revfx.convert(plain)
    plain.eval()
    assert not model.training
    model.other = 1
    assert plain.other == 1 and type(plain) is Net and type(plain).forward is Net.forward


def test_two_conversions_of_one_model_are_apart() -> None:
    plain = Net()
    model, rounding = revfx.convert(plain), revfx.convert(plain, exact=False)
    assert_alike(model, plain)
    assert_alike(rounding, plain, exact=False)
    assert conversion_of(model).options.exact and not conversion_of(rounding).options.exact
    assert conversion_of(model).coded_bytes > 0 == conversion_of(rounding).coded_bytes
    assert not hasattr(plain, "revfx")


def test_a_copy_goes_its_own_way() -> None:
    model: Any = revfx.convert(Net())
    twin = copy.copy(model)
    twin.scale = 5.0
    assert model.scale == 1.0 and twin.fs is model.fs


class Registered(nn.Module):
    """A class that notes what is derived from it, and wants to be told a key."""

    known: ClassVar[list[type]] = []

    def __init_subclass__(cls, key: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Registered.known.append(cls)


class Meta(type):
    """A metaclass that notes its classes."""

    known: ClassVar[list[type]] = []

    def __init__(cls, *args: Any) -> None:
        super().__init__(*args)
        Meta.known.append(cls)


class AbstractMeta(abc.ABCMeta):
    """Such a metaclass of abstract classes."""

    known: ClassVar[list[type]] = []

    def __new__(cls, *args: Any) -> Any:
        """A class, noted."""
        made = super().__new__(cls, *args)
        AbstractMeta.known.append(made)
        return made


class Keyed(Net, Registered, key="keyed"):
    """A registered model."""


class ByMeta(Net, metaclass=Meta):
    """A model that a metaclass knows."""


class Abstract(Net, metaclass=AbstractMeta):
    """A model that a metaclass of abstract classes knows."""


REGISTERED = [(Keyed, Registered.known), (ByMeta, Meta.known), (Abstract, AbstractMeta.known)]


@pytest.mark.parametrize("kind, known", REGISTERED)
def test_registries_of_classes_know_only_the_users(kind: type[Net], known: list[type]) -> None:
    plain = kind()
    model = revfx.convert(plain)
    assert known == [kind]
    assert isinstance(model, kind) and type(model).__name__ == kind.__name__
    assert not isinstance(plain, type(model))
    assert_alike(model, plain)


def test_what_the_class_makes_runs_plainly() -> None:
    model: Any = revfx.convert(Net())
    made = type(model)(2.0)
    x = torch.randn(5, 8)
    plain = Net(2.0)
    plain.load_state_dict(made.state_dict())
    assert torch.equal(made(x), plain(x))
    with pytest.raises(RevfxError, match="made by its class and not by `convert`; it runs plainly"):
        _ = made.revfx
    assert torch.equal(copy.deepcopy(made)(x), plain(x)) and repr(made) == repr(plain)
    layers: Any = revfx.convert(nn.Sequential(nn.Linear(8, 8), Net(), nn.Tanh()))
    assert torch.equal(layers[:2](x), layers[1](layers[0](x)))


class Slotted(Net):
    """A model with a slot."""

    __slots__ = ("factor",)

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "factor", 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


class ByState(Net):
    """A model that is copied by a state of its own."""

    def __getstate__(self) -> Any:
        return (vars(self),)

    def __setstate__(self, state: Any) -> None:
        vars(self).update(*state)


class Wrapper(nn.Module):
    """A model that looks up in another one what it has not got."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.tail = inner, mlp(8)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.inner(x))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "slot": Slotted,
    "state": ByState,
    "wrapper": lambda: Wrapper(revfx.convert(Net())),
    "traced": lambda: fx.symbolic_trace(Flat()),
}


class Flat(nn.Module):
    """Three couplings that can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        a = a + self.f(b)
        b = b + self.g(a)
        return torch.cat([a + self.f(b), b], -1)


@pytest.mark.parametrize("name", MODELS)
def test_classes_with_rules_of_their_own_are_converted_and_copied(name: str) -> None:
    plain = MODELS[name]()
    model = revfx.convert(plain)
    assert_alike(model, plain)
    if name != "slot":  # torch copies no modules with slots
        assert_alike(copy.deepcopy(model), plain)


@pytest.mark.filterwarnings("ignore::revfx.errors.RevfxWarning")
def test_pickled_models_are_converted_ones() -> None:
    for plain in (Flat(), fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8), nn.Tanh()))):
        model: Any = revfx.convert(plain, exact=False)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert conversion_of(loaded).options == conversion_of(model).options
        assert_alike(loaded, model, exact=False)

"""Python code of users around couplings: objects, tables, caches and lists that a forward makes, reads and writes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import kept_cuts
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node
from training import State, assert_same_state, assert_same_steps, state_of, twins
from zoo import D, mlp

import revfx
from revfx.errors import RevfxWarning
from revfx.plan import model


pytestmark = pytest.mark.usefixtures("fp64")
DEPTH = 4


def x_() -> Tensor:
    return torch.randn(6, 2 * D, requires_grad=True)


class Additive(nn.Module):
    """Couplings in the root's own code, around which sub-classes do something."""

    def __init__(self, make: Callable[[], nn.Module] = mlp) -> None:
        super().__init__()
        self.f, self.g = (nn.ModuleList(make() for _ in range(DEPTH)) for _ in range(2))

    def couplings(self, x: Tensor, *more: Any) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b, *more)
            b = b + g(a, *more)
        return torch.cat([a, b], -1)


def assert_one_plan(model: nn.Module, most: int = 2) -> None:
    """Raise unless the steps are plain's, by one plan that keeps so many cuts at `most`, without a warning."""
    converted, plain = twins(model)
    assert_same_steps(converted, plain, [x_()], steps=4)
    assert len(converted.revfx.plans) == 1 and 0 < kept_cuts(converted) <= most


class MakesEach(OrderedDict[str, Any]):
    """A table whose look-up makes a new object each time, as the one of the activations of transformers does."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)()


TABLE = MakesEach(tanh=nn.Tanh, gelu=nn.GELU)


class ReadsATable(Additive):
    kinds = TABLE

    def forward(self, x: Tensor) -> Tensor:
        return self.couplings(x) * (1 if "tanh" in TABLE else 2)


def test_table_with_a_look_up_of_its_own_is_left_as_it_is() -> None:
    assert_one_plan(ReadsATable())
    assert type(TABLE["gelu"]) is nn.GELU and list(TABLE) == ["tanh", "gelu"]


class Outputs(OrderedDict[str, Tensor]):
    """What a model of the transformers library returns: a dict whose items are attributes and numbered as well."""

    def __getitem__(self, key: Any) -> Tensor:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)

    @property
    def hidden(self) -> Tensor:
        return self["hidden"]

    @property
    def pooled(self) -> Tensor:
        return self["pooled"]


register_pytree_node(
    Outputs, lambda o: ([*o.values()], [*o]), lambda values, keys: Outputs(zip(keys, values, strict=True))
)


class Doubles(nn.Module):
    """An embedding, say, that returns more than one thing in a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * D, 2 * D)

    def forward(self, x: Tensor) -> Outputs:
        y = self.linear(x)
        return Outputs(hidden=y, pooled=y.mean())


class ReadsOutputs(Additive):
    def __init__(self) -> None:
        super().__init__()
        self.first = Doubles()
        self.first.register_forward_hook(lambda *_: None)  # so it stays whole

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.first(x)
        return self.couplings(outputs.hidden) + outputs[1]


def test_sub_module_that_returns_a_dict_of_another_class() -> None:
    assert_one_plan(ReadsOutputs(), most=5)


class PassesOutputsOn(Additive):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Doubles(), Reads()

    def forward(self, x: Tensor) -> Tensor:
        y = self.couplings(x)
        return self.last(self.first(y))


class Reads(nn.Module):
    def forward(self, outputs: Outputs) -> Tensor:
        return outputs.hidden * outputs.pooled


def test_dict_of_another_class_that_is_passed_on_reaches_the_sub_module_as_it_is() -> None:
    assert_one_plan(PassesOutputsOn(), most=5)


class MakesItsLoss(Additive):
    def forward(self, x: Tensor) -> Tensor:
        y = self.couplings(x)
        return nn.MSELoss()(y, torch.zeros_like(y)) + nn.L1Loss(reduction="sum")(y, torch.ones_like(y))


def test_loss_module_made_in_the_forward() -> None:
    assert_one_plan(MakesItsLoss(), most=5)  # the outputs as well, which the losses read


@dataclass
class Cache:
    """What sub-modules leave for each other, as transformers' caches of keys and values."""

    number: int = 0


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        if callable(cache):
            return self.inner(x) + cache()
        cache.number += 1
        return self.inner(x) * cache.number


class MakesACache(Additive):
    def forward(self, x: Tensor) -> Tensor:
        return self.couplings(x, Cache())


class PassesAClosure(Additive):
    def forward(self, x: Tensor) -> Tensor:
        total = x.sum()
        return self.couplings(x, lambda: total)


class MakesAnObject(Additive):
    def forward(self, x: Tensor) -> Tensor:
        return self.couplings(x, Reader(x.sum()))


class Reader:
    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __call__(self) -> Tensor:
        return self.value


@pytest.mark.parametrize("kind", [MakesACache, MakesAnObject, PassesAClosure])
def test_object_that_the_forward_makes_and_passes_on_is_made_at_every_call(kind: Any) -> None:
    assert_one_plan(kind(Counts))


class Keys:
    """A cache as those of language models: a list of layers, each with the tensors that it was given."""

    def __init__(self) -> None:
        self.layers: list[dict[str, Tensor]] = []
        self.kind = "dynamic"


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor, cache: Keys) -> Tensor:
        cache.layers.append({"keys": x.cos()})
        return self.inner(x) + cache.layers[-1]["keys"]


class ReturnsACache(Additive):
    def forward(self, x: Tensor) -> Any:
        cache = Keys()
        return self.couplings(x, cache), cache


def test_object_that_the_forward_makes_and_returns_holds_the_tensors_of_its_call() -> None:
    converted, model = twins(ReturnsACache(Attends))
    caches = list[Keys]()
    for _ in range(4):
        states: list[State] = []
        for m, x in zip((converted, model), _same(x_()), strict=True):
            m.zero_grad()
            y, cache = m(x)
            assert type(cache) is Keys and cache.kind == "dynamic"
            (y.sin().sum() + cache.layers[1]["keys"].sum()).backward()
            keys = {f"keys {i}": layer["keys"].detach() for i, layer in enumerate(cache.layers)}
            states.append(state_of(m) | keys | {"x": x.grad, "y": y.detach()})
            caches.append(cache)
        assert_same_state(*states)
    assert len({id(c.layers) for c in caches}) == 8 and converted.revfx.regions


def _same(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x.detach().clone().requires_grad_()


class Collects(Additive):
    def forward(self, x: Tensor, into: Any) -> Tensor:
        y = self.couplings(x)
        if isinstance(into, Cache):
            into.number += 1
        else:
            into.append(y)
        return y


@pytest.mark.parametrize("into", [Cache(), []], ids=["object", "list"])
def test_argument_that_the_forward_writes_to_is_written_to_once(into: Any) -> None:
    converted, plain = twins(Collects())
    for step in range(1, 5):
        x = x_()
        for m, given in ((converted, into), (plain, Cache())):
            m.zero_grad()
            y = m(x, given)
            y.sin().sum().backward()
            if given is into:
                assert into == Cache(step) if isinstance(into, Cache) else len(into) == step and into[-1] is y
        assert_same_state(state_of(converted), state_of(plain))
    assert kept_cuts(converted) == 2 or isinstance(into, list)


class Trainer:
    """What hangs itself on a model and changes at every step."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.step = [model], 0


class Trained(Additive):
    def __init__(self, reads: str = "") -> None:
        super().__init__()
        self.reads = reads
        self.trainer: Any = Trainer(self)
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        step = 1
        if self.reads:
            step = getattr(self, self.reads[::-1]).step if self.reads != "vars" else vars(self)["trainer"].step
        return self.couplings(x) * step


@pytest.mark.parametrize("reads", ["", "reniart", "vars"])
def test_object_on_the_model_that_changes_in_each_step_is_read_in_each_call(reads: str) -> None:
    model = Trained(reads)
    converted: Any = revfx.convert(model)
    for _ in range(5):
        model.trainer.step += 1
        model.losses.append(1.0)
        assert_same_steps(converted, model, [x_()], steps=1)
    assert len(converted.revfx.plans) == 1 and kept_cuts(converted) == 2


class Logs(Additive):
    def __init__(self) -> None:
        super().__init__()
        self.trainer = Trainer(self)
        self.trainer.results = {"loss": []}  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        y = self.couplings(x)
        self.trainer.results["loss"].append(y.sum())  # type: ignore[attr-defined]
        return y


def test_object_on_the_model_that_the_forward_writes_to_is_written_to_once_per_call() -> None:
    model = Logs()
    converted: Any = revfx.convert(model)
    sums: list[Tensor] = []
    for _ in range(4):
        y = converted(x_())
        y.sin().sum().backward()
        sums.append(y.sum())
    logged = model.trainer.results["loss"]  # type: ignore[attr-defined]
    assert len(logged) == 4 and all(torch.equal(a, b) for a, b in zip(logged, sums, strict=True))
    assert kept_cuts(converted) == 2


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = mlp(), list[int]()

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :D] + self.inner(x[:, :D])


def test_couplings_are_searched_for_twice_at_most_while_lists_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[int] = []
    find = model.find_couplings
    monkeypatch.setattr(model, "find_couplings", lambda *a: (searches.append(1), find(*a))[1])
    plain = Residual()
    converted = revfx.convert(plain)
    with pytest.warns(RevfxWarning, match="computed from itself"):
        for _ in range(4):
            assert_same_steps(converted, plain, [x_()], steps=1)
            plain.calls.append(1)
    assert len(searches) <= 2

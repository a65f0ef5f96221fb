"""A converted model is the user's model: its interface, its state, and when its plan is made again."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from helpers import kept_cuts, relative_error
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import Additive, CatSplit, D, Pairs, TwoStages, mlp

import revfx
from revfx.converted import conversion_of
from revfx.errors import NotReversibleError, RevfxWarning
from revfx.testing import assert_same_grads, gradients, store_activations


def _x(n: int = 6) -> Tensor:
    return torch.randn(n, 2 * D, requires_grad=True)


def test_state_dict_parameters_and_signature_are_the_models_own() -> None:
    model = TwoStages(2)
    converted = revfx.convert(model)
    assert isinstance(converted, TwoStages)
    assert list(converted.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(converted.parameters(), model.parameters(), strict=True))
    assert inspect.signature(converted.forward) == inspect.signature(model.forward)
    other = TwoStages(2)
    converted.load_state_dict(other.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    other.load_state_dict(converted.state_dict())


def test_class_goes_by_the_name_of_the_models_own_class() -> None:
    """Which is what checkpoints name it by, and what registries look it up by."""
    model = Additive(2)
    converted = revfx.convert(model)
    assert type(converted) is not Additive and isinstance(converted, Additive)
    assert str(type(converted)) == str(Additive) and type(converted).__name__ == "Additive"


def test_train_and_eval_reach_every_part_and_make_a_plan_each() -> None:
    converted: Any = revfx.convert(Additive(3))
    converted(_x())
    assert not converted.eval().f[0].training
    converted(_x())
    assert len(converted.revfx.plans) == 2
    assert converted.train().f[0].training
    converted(_x())
    assert len(converted.revfx.plans) == 2


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_converted_models_of_their_own(how: str, fp64: None) -> None:
    converted: Any = revfx.convert(Additive(3))
    converted(_x())
    if how == "deepcopy":
        other = copy.deepcopy(converted)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(converted))
    else:
        buffer = io.BytesIO()
        torch.save(converted, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert type(other) is type(converted) and other.revfx.plans == ()
    assert all(
        a is not b and torch.equal(a, b) for a, b in zip(other.parameters(), converted.parameters(), strict=True)
    )
    assert_same_grads(other, converted, [_x()])
    assert len(other.revfx.plans) == 1


def test_checkpoint_of_a_converted_model_loads_with_weights_only() -> None:
    buffer = io.BytesIO()
    torch.save(revfx.convert(Additive(2)).state_dict(), buffer)
    buffer.seek(0)
    Additive(2).load_state_dict(torch.load(buffer, weights_only=True))


def test_hooks_on_the_root_run_once_per_call(fp64: None) -> None:
    model = Additive(3)
    converted = revfx.convert(model)
    seen: list[str] = []
    converted.register_forward_pre_hook(lambda *_: seen.append("pre"))
    converted.register_forward_hook(lambda *_: seen.append("post"))
    converted.register_full_backward_hook(lambda *_: seen.append("back"))
    converted(_x()).sum().backward()
    assert seen == ["pre", "post", "back"]


def test_hook_put_on_an_opened_block_later_runs_and_the_plan_is_made_again(fp64: None) -> None:
    converted: Any = revfx.convert(CatSplit(3))
    converted(_x())
    assert sum(len(s.region.steps) for s in conversion_of(converted).plans[0].segments if s.region) > 6
    seen: list[int] = []
    converted.blocks[1].register_forward_hook(lambda *_: seen.append(1))
    converted(_x())
    assert seen == [1]
    assert any("has hooks" in str(r) for r in converted.revfx.refusals)


def test_print_shows_the_model_and_the_view_shows_the_program() -> None:
    model = Additive(2)
    converted: Any = revfx.convert(model)
    assert "no plan yet" in str(converted.revfx)
    converted(_x())
    assert repr(converted) == repr(model)
    text = str(converted.revfx)
    assert "# region" in text and "invert float32[6, 16]" in text and "self.f.0(" in text


def test_the_view_is_frozen_data_of_now() -> None:
    converted: Any = revfx.convert(Additive(2))
    before = converted.revfx
    converted(_x())
    found = converted.revfx
    assert before.plans == () and before.regions == ()
    (plan,), (region,) = found.plans, found.regions
    assert plan.regions == (region,) and plan.program == found.program and found.refusals == ()
    assert (region.steps, region.inverted, region.kept_cuts) == (5, 4, 2)
    assert all(place.rpartition(":")[0].endswith("zoo.py") for place in region.where)
    for name in ("plans", "regions", "refusals", "program"):
        with pytest.raises(AttributeError):
            setattr(found, name, ())


def test_plan_is_made_once_per_shape_and_grad_state() -> None:
    converted: Any = revfx.convert(Additive(2))
    for _ in range(2):
        for x in (_x(), _x(4), _x().detach(), _x().double().detach().float().requires_grad_()):
            converted(x)
    assert len(converted.revfx.plans) == 3
    with torch.no_grad():
        converted(_x(7))
    assert len(converted.revfx.plans) == 3


class Options(Pairs):
    """Its Python code reads attributes, arguments and the training flag."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.use, self.scales = depth, [1.0] * depth

    def forward(
        self, x: Tensor, scale: float = 1.0, *, extra: dict[str, Tensor] | None = None, **more: Tensor
    ) -> dict[str, Any]:
        a, b = x.chunk(2, -1)
        for f, g, s in list(zip(self.f, self.g, self.scales, strict=True))[: self.use]:
            a = a + s * f(b)
            b = b + scale * g(a)
        if extra is not None:
            a = a + extra["bias"]
        for t in more.values():
            b = b + t
        return {"out": torch.cat([a, b], -1), "shape": (len(x), x.shape[-1]), "none": None}


def test_python_code_sees_changed_attributes_and_arguments(fp64: None) -> None:
    model = Options(4)
    converted: Any = revfx.convert(model)
    x, bias = _x(), torch.randn(D, requires_grad=True)

    def check(*args: Any, **kwargs: Any) -> None:
        got, want = converted(*args, **kwargs), model(*args, **kwargs)
        assert got.keys() == want.keys() and got["shape"] == want["shape"] and got["none"] is None
        assert torch.equal(got["out"], want["out"])
        mine = torch.autograd.grad(got["out"].sin().sum(), [x, *model.parameters()], allow_unused=True)
        theirs = torch.autograd.grad(want["out"].sin().sum(), [x, *model.parameters()], allow_unused=True)
        for g, w in zip(mine, theirs, strict=True):
            assert (g is None) == (w is None)
            assert g is None or w is None or torch.allclose(g, w, rtol=1e-9, atol=1e-12)

    check(x)
    check(x, 2.0)
    check(x, scale=3.0, extra={"bias": bias}, another=bias, third=bias * 2)
    model.use = converted.use = 3
    check(x)
    model.scales[1] = 0.5  # the list is shared
    check(x)
    assert len(converted.revfx.plans) == 5


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Additive(3), Additive(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x) if x.sum() > 0 else self.second(-x)


def test_root_that_depends_on_values_has_its_parts_converted(fp64: None) -> None:
    model = DataDependent()
    converted: Any = revfx.convert(model)
    with pytest.warns(RevfxWarning, match="depends on the values of a tensor"):
        converted(_x())
    (refusal,) = converted.revfx.refusals
    assert refusal.where.startswith(f"{__file__}:")
    for _ in range(3):
        assert_same_grads(converted, model, [_x()])
    assert converted.first.revfx.plans[0].regions and converted.second.revfx.plans[0].regions
    assert list(converted.state_dict()) == list(model.state_dict())
    other = copy.deepcopy(converted)
    with pytest.warns(RevfxWarning):
        assert_same_grads(other, model, [_x()])


class CountsCalls(Pairs):
    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            b = b + g(a)
        return torch.cat([a, b], -1)


def test_python_side_effects_of_the_root_are_never_lost() -> None:
    converted: Any = revfx.convert(CountsCalls(3))
    with pytest.warns(RevfxWarning, match=r"(?s)can't be recorded.*sets `CountsCalls\.calls`.* memory=0\.5\)"):
        converted(_x())
    converted(_x())
    converted(_x())
    assert converted.calls == 3


class SkipsAtRandom(Pairs):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            if random.random() < 0.5:
                a = a + f(b)
                b = b + g(a)
        return torch.cat([a, b], -1)


def test_draws_from_pythons_random_are_never_baked_in() -> None:
    model = SkipsAtRandom(4)
    converted: Any = revfx.convert(model)
    x = _x()
    with pytest.warns(RevfxWarning, match="random"):
        converted(x)
    random.seed(3)
    got = [converted(x) for _ in range(4)]
    random.seed(3)
    assert all(torch.equal(g, model(x)) for g in got)


OWN = torch.Generator()
DRAWS: dict[str, Callable[[], Any]] = {
    "Python's `random`": random.random,
    "`numpy.random`": lambda: float(numpy.random.rand()),
    "a generator of its own": lambda: torch.rand((), generator=OWN),
}


class ScalesAtRandom(nn.Module):
    def __init__(self, draw: Callable[[], Any] | None) -> None:
        super().__init__()
        self.inner, self.draw = mlp(), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if self.draw is None else self.inner(x) * (0.5 + self.draw())


def _seed() -> None:
    random.seed(3)
    numpy.random.seed(3)
    OWN.manual_seed(3)


@pytest.mark.parametrize("generator", DRAWS)
def test_function_that_draws_from_a_generator_that_is_not_put_back_lies_in_no_region(generator: str) -> None:
    model = Additive(24)
    for number in range(24):
        model.f[number] = ScalesAtRandom(DRAWS[generator] if number == 12 else None)
    converted: Any = revfx.convert(model)
    x = _x()
    _seed()
    expected = [*gradients(model, [x]).values()]
    _seed()
    assert relative_error([*gradients(converted, [x]).values()], expected) < 1e-4
    assert [len(p.regions) for p in converted.revfx.plans] == [2]
    assert any(f"it draws from {generator}, whose state is not tracked" in r.detail for r in converted.revfx.refusals)
    with pytest.raises(NotReversibleError, match="draws from"):
        revfx.convert(model, strict=True)(_x())


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 3


class Contexts(Pairs):
    """Grad mode, autocast, a custom function, noise and a detached branch in the root's own code."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            with torch.no_grad():
                c = torch.tanh(b)
            a = a + f(b) * 0.5 + c
            b = b + g(Straight.apply(a)) + 0.1 * F.dropout(a, 0.5) * torch.rand_like(a) + a.detach()
        return torch.cat([a, b], -1)


def test_contexts_custom_functions_and_noise_in_the_root(fp64: None) -> None:
    model = Contexts(3)
    converted: Any = revfx.convert(model)
    assert_same_grads(converted, model, [_x()])
    assert converted.revfx.plans[0].regions
    torch.manual_seed(5)
    got, after = converted(_x()), torch.get_rng_state()
    got.sum().backward()
    assert torch.equal(torch.get_rng_state(), after)


class ReadsAGlobal(Pairs):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a + self.f[0](b) * TABLE["scale"], b], -1)


TABLE = {"scale": torch.tensor(2.0)}


def test_tensor_that_is_nowhere_registered_is_refused() -> None:
    converted = revfx.convert(ReadsAGlobal(1))
    with pytest.warns(RevfxWarning, match="register_buffer"):
        converted(_x())
    TABLE["scale"] = torch.tensor(3.0)
    x = _x()
    assert torch.equal(converted(x), ReadsAGlobal.forward(converted, x))  # type: ignore[arg-type]
    TABLE["scale"] = torch.tensor(2.0)


def test_permutation_that_changes_is_read_again(fp64: None) -> None:
    from zoo import ChannelShuffle

    model = ChannelShuffle(4)
    converted: Any = revfx.convert(model)
    assert_same_grads(converted, model, [_x()])
    model.order.copy_(torch.randperm(2 * D))
    assert_same_grads(converted, model, [_x()])
    model.order[0] = model.order[1]
    assert_same_grads(converted, model, [_x()])
    assert len(converted.revfx.plans) == 3


def test_strict_and_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"takes an nn\.Module, not a function"):
        revfx.convert(lambda x: x)  # type: ignore[arg-type]
    for wrong in (0, 23, 1.5, "yes"):
        with pytest.raises(TypeError, match=r"`exact=.*` must be True \(lossless\) or False"):
            revfx.convert(mlp(), exact=wrong)  # type: ignore[arg-type]
    for budget in ("1MiB", 0.5, 2**20):
        with pytest.raises(TypeError, match="positional argument"):
            revfx.convert(mlp(), budget)  # type: ignore[misc]
    with pytest.raises(revfx.NotReversibleError, match="left as it was"):
        revfx.convert(mlp(), strict=True)(torch.randn(2, D))
    converted = revfx.convert(Additive(2))
    assert revfx.convert(converted) is converted


def test_strict_passes_a_model_that_is_reversible_throughout() -> None:
    revfx.convert(Additive(3), strict=True)(_x()).sum().backward()


def test_store_activations_gives_the_same_forward(fp64: None) -> None:
    converted = revfx.convert(Additive(3))
    x = _x()
    with store_activations():
        stored = converted(x)
    assert torch.equal(stored, converted(x))


def test_two_calls_before_one_backward_and_recursion(fp64: None) -> None:
    model = Additive(3)
    converted = revfx.convert(model)

    def twice(m: nn.Module) -> list[Tensor]:
        x = torch.ones(4, 2 * D, requires_grad=True)
        loss = (m(m(x)) * m(x.sin())).sum()
        return list(torch.autograd.grad(loss, [x, *model.parameters()]))

    for g, w in zip(twice(converted), twice(model), strict=True):
        assert torch.allclose(g, w, rtol=1e-9, atol=1e-12)


class Reconstructs(nn.Module):
    """Couplings between operations that have no inverse, and a loss that reads the model's input as its target."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(2 * D, 2 * D), nn.ReLU())
        self.couplings, self.decode = Additive(4), nn.Linear(2 * D, 2 * D)

    def forward(self, x: Tensor) -> Tensor:
        y = self.decode(self.couplings(self.encode(x)).relu())
        return F.mse_loss(y[:, 1:], x[:, :-1])


def test_input_that_is_also_the_target_is_not_what_the_region_is_run_again_from(fp64: None) -> None:
    model = Reconstructs()
    converted: Any = revfx.convert(model)
    assert_same_grads(converted, model, [_x()])
    (plan,) = conversion_of(converted).plans
    (region,) = plan.regions.values()
    assert len(region.region.steps) >= 8 and kept_cuts(converted) == 2

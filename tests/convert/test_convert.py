"""A converted model is the user's model: its interface, its state, and when its plan is made again."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from helpers import kept_cuts, regions_of
from steps import STEPS, assert_same_bits
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import Additive, CatSplit, D, TwoStages, mlp

import revfx
from revfx.testing import assert_same_grads, store_activations


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
    for _ in range(STEPS):
        assert_same_grads(other, converted, [_x()])
    assert len(other.revfx.plans) == 1 and kept_cuts(other) == 2


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
    for _ in range(STEPS):
        seen.clear()
        converted(_x()).sum().backward()
        assert seen == ["pre", "post", "back"]


def test_hook_put_on_a_block_later_runs_once_per_call(fp64: None) -> None:
    model = CatSplit(3)
    converted: Any = revfx.convert(model)
    for _ in range(STEPS):
        converted(_x())
    assert sum(len(region.steps) for region in regions_of(converted)) > 6
    seen: list[int] = []

    def scale(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(1)
        return output * 0.5

    model.blocks[1].register_forward_hook(scale)
    for _ in range(STEPS):
        seen.clear()
        assert_same_grads(converted, model, [_x()])
        assert seen == [1, 1]


def test_print_shows_the_model_and_the_view_shows_the_program() -> None:
    model = Additive(2)
    converted: Any = revfx.convert(model)
    assert "no plan yet" in str(converted.revfx)
    converted(_x())
    assert repr(converted) == repr(model)
    text = str(converted.revfx)
    assert "# region" in text and "invert float32[6, 16]" in text and "= addmm(" in text


def test_the_view_is_frozen_data_of_now() -> None:
    converted: Any = revfx.convert(Additive(2))
    before = converted.revfx
    for _ in range(2):  # the first call keeps nothing of a plan
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


def test_plan_is_made_once_per_kind_of_call() -> None:
    converted: Any = revfx.convert(Additive(2))
    for _ in range(2):
        for x in (_x(), _x(4), _x(5).detach(), _x(3)[None].detach()):
            converted(x)
    assert len(converted.revfx.plans) == 3, "not one per shape"
    with torch.no_grad():
        converted(_x(7))
    assert len(converted.revfx.plans) == 3
    with torch.autocast("cpu", torch.bfloat16):
        converted(_x())
    converted.eval()(_x())
    assert len(converted.revfx.plans) == 5


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
    for _ in range(STEPS):
        assert torch.equal(stored, converted(x))


def test_two_calls_before_one_backward_and_recursion(fp64: None) -> None:
    model = Additive(3)
    converted = revfx.convert(model)

    def twice(m: nn.Module) -> list[Tensor]:
        x = torch.ones(4, 2 * D, requires_grad=True)
        loss = (m(m(x)) * m(x.sin())).sum()
        return list(torch.autograd.grad(loss, [x, *model.parameters()]))

    for _ in range(STEPS):
        assert_same_bits(twice(converted), twice(model))


class Reconstructs(nn.Module):
    """Couplings between operations that have no inverse, and a loss that reads the model's input as its target."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(2 * D, 2 * D), nn.ReLU())
        self.couplings, self.decode = Additive(4), nn.Linear(2 * D, 2 * D)

    def forward(self, x: Tensor) -> Tensor:
        y = self.decode(self.couplings(self.encode(x)).relu())
        return F.mse_loss(y[:, 1:], x[:, :-1])


def test_input_that_is_also_the_target_is_no_source_of_a_replay(fp64: None) -> None:
    model = Reconstructs()
    converted: Any = revfx.convert(model)
    for _ in range(STEPS):
        assert_same_grads(converted, model, [_x()])
    (region,) = regions_of(converted)
    assert len(region.steps) >= 8 and kept_cuts(converted) == 2

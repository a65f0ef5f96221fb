"""`RevBlock` as a module: its layers, its state and copies of it."""

# pyright: reportUnknownLambdaType=false
from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from helpers import (
    assert_steps,
    fp64 as fp64,
    leaf,
    lines,
    loss_of,
    mlp,
    outcome,
)  # fmt: skip
from torch import Tensor, nn

from revfx import RevBlock


def make_mlp() -> nn.Sequential:
    return mlp()


class Kernel(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)


@pytest.mark.parametrize("f", [Kernel, make_mlp, mlp, lambda: mlp()], ids=["class", "function", "defaults", "lambda"])
def test_a_factory_makes_new_weights_for_each_layer(f: Any) -> None:
    module = RevBlock(f, f, 3)
    parameters = list(module.parameters())
    assert len({id(p) for p in parameters}) == len(parameters) == 6 * len(list(f().parameters()))
    weights = [p for p in parameters if p.dim() == 2]
    assert not any(torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


def test_a_module_is_used_in_the_first_layer_and_copied_with_new_weights_for_the_others() -> None:
    f: Any = mlp()
    before: dict[str, Tensor] = copy.deepcopy(f.state_dict())
    module = RevBlock(f, mlp, 3)
    assert module.f[0] is f and all(torch.equal(v, before[k]) for k, v in f.state_dict().items())
    assert not torch.equal(module.f[1][0].weight, f[0].weight)
    assert not torch.equal(module.f[2][0].weight, module.f[1][0].weight)


def test_a_sequence_is_used_as_it_is_and_a_function_in_every_layer() -> None:
    shared = mlp()
    module = RevBlock([shared, shared], torch.sin, 2)
    assert module.f[0] is shared and module.f[1] is shared
    assert len(list(module.parameters())) == 4
    inputs = [leaf(3, 4), leaf(3, 4)]
    expected = outcome(lines([shared] * 2, [torch.sin] * 2), inputs, module)
    assert_steps(module, expected, inputs, module)


def test_state_dict_keys_are_those_of_the_functions_by_layer() -> None:
    module = RevBlock(Kernel, lambda: nn.BatchNorm1d(4), 2)
    names = [f"{n}.{i}.{k}" for n in "fg" for i in range(2) for k in ("weight", "bias")]
    names += [f"g.{i}.{k}" for i in range(2) for k in ("running_mean", "running_var", "num_batches_tracked")]
    assert sorted(module.state_dict()) == sorted(names)
    other = RevBlock(Kernel, lambda: nn.BatchNorm1d(4), 2)
    other.load_state_dict(module.state_dict())
    x = leaf(3, 4)
    assert all(torch.equal(a, b) for a, b in zip(module(x, x), other(x, x), strict=True))
    assert "num_layers=2" in repr(module)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("after_use", [False, True])
def test_copies_of_a_block_compute_the_same_and_share_nothing(how: str, after_use: bool) -> None:
    module = RevBlock(Kernel, make_mlp, 2)
    x = leaf(3, 4)
    if after_use:
        loss_of(module(x, x)).backward()
        x.grad = None
        module.zero_grad()
    if how == "deepcopy":
        twin = copy.deepcopy(module)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    else:
        stream = io.BytesIO()
        torch.save(module, stream)
        twin = torch.load(io.BytesIO(stream.getvalue()), weights_only=False)
    assert not {id(p) for p in module.parameters()} & {id(p) for p in twin.parameters()}
    expected = outcome(lambda x: module(x, x), [x], module)
    assert_steps(lambda x: twin(x, x), expected, [x], twin)


def test_train_eval_and_to_reach_the_functions() -> None:
    module = RevBlock(lambda: nn.Sequential(mlp(), nn.Dropout(0.5)), mlp, 2).eval()
    x = leaf(3, 4)
    assert all(not m.training for m in module.modules())
    assert all(torch.equal(a, b) for a, b in zip(module(x, x), module(x, x), strict=True))
    assert {p.dtype for p in module.float().parameters()} == {torch.float32}

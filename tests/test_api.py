"""The public names: each is there, with the parameters that are promised."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
from torch import nn

import revfx


SIGNATURES = {
    "convert": "(model, *, memory=None, compile=False, exact=True, strict=False)",
    "rev_block": (
        "(x1, x2, f, g, num_layers=1, f_side_input=None, g_side_input=None, is_training=True, *, exact=True)"
    ),
    "RevBlock": "(f, g, num_layers=1, *, exact=True)",
    "RevBlock.forward": "(self, x1, x2, f_side_input=None, g_side_input=None)",
    "RevBlock.inverse": "(self, y1, y2, f_side_input=None, g_side_input=None)",
    "inverse": "(model, args, kwargs=None)",
    "explain": "(model, args=(), kwargs=None, *, memory=None, backend=None, measure=False, loss=None)",
    "ReversiblePartitioner": "(*, strict=False)",
    "register_inverse": "(*ops, by=None)",
    "testing.assert_same_grads": "(model, reference, args, kwargs=None, *, loss=None, rtol=None, seed=0)",
    "testing.check_inverse": "(target, args, kwargs=None, *, rtol=None)",
    "testing.measure_memory": "(step, *, device='cpu', warm_up=True)",
    "testing.store_activations": "()",
    "debug.check_regeneration": "(rtol=None)",
    "NotReversibleError": "(reason, node=None, refusals=())",
    "BudgetError": "(text, least, asked)",
}
ERRORS = {"RevfxError", "NotReversibleError", "BudgetError", "RegenerationError"}
WARNINGS = {"RevfxWarning", "NotConvertedWarning", "NondeterminismWarning", "BudgetWarning"}


def found(name: str) -> Any:
    """A public name, such as `RevBlock.inverse`."""
    value: Any = revfx
    for part in name.split("."):
        value = getattr(value, part)
    return value


def parameters(function: Any) -> str:
    """The signature without annotations."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    assert parameters(found(name)) == SIGNATURES[name]


def test_all_errors_and_warnings_are_in_the_namespace() -> None:
    assert all(issubclass(found(name), revfx.RevfxError) for name in ERRORS)
    assert all(issubclass(found(name), revfx.RevfxWarning) for name in WARNINGS)
    assert issubclass(revfx.RevfxError, RuntimeError) and issubclass(revfx.RevfxWarning, UserWarning)


def test_public_names_are_these() -> None:
    public = {name for name in dir(revfx) if not name.startswith("_")}
    public -= {name for name in public if inspect.ismodule(getattr(revfx, name))} - {"debug", "testing"}
    top = {name.partition(".")[0] for name in SIGNATURES}
    assert public - {"annotations"} == top | ERRORS | WARNINGS | {"Explanation"}


def test_the_backend_is_found_by_its_name() -> None:
    assert "revfx" in torch.compiler.list_backends()
    backend = importlib.import_module("revfx.compiled.backend").revfx
    assert parameters(backend) == "(gm, example_inputs, *, mode=None, options=None)"


@pytest.mark.parametrize("wrong", ["1MiB", 0.5, (torch.zeros(2),), torch.zeros(2)])
def test_options_of_convert_are_given_by_name(wrong: Any) -> None:
    with pytest.raises(TypeError, match="positional argument"):
        revfx.convert(nn.Linear(2, 2), wrong)  # type: ignore[misc]

"""Kinds of refusals with their remedies, the messages that list them, and the place of a warning."""

from __future__ import annotations

import ast
import dataclasses
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import revfx
from revfx.errors import Cause, NotReversibleError, Reason, Refusal, is_users, list_refusals, warn


SOURCES = Path(__file__).parent.parent


def test_every_kind_has_a_meaning_and_a_remedy_of_its_own() -> None:
    assert 8 <= len(Reason) <= 16
    assert len({kind.meaning for kind in Reason}) == len({kind.remedy for kind in Reason}) == len(Reason)
    assert all(kind.meaning and kind.remedy and "checkpoint" not in kind.remedy for kind in Reason)


@pytest.mark.parametrize("kind", [Reason.NO_COUPLING, Reason.NON_INVERTIBLE, Reason.DATA_DEPENDENT])
def test_remedy_names_a_budget_where_nothing_reversible_can_be_found(kind: Reason) -> None:
    assert "`revfx.convert(model, memory=0.5)`" in kind.remedy


def test_refusal_is_frozen_and_reads_as_place_operation_and_reason() -> None:
    refusal = Cause(Reason.NO_COUPLING, "`x` needs itself").to_refusal("add", "m.py:3", "linear")
    assert refusal == Refusal(Reason.NO_COUPLING, ("add", "linear"), "m.py:3", "`x` needs itself")
    assert str(refusal) == "m.py:3: `add`: `x` needs itself"
    assert str(Refusal(Reason.NO_RULE, ("f",), "")) == "unknown place: `f`: the operation has no inverse rule"
    with pytest.raises(dataclasses.FrozenInstanceError):
        refusal.kind = Reason.NO_RULE  # type: ignore[misc]


def test_list_of_refusals_ends_with_the_remedy_of_each_kind_once() -> None:
    refusals = [Refusal(Reason.NO_COUPLING, ("add",), f"m.py:{i}", "") for i in range(20)]
    text = list_refusals([*refusals[:2], Refusal(Reason.NO_RULE, ("f",), "m.py:9"), *refusals[2:]])
    assert text.count("m.py:") == 8 and text.count("What to do: ") == 2
    assert text.endswith(f"What to do: {Reason.NO_RULE.remedy}.")


def test_error_carries_the_refusals() -> None:
    refusal = Refusal(Reason.NO_RULE, ("f",), "m.py:9")
    assert NotReversibleError("no").refusals == ()
    assert NotReversibleError("no", "f", (refusal,)).refusals == (refusal,)


# --- warnings
def test_warning_points_at_the_line_of_the_user() -> None:
    converted = revfx.convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        converted(torch.randn(2, 4, requires_grad=True))
    (found,) = caught
    assert found.category is revfx.NotConvertedWarning and found.filename == __file__
    assert "converted(torch.randn" in Path(__file__).read_text().splitlines()[found.lineno - 1]
    assert "nothing reversible was found" in str(found.message) and "What to do: " in str(found.message)


def test_warning_is_shown_once_for_a_line() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            warn("once", revfx.BudgetWarning)
        warn("once", revfx.BudgetWarning)
    assert [w.filename for w in caught] == [__file__, __file__] and caught[0].lineno != caught[1].lineno


def test_files_of_torch_and_of_revfx_are_not_the_user_s() -> None:
    assert not is_users(nn.__file__) and not is_users(revfx.__file__) and not is_users("<eval_with_key>.1")
    assert is_users(__file__) and is_users(str(Path(revfx.__file__).parent) + "_model.py")


def test_every_warning_of_the_package_goes_through_warn() -> None:
    files = [*(SOURCES / "revfx").rglob("*.py"), *(SOURCES / "passes").rglob("*.py")]
    users: set[str] = set()
    for file in files:
        called = (n.func for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call))
        if any(ast.unparse(f) in ("warnings.warn", "warnings.warn_explicit") for f in called):
            users.add(str(file.relative_to(SOURCES)))
    assert users == {"revfx/errors.py"}

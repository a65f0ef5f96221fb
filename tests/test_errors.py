"""Kinds of refusals and their remedies, and the messages that list them."""

from __future__ import annotations

import dataclasses

import pytest

from revfx.errors import Cause, NotReversibleError, Reason, Refusal, listed


def test_every_kind_has_a_meaning_and_a_remedy_of_its_own() -> None:
    assert 8 <= len(Reason) <= 15
    assert len({kind.meaning for kind in Reason}) == len({kind.remedy for kind in Reason}) == len(Reason)
    assert all(kind.meaning and kind.remedy and "checkpoint" not in kind.remedy for kind in Reason)


@pytest.mark.parametrize("kind", [Reason.NO_COUPLING, Reason.NON_INVERTIBLE, Reason.UNTRACEABLE])
def test_remedy_names_a_budget_where_nothing_reversible_can_be_found(kind: Reason) -> None:
    assert "`revfx.convert(model, memory=0.5)`" in kind.remedy


def test_refusal_is_frozen_and_reads_as_place_operation_and_reason() -> None:
    refusal = Cause(Reason.NO_COUPLING, "`x` needs itself").at("add", "m.py:3", "linear")
    assert refusal == Refusal(Reason.NO_COUPLING, ("add", "linear"), "m.py:3", "`x` needs itself")
    assert str(refusal) == "m.py:3: `add`: `x` needs itself"
    assert str(Refusal(Reason.NO_RULE, ("f",), "")) == "unknown place: `f`: the operation has no inverse rule"
    with pytest.raises(dataclasses.FrozenInstanceError):
        refusal.kind = Reason.NO_RULE  # type: ignore[misc]


def test_list_of_refusals_ends_with_the_remedy_of_each_kind_once() -> None:
    refusals = [Refusal(Reason.NO_COUPLING, ("add",), f"m.py:{i}", "") for i in range(20)]
    text = listed([*refusals[:2], Refusal(Reason.NO_RULE, ("f",), "m.py:9"), *refusals[2:]])
    assert text.count("m.py:") == 8 and text.count("What to do: ") == 2
    assert text.endswith(f"What to do: {Reason.NO_RULE.remedy}.")


def test_error_carries_the_refusals() -> None:
    refusal = Refusal(Reason.NO_RULE, ("f",), "m.py:9")
    assert NotReversibleError("no").refusals == ()
    assert NotReversibleError("no", "f", (refusal,)).refusals == (refusal,)

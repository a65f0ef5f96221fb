"""`purge_fakes` removes the tensors of a mode that is over from all that user code keeps."""

from __future__ import annotations

import collections
import functools
from typing import Any, NamedTuple

import torch
from helpers import fp64 as fp64
from torch import Tensor

from revfx import _fake, _torch
from revfx.world.left import purge_fakes


latest: Tensor | None = None


class Rope:
    def __init__(self) -> None:
        self.table: Tensor | None = None


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
    assert purge_fakes(mode) is None and not mode.alive()
    assert kept == {"a": [1], "c": set(), "d": 3, "e": collections.deque([5])}


def test_attributes_are_set_to_none_and_told() -> None:
    for owner in (Slots(None), Rope(), Rope):
        mode, t = fake()
        setattr(owner, "table", t)  # noqa: B010
        del t
        left = purge_fakes(mode)
        assert left is not None and left.endswith(".table`") and not mode.alive()
        assert getattr(owner, "table", 0) is None
    del Rope.table  # type: ignore[attr-defined]


def test_global_name_is_set_to_none_and_told() -> None:
    mode, t = fake()
    globals()["latest"] = t
    del t
    left = purge_fakes(mode)
    assert left is not None and left.endswith("latest`") and "latest" in globals() and latest is None


def test_what_nothing_can_be_done_about_is_told() -> None:
    mode, t = fake()
    it = iter((t, 1))
    del t
    assert purge_fakes(mode) == "a tuple"
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
    assert purge_fakes(mode) is None and not mode.alive() and not kept

"""Kinds of calls of a model with a budget, each with its plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import ge
from typing import Any

import torch
from torch import Tensor

from revfx.engine.plan import Path, Plan
from revfx.fit.survey import Chosen
from revfx.info import BudgetPlan


@dataclass
class BudgetKind:
    """Calls of one kind.

    Attributes:
        plan: the units that they are compared with.
        known: the plan that each way of the forward follows from, that of the latest one first; empty where none can be
            made, and whole blocks are dropped.
        summary: it for users.
        device: on which the model is.
        calls: the number of calls since it was recorded.
        wait: the number of calls before it is recorded again.
        tries: how often it was recorded since a forward went an unknown way, and took a known one.
        is_due: the next call is recorded again.
        used: a number that grows with each call.
        ends: tensors that the latest call took or returned, with how often they had been written to.
    """

    plan: Plan
    known: list[tuple[Chosen, Path]]
    summary: BudgetPlan | None
    device: torch.device
    calls: int = 0
    wait: int = 0
    tries: int = 0
    is_due: bool = False
    used: int = 0
    ends: list[tuple[Tensor, int]] = field(default_factory=list[tuple[Tensor, int]])

    @property
    def chosen(self) -> Chosen | None:
        """The plan of the way that was recorded last."""
        return self.known[0][0] if self.known else None

    def judge(self, path: Path, matched: int, has_left: bool) -> None:
        """Have the kind recorded again if fewer units of a way matched than before.

        Those that match once a forward `has_left` all ways are units of blocks, which do not count for later forwards.
        """
        self.calls += 1
        if matched < path.most and self.calls > self.wait:
            self.is_due = True
        if not has_left:
            path.most = max(path.most, matched)


Sizes = tuple[tuple[int, ...], ...]


def sizes_of(leaves: Iterable[Any]) -> Sizes:
    """Return the shapes of the tensors among the leaves of arguments."""
    return tuple([tuple(t.shape) for t in leaves if isinstance(t, Tensor)])


def covers(large: tuple[int, ...], small: tuple[int, ...]) -> bool:
    """Return whether a shape is as large as another one in each dimension."""
    return len(large) == len(small) and all(map(ge, large, small))


def count_elements(sizes: Sizes) -> int:
    """Return the elements of tensors of some shapes."""
    return sum(map(math.prod, sizes))


class PlainForward:
    """A forward that drops nothing; `begins` is called when its backward begins, when it `is_over`."""

    is_over: bool = False
    begins: Callable[[], None] | None = None

    def begin(self, _: Any) -> None:
        """Note that its backward begins."""
        if self.begins is not None:
            self.begins()
        self.is_over = True

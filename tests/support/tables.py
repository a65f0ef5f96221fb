"""Tables of numbers that user code makes once and keeps: in caches, containers, classes, globals, closures."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


Table = Callable[[int], Tensor]


def make(n: int) -> Tensor:
    return torch.arange(n).to(torch.float64).cos()


@functools.lru_cache(maxsize=4)
def bounded(n: int) -> Tensor:
    return make(n)


@functools.lru_cache(maxsize=None)  # noqa: UP033
def unbounded(n: int) -> Tensor:
    return make(n)


@functools.cache
def pairs(n: int) -> tuple[Tensor, dict[str, Tensor]]:
    return make(n), {"sin": make(n).sin()}


def in_a_pair(n: int) -> Tensor:
    cos, others = pairs(n)
    return cos + others["sin"]


@dataclass(frozen=True)
class Frozen:
    table: Tensor


@functools.lru_cache
def frozen(n: int) -> Frozen:
    return Frozen(make(n))


def in_a_frozen_object(n: int) -> Tensor:
    return frozen(n).table


def default(n: int, known: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006
    if n not in known:
        known[n] = make(n)
    return known[n]


class OfAClass:
    known: ClassVar[dict[int, Tensor]] = {}
    latest: ClassVar[Tensor | None] = None

    @classmethod
    def get(cls, n: int) -> Tensor:
        if n not in cls.known:
            cls.known[n] = make(n)
        return cls.known[n]


def class_attribute(n: int) -> Tensor:
    if OfAClass.latest is None:
        OfAClass.latest = make(n)
    return OfAClass.latest


IN_DICT: dict[int, Tensor] = {}
IN_LIST: list[Tensor] = []
DEEP: dict[str, dict[int, tuple[Tensor, ...]]] = {"tables": {}}
latest: Tensor | None = None
HIDDEN: dict[str, Any] = {"dict": {}, "deque": collections.deque[Any](maxlen=2)}


def global_dict(n: int) -> Tensor:
    if n not in IN_DICT:
        IN_DICT[n] = make(n)
    return IN_DICT[n]


def global_list(n: int) -> Tensor:
    if not IN_LIST:
        IN_LIST.append(make(n))
    return IN_LIST[0]


def global_deep(n: int) -> Tensor:
    if n not in DEEP["tables"]:
        DEEP["tables"][n] = (make(n), make(n).sin())
    return DEEP["tables"][n][0]


def global_name(n: int) -> Tensor:
    global latest
    if latest is None:
        latest = make(n)
    return latest


class Rope:
    def __init__(self) -> None:
        self.table: Tensor | None = None

    def __call__(self, n: int) -> Tensor:
        if self.table is None:
            self.table = make(n)
        return self.table

    @functools.cached_property
    def fixed(self) -> Tensor:
        return make(4)


ROPE = Rope()


def global_object(n: int) -> Tensor:
    return ROPE(n)


def computed_property(n: int) -> Tensor:
    return globals()["ROPE"].fixed


def hidden_object(n: int) -> Tensor:
    return globals()["ROPE"](n)


def hidden_dict(n: int) -> Tensor:  # where no one can see from the code which container it is
    known = globals()["HIDDEN"]["dict"]
    if n not in known:
        known[n] = [make(n)]
    return known[n][0]


def hidden_deque(n: int) -> Tensor:
    known = globals()["HIDDEN"]["deque"]
    if not known:
        known.append((make(n), n))
    return known[0][0]


def closure() -> Table:
    found: Tensor | None = None

    def get(n: int) -> Tensor:
        nonlocal found
        if found is None:
            found = make(n)
        return found

    return get


TABLES: list[Table] = [
    bounded, unbounded, in_a_pair, in_a_frozen_object, default, OfAClass.get, class_attribute,
    global_dict, global_list, global_deep, global_name, global_object, computed_property, hidden_dict, hidden_deque,
]  # fmt: skip


def clear() -> None:
    global latest
    for cached in (bounded, unbounded, pairs, frozen):
        cached.cache_clear()
    defaults: Any = default.__defaults__
    for held in defaults[0], OfAClass.known, IN_DICT, IN_LIST, DEEP["tables"], *HIDDEN.values():
        held.clear()
    OfAClass.latest = latest = ROPE.table = None
    vars(ROPE).pop("fixed", None)

"""Objects that give something else each time they are asked (optimizers: at each step), which no recording may do: they
can't be put back, or compared with what they were.
"""

from __future__ import annotations

import queue
import random
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from revfx.containers import DEPTH, by_class, inside, is_container, is_plain, parts_of
from revfx.untraceable import Untraceable


_KINDS = (Iterator, random.Random, queue.Queue, queue.SimpleQueue, Optimizer, LRScheduler)


def refuse_sources(values: Iterable[Any], what: str, depth: int = DEPTH) -> None:
    """None, where there is no source among `values`, of which a forward does `what`, nor in what they hold, `depth`
    levels deep.

    Raises:
        Untraceable: there is one.
    """
    level, seen = list(values), set[int]()
    for further in range(depth, -1, -1):
        for value in level:
            if asks(value):
                raise _refusal(value, what)
        fresh = [v for v in level if id(v) not in seen] if further else []
        seen.update(map(id, fresh))
        level = [x for v in fresh for x in inside(v)]


class StandIn:
    """What stands where a source was, and raises in the thread that made it when it is asked for something."""

    def __init__(self, source: Any) -> None:
        self._source, self._thread = source, threading.get_ident()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the source's method gives."""
        return self._asked()(*args, **kwargs)

    def __iter__(self) -> Any:
        """The source's own iterator."""
        return iter(self._asked())

    def __next__(self) -> Any:
        """The source's next item."""
        return next(self._asked())

    def __getattr__(self, name: str) -> Any:
        """The source's attribute."""
        return getattr(self._asked(), name)

    def _asked(self) -> Any:
        if threading.get_ident() == self._thread:
            raise _refusal(self._source, "asks")
        return self._source


def _refusal(source: Any, what: str) -> Untraceable:
    text = f"its forward {what} a {type(source).__name__}, which gives something else every time"
    return Untraceable(text, compiles=not isinstance(source, random.Random))  # dynamo of torch 2.13 errs there


def asks(value: Any) -> bool:
    """Whether `value` is a source, or a method of one, or a partial function with one."""
    return is_source(value) or (callable(value) and any(map(is_source, parts_of(value))))


def is_source(value: Any) -> bool:
    """Whether `value` is an iterator, a random generator, a file, a queue, or what steps with the training; none of the
    user's own classes.
    """
    if not _may_be(type(value)):
        return False
    shared = (random.random.__self__, getattr(sys.modules.get("numpy.random"), "_rand", None))  # noted elsewhere
    return not is_plain(value) and not is_container(value) and all(value is not s for s in shared)


@by_class
def _may_be(kind: type) -> bool:
    return issubclass(kind, _KINDS) or str(kind.__module__).startswith("numpy.random")

"""Attributes of other libraries that have a value of revfx's for a while."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator
from typing import Any


class Substitute:
    """An attribute of a class or a module with another value, for as long as something stands on that."""

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self._owner, self._name, self._value, self._own = owner, name, value, getattr(owner, name)
        self._users, self._lock = 0, threading.Lock()

    @contextlib.contextmanager
    def active(self) -> Generator[None]:
        """Open a context in which the attribute has the value."""
        self._use(1)
        try:
            yield
        finally:
            self._use(-1)

    def _use(self, more: int) -> None:
        with self._lock:
            self._users += more
            setattr(self._owner, self._name, self._value if self._users else self._own)

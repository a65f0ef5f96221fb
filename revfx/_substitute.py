"""Temporary replacement of attributes of other libraries."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator
from typing import Any


class Substitute:
    """A replacement for an attribute of a class or a module; it is in place while any context is open."""

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self._owner, self._name, self._value, self._original = owner, name, value, getattr(owner, name)
        self._users, self._lock = 0, threading.Lock()

    @contextlib.contextmanager
    def active(self) -> Generator[None]:
        """Open a context in which the attribute has the replacement."""
        self._change_users(1)
        try:
            yield
        finally:
            self._change_users(-1)

    def _change_users(self, change: int) -> None:
        with self._lock:
            self._users += change
            setattr(self._owner, self._name, self._value if self._users else self._original)

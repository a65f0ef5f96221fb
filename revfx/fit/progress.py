"""A progress bar while a plan is searched, where tqdm is installed and a terminal is there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from contextvars import ContextVar


DELAY = 1.0  # seconds that a search takes before the bar appears

_advance: ContextVar[Callable[[], object] | None] = ContextVar("_advance", default=None)


@contextlib.contextmanager
def showing_progress(text: str) -> Generator[None]:
    """Show how many plans were simulated in this context."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield
        return
    with tqdm(desc=text, unit=" plans", delay=DELAY, disable=None, leave=False) as bar:
        token = _advance.set(bar.update)
        try:
            yield
        finally:
            _advance.reset(token)


def note_simulation() -> None:
    """Move the bar forward by one plan."""
    advance = _advance.get()
    if advance is not None:
        advance()

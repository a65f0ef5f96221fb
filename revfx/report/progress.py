"""A bar on the terminal for what takes more than a second; nothing where there is no terminal, or no tqdm."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator
from contextvars import ContextVar
from typing import Any

from revfx.ambient import given


_listener: ContextVar[Callable[[str], object]] = ContextVar("revfx_progress", default=lambda text: None)


def stage(text: str) -> None:
    """Announce what is done next, to whoever shows it."""
    _listener.get()(text)


@contextlib.contextmanager
def bar(total: int | None, text: str = "") -> Generator[Callable[..., Any]]:
    """Open a context with a bar of `total` steps on stderr; it gives a function, to be called after each of them.

    A stage that is announced inside is a step too.
    """
    opened: Any = contextlib.nullcontext()
    with contextlib.suppress(ImportError):
        from tqdm import tqdm

        opened = tqdm(total=total, desc=text, leave=False, file=sys.stderr, disable=None)  # without a terminal
    with opened as shown:

        def advance(text: str = "") -> None:
            if shown is not None:
                shown.set_description_str(text, refresh=False) if text else None
                shown.update()

        with given(_listener, advance):
            yield advance

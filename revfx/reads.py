"""Which attributes of modules some code reads: what a recorded forward did not read need not stay as it was.

A trainer hangs itself on the module that it trains, and changes at every step.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

from torch import nn

from revfx import _torch
from revfx.fingerprint import is_users
from revfx.sources import refuse_sources


_OURS = ("torch", "revfx")  # they look into tables of attributes on behalf of whoever reads one


class Reads:
    """The attributes that were read: pairs of the address of a module's table and a name."""

    def __init__(self) -> None:
        self.noted: set[tuple[int, str]] = set()
        self.modules: dict[int, weakref.ref[nn.Module]] = {}  # by the address of its table

    def elsewhere(self, known: Iterable[nn.Module]) -> list[tuple[nn.Module, frozenset[str]]]:
        """Modules that are none of the `known`, such as a parent that one has in a list, and what was read of them."""
        tables = {id(vars(m)) for m in known}
        found = [
            (table, m) for table, there in self.modules.items() if table not in tables if (m := there()) is not None
        ]
        return [(m, frozenset(n for t, n in self.noted if t == table)) for table, m in found]

    def of(self, module: nn.Module, names: frozenset[str]) -> frozenset[str]:
        """Those of `names` that were read of `module`; all, where its whole table was asked for."""
        table = id(vars(module))
        whole = (table, "__dict__") in self.noted
        return frozenset(n for n in names if whole or (table, n) in self.noted)


@contextmanager
def noting_reads() -> Generator[Reads]:
    """A context in which every read of an attribute of any module is noted; one at a time.

    Raises:
        Untraceable: an attribute holds something that gives something else each time it is asked.
    """
    thread = threading.get_ident()
    reads, before = Reads(), vars(nn.Module).get("__getattribute__")
    plain: Any = before or object.__getattribute__

    def __getattribute__(self: nn.Module, name: str) -> Any:
        if name != "__dict__" or _torch.caller().f_globals.get("__name__", "").partition(".")[0] not in _OURS:
            table = id(plain(self, "__dict__"))
            reads.noted.add((table, name))
            if table not in reads.modules and threading.get_ident() == thread:
                reads.modules[table] = weakref.ref(self)
        value = plain(self, name)
        if is_users(name) and name != "__dict__" and threading.get_ident() == thread:
            refuse_sources([value], f"reads `{name}`:", depth=1)
        return value

    setattr(nn.Module, "__getattribute__", __getattribute__)  # noqa: B010 (a checker would take it for the class's own)
    try:
        yield reads
    finally:
        if before is None:
            delattr(nn.Module, "__getattribute__")
        else:
            setattr(nn.Module, "__getattribute__", before)  # noqa: B010

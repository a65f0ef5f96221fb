"""Depth-free activation memory for ordinary PyTorch models, by inferred reversibility."""

from __future__ import annotations

from importlib.metadata import version as _version
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING, Any as _Any


if not (_Path(__file__).parent / "passes").exists():  # imported from the source tree, where `passes` lies beside it
    __path__.append(str(_Path(__file__).parent.parent))

from revfx import debug as debug, testing as testing
from revfx.block import RevBlock as RevBlock, rev_block as rev_block
from revfx.convert import convert as convert
from revfx.errors import NotReversibleError as NotReversibleError, RevfxError as RevfxError
from revfx.explain import explain as explain
from revfx.explanation import Explanation as Explanation
from revfx.rules import register_inverse as register_inverse


if _TYPE_CHECKING:
    from revfx.partitioner import ReversiblePartitioner as ReversiblePartitioner


def __getattr__(name: str) -> _Any:
    if name == "ReversiblePartitioner":  # at its first use: it takes torch's compiler, a second to import
        from revfx.partitioner import ReversiblePartitioner

        return ReversiblePartitioner
    raise AttributeError(f"module 'revfx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "ReversiblePartitioner"})


__version__ = _version("revfx")

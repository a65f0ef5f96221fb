"""Train PyTorch models in less memory, bit for bit: inferred reversible layers and memory budgets."""

from __future__ import annotations

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING, Any as _Any


if not (_Path(__file__).parent / "passes").exists():  # imported from a source tree, which has `passes` beside `revfx`
    __path__.append(str(_Path(__file__).parent.parent))

from revfx import debug as debug, testing as testing
from revfx.block import RevBlock as RevBlock, rev_block as rev_block
from revfx.convert import convert as convert
from revfx.errors import (
    BudgetError as BudgetError,
    BudgetWarning as BudgetWarning,
    NondeterminismWarning as NondeterminismWarning,
    NotConvertedWarning as NotConvertedWarning,
    NotReversibleError as NotReversibleError,
    RegenerationError as RegenerationError,
    RevfxError as RevfxError,
    RevfxWarning as RevfxWarning,
)
from revfx.inverse import inverse as inverse
from revfx.rules import register_inverse as register_inverse


if _TYPE_CHECKING:
    from revfx.compiled.partitioner import ReversiblePartitioner as ReversiblePartitioner
    from revfx.report.explain import explain as explain
    from revfx.report.explanation import Explanation as Explanation


_LATER = {  # imported at their first use, as the compiler alone takes a second
    "Explanation": "revfx.report.explanation",
    "ReversiblePartitioner": "revfx.compiled.partitioner",
    "explain": "revfx.report.explain",
}


def __getattr__(name: str) -> _Any:
    if name in _LATER:
        return getattr(_import_module(_LATER[name]), name)
    raise AttributeError(f"module 'revfx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


__version__ = _version("revfx")

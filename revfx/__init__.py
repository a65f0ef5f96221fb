"""Train PyTorch models in less memory, bit for bit: inferred reversible layers and memory budgets."""

from __future__ import annotations

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING, Any as _Any


if not (_Path(__file__).parent / "passes").exists():  # imported from a source tree, which has `passes` beside `revfx`
    __path__.append(str(_Path(__file__).parent.parent))

from revfx.errors import (
    BudgetError,
    BudgetWarning,
    NondeterminismWarning,
    NotConvertedWarning,
    NotReversibleError,
    RegenerationError,
    RevfxError,
    RevfxWarning,
)


if _TYPE_CHECKING:
    from revfx import debug, testing
    from revfx.block import RevBlock, rev_block
    from revfx.compiled.partitioner import ReversiblePartitioner
    from revfx.converting import convert
    from revfx.inverting import inverse
    from revfx.report.explain import explain
    from revfx.report.explanation import Explanation
    from revfx.rules import register_inverse


__all__ = [
    "BudgetError",
    "BudgetWarning",
    "Explanation",
    "NondeterminismWarning",
    "NotConvertedWarning",
    "NotReversibleError",
    "RegenerationError",
    "RevBlock",
    "ReversiblePartitioner",
    "RevfxError",
    "RevfxWarning",
    "convert",
    "debug",
    "explain",
    "inverse",
    "register_inverse",
    "rev_block",
    "testing",
]

_LATER = {  # imported at their first use, as sympy, networkx and the compiler take a second
    "Explanation": "revfx.report.explanation",
    "RevBlock": "revfx.block",
    "ReversiblePartitioner": "revfx.compiled.partitioner",
    "convert": "revfx.converting",
    "explain": "revfx.report.explain",
    "inverse": "revfx.inverting",
    "register_inverse": "revfx.rules",
    "rev_block": "revfx.block",
}
_LATER_MODULES = "debug", "testing"


def __getattr__(name: str) -> _Any:
    if name in _LATER:
        return getattr(_import_module(_LATER[name]), name)
    if name in _LATER_MODULES:
        return _import_module(f"revfx.{name}")
    raise AttributeError(f"module 'revfx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__version__ = _version("revfx")

"""Depth-free activation memory for ordinary PyTorch models, by inferred reversibility."""

from __future__ import annotations

from importlib.metadata import version as _version
from pathlib import Path as _Path


if not (_Path(__file__).parent / "passes").exists():  # imported from the source tree, where `passes` lies beside it
    __path__.append(str(_Path(__file__).parent.parent))

from revfx import testing as testing
from revfx.block import RevBlock as RevBlock, rev_block as rev_block
from revfx.convert import convert as convert
from revfx.errors import NotReversibleError as NotReversibleError, RevfxError as RevfxError
from revfx.rules import register_inverse as register_inverse


__version__ = _version("revfx")

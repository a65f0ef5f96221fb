"""Memory budgets: a share of the peak of the plain model, or bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from revfx import units


@dataclass(frozen=True)
class Budget:
    """The peak that a step may reach above the bytes before it: a `share` of the plain model's peak, or `bytes`.

    `less`: bytes that are subtracted, because steps were seen to exceed their predictions by so many.
    """

    text: str
    bytes: int | None = None
    share: float | None = None
    less: int = 0

    def of(self, plain: int) -> int:
        """Return the budget in bytes, given the peak of the plain step."""
        return (self.bytes if self.bytes is not None else int((self.share or 0.0) * plain)) - self.less


def as_memory(nbytes: int) -> str:
    """Format bytes for `memory=`, rounded up to a tenth of a unit: "7.1MiB"."""
    unit, scale = units.binary_unit(nbytes)
    tenths = -(-10 * nbytes // scale)
    return str(nbytes) if scale == 1 else f"{tenths / 10:.1f}{unit}"


def checked_memory(memory: Any) -> Budget | None:
    """Return the budget that is meant, or None.

    Raises:
        ValueError: it is no share, in (0, 1], no whole number of bytes, and no text such as "2GiB", "800 MB" or "65%".
    """
    if memory is None or isinstance(memory, Budget):
        return memory
    text = f"memory={memory!r}"
    if isinstance(memory, float) and 0 < memory <= 1:
        return Budget(text, share=memory)
    if isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
        return Budget(text, bytes=memory)
    if isinstance(memory, str):
        if (percent := re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*%\s*", memory)) and 0 < float(percent[1]) <= 100:
            return Budget(text, share=float(percent[1]) / 100)
        if nbytes := units.parse_size(memory):
            return Budget(text, bytes=nbytes)
    raise ValueError(
        f'`{text}` is not a budget. Give bytes (an int, "2GiB", "800MB") or a part of the plain model\'s peak (a'
        ' float in (0, 1], "65%").'
    )

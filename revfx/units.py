"""Numbers with units: bytes and counts of operations."""

from __future__ import annotations

import re


BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")  # powers of 1024
DECIMALS = (0, 1, 1, 2, 2)  # of a size in each of them
COUNT_UNITS = ("", " k", " M", " G", " T")  # powers of 1000
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]?)(I?)B?\s*", re.IGNORECASE)


def binary_unit(nbytes: float) -> tuple[str, int]:
    """Return the largest binary unit up to `nbytes`: its name and its bytes."""
    power = _power(nbytes, 1024, len(BINARY_UNITS))
    return BINARY_UNITS[power], 1024**power


def size(nbytes: float) -> str:
    """Format a number of bytes in a binary unit: `1.50 GiB`."""
    unit, scale = binary_unit(nbytes)
    return f"{nbytes / scale:.{DECIMALS[BINARY_UNITS.index(unit)]}f} {unit}"


def parse_size(text: str) -> int | None:
    """Parse a number of bytes like "2GiB" (1024), "800 MB" (1000) or "100"; return None for other texts."""
    found = _SIZE.fullmatch(text)
    if found is None:
        return None
    number, prefix, binary = found.groups()
    base = 1024 if binary else 1000
    power = ("", "K", "M", "G", "T").index(prefix.upper())
    return int(float(number) * base**power)


def count(n: float) -> str:
    """Format a number of operations: `1.34 G`."""
    power = _power(n, 1000, len(COUNT_UNITS))
    return f"{n / 1000**power:.3g}{COUNT_UNITS[power]}"


def _power(n: float, base: int, units: int) -> int:
    """Return the smallest power of `base` that divides `n` to less than `base`, at most that of the last unit."""
    power = 0
    while power < units - 1 and abs(n) >= base ** (power + 1):
        power += 1
    return power

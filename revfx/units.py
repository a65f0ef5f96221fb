"""Numbers with units, for people."""

from __future__ import annotations


def size(nbytes: float) -> str:
    """Format a number of bytes for people, in powers of 1024."""
    power, scaled = _scaled(nbytes, 1024, 3)
    return f"{scaled:.{(0, 1, 1, 2)[power]}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def count(n: float) -> str:
    """Format a number of operations for people: `1.34 G`."""
    power, scaled = _scaled(n, 1000, 4)
    return f"{scaled:.3g}{('', ' k', ' M', ' G', ' T')[power]}"


def _scaled(n: float, base: int, most: int) -> tuple[int, float]:
    """Return the power of `base`, of at most so much, by which a number is divided to be short, and what it is then."""
    power = next((p for p in range(most) if abs(n) < base ** (p + 1)), most)
    return power, n / base**power

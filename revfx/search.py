"""The largest size that something fits with."""

from __future__ import annotations

from collections.abc import Callable


MOST = 65536  # what is not looked beyond
RESOLUTION = 32  # the largest is found to this part of itself


def search(
    fits: Callable[[int], bool], low: int, high: int | None, enough: Callable[[], bool]
) -> tuple[int, int | None]:
    """Return the largest size found to fit, and the smallest found not to, if any.

    Sizes are doubled until one does not fit, and then halved in between, to a part of `RESOLUTION`.

    Args:
        fits: whether a size fits.
        low: a size that is known to fit, or 0.
        high: one that is known not to, if there is any.
        enough: whether to stop with what there is.
    """
    while high is None and low < MOST and not enough():
        size = max(1, 2 * low)
        low, high = (size, None) if fits(size) else (low, size)
    while high is not None and high - low > max(1, low // RESOLUTION) and not enough():
        size = (low + high) // 2
        low, high = (size, high) if fits(size) else (low, size)
    return low, high

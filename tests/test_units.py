"""Bytes as text, in both directions."""

from __future__ import annotations

import pytest

from revfx.units import binary_unit, parse_size, size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("100", 100), ("0", 0), ("1KiB", 2**10), ("512 MiB", 2**29), ("1.5GiB", 3 * 2**29), ("2gb", 2 * 10**9),
     ("3m", 3 * 10**6), (".5 TiB", 2**39)],
)  # fmt: skip
def test_parse_size(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "MiB", "-1GiB", "1XiB", "nan", "1 2", "50%"])
def test_text_that_is_no_size(text: str) -> None:
    assert parse_size(text) is None


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 20, "3.0 MiB"), (5 << 30, "5.00 GiB"),
     (1 << 50, "1024.00 TiB"), (-2048, "-2.0 KiB")],
)  # fmt: skip
def test_size(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


def test_binary_unit() -> None:
    assert [binary_unit(n) for n in (1, 2048, 2**30)] == [("B", 1), ("KiB", 1024), ("GiB", 2**30)]

"""Copies lie in memory as their originals do, and share what these share."""

from __future__ import annotations

import torch

from revfx.layout import copy_views, offset_of


def test_slices_share_one_copy() -> None:
    batch = torch.randn(32, 24, 16)
    slices = [batch[:, t] for t in range(24)]
    copies = copy_views(slices)
    assert len({c.untyped_storage().data_ptr() for c in copies}) == 1
    assert copies[0].untyped_storage().nbytes() <= batch.nbytes + 64
    _assert_alike(copies, slices)


def test_rows_far_apart_are_copied_alone() -> None:
    rows = torch.randn(1000, 7)
    held = [rows[1], rows[997, 2:5], rows[0:2].t()]
    copies = copy_views(held)
    assert sum(c.untyped_storage().nbytes() for c in copies) < 1024
    _assert_alike(copies, held)


def test_dtypes_may_differ() -> None:
    words = torch.randn(64, 4)
    held = [words[:, 1], words.view(torch.uint8)[:, 3::4], words[3:, :2], words.view(torch.int32)[5:, 1]]
    _assert_alike(copy_views(held), held)


def _assert_alike(copies: list[torch.Tensor], originals: list[torch.Tensor]) -> None:
    for copy, original in zip(copies, originals, strict=True):
        assert torch.equal(copy, original)
        assert copy.stride() == original.stride()
        assert offset_of(copy) == offset_of(original)
        assert copy.untyped_storage().data_ptr() != original.untyped_storage().data_ptr()

"""The search for the largest that fits, its child processes, and the limit that they are given."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, strategies as st

from revfx.bench import fit as bench_fit
from revfx.bench.fit import Question, data_bytes, largest
from revfx.bench.results import Fit
from revfx.report.fit import MOST, RESOLUTION, search


QUESTION = Question("mlp", "plain", "batch", 4, 8 * 2**20, "cpu", 1, 20.0)


def up_to(limit: int, tried: list[int] | None = None) -> Callable[[int], bool]:
    """A predicate that holds up to a limit, and notes what it was asked."""

    def fits(size: int) -> bool:
        if tried is not None:
            tried.append(size)
        return size <= limit

    return fits


def never() -> bool:
    return False


@given(st.integers(0, MOST))
def test_the_largest_is_found_to_its_resolution(limit: int) -> None:
    tried: list[int] = []
    low, over = search(up_to(limit, tried), 0, None, never)
    assert low <= limit and len(tried) <= 30 and len(set(tried)) == len(tried)
    if limit < MOST:
        assert over is not None and limit < over and over - low <= max(1, low // RESOLUTION)
    else:
        assert (low, over) == (MOST, None)


def test_small_sizes_are_found_exactly() -> None:
    assert [search(up_to(n), 0, None, never) for n in (0, 1, 2, 3, 23)] == [(0, 1), (1, 2), (2, 3), (3, 4), (23, 24)]


def test_a_search_goes_on_from_what_is_known_and_ends_when_told_to() -> None:
    tried: list[int] = []
    assert search(up_to(23, tried), 16, 32, never) == (23, 24)
    assert all(16 < n < 32 for n in tried)
    assert search(up_to(1000, tried := []), 0, None, lambda: len(tried) >= 4) == (8, None)
    assert tried == [1, 2, 4, 8]


# --- child processes
@pytest.mark.deep
def test_larger_batches_fit_where_activations_are_not_kept() -> None:
    plain, ours = (largest(replace(QUESTION, way=way)) for way in ("plain", "convert"))
    for fit in (plain, ours):
        assert fit.largest is not None and fit.over is not None and fit.over - fit.largest <= fit.largest // RESOLUTION
        assert (fit.notes, fit.failed) == ((), False)
    # 2 MiB of parameters and gradients; a row takes 19 KiB in plain, and 5 KiB at the peak of the other; what the
    # allocator and the threads of a process hold besides differs
    assert plain.largest and 150 <= plain.largest <= 400
    assert ours.largest and 2 * plain.largest <= ours.largest <= 1400


def test_a_way_that_does_not_apply_is_not_tried() -> None:
    fit = largest(Question("flow", "rev_block", "batch", 4, 2**20, "cpu", 1, 20.0))
    assert (fit.largest, fit.failed) == (None, False) and "log-determinant" in fit.notes[0]


def test_an_error_that_has_nothing_to_do_with_memory_is_told() -> None:
    fit = largest(Question("mlp", "plain", "depth", 4, 2**24, "meta:0:1", 1, 20.0))
    assert fit.failed and fit.largest == 0 and fit.notes[0].startswith("raises RuntimeError: Invalid device string")


def test_what_a_child_died_of_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int | None]] = []

    def dies_above_20(question: Question, low: int, high: int | None) -> bench_fit.Said:
        asked.append((low, high))
        said = bench_fit.Said(low, high)

        def fits(size: int) -> bool:
            nonlocal said
            said = replace(said, trying=size)
            if size > 20:
                raise KeyboardInterrupt
            said = replace(said, low=size)
            return True

        with contextlib.suppress(KeyboardInterrupt):
            search(fits, low, high, never)
            said = replace(said, ended=True)
        return said

    monkeypatch.setattr(bench_fit, "ask", dies_above_20)
    found = largest(QUESTION)
    assert found == Fit("mlp", "plain", "batch", 4, 8 * 2**20, 20, 21, ("a process that tried more died",))
    assert asked[:2] == [(0, None), (16, 32)]


def test_children_that_die_of_the_smallest_are_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def dies(question: Question, low: int, high: int | None) -> bench_fit.Said:
        asked.append(low)
        return bench_fit.Said(low, high, 1)

    monkeypatch.setattr(bench_fit, "ask", dies)
    assert (largest(QUESTION).largest, asked) == (0, [0])


def test_a_child_that_can_t_begin_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_fit.sys, "executable", "/bin/false")
    fit = largest(QUESTION)
    assert (fit.largest, fit.failed, fit.notes) == (0, True, ("a process died before it tried anything",))


@pytest.mark.parametrize(
    ("error", "wanting"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA"), True),
        (RuntimeError("[enforce fail at CPUAllocator] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_errors_of_memory_are_told_from_others(error: Exception, wanting: bool) -> None:
    assert bench_fit.of_memory(error) is wanting
    try:
        try:
            raise error
        except Exception as e:
            raise ValueError("another") from e
    except ValueError as outer:
        assert bench_fit.of_memory(outer) is wanting


def test_the_data_segment_holds_what_was_allocated() -> None:
    before = data_bytes()
    held = torch.zeros(2**26, dtype=torch.uint8)
    assert 0.9 * 2**26 < data_bytes() - before < 1.2 * 2**26
    del held

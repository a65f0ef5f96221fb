"""Many random programs in one way: how many had a region, what was refused, and what failed, made small."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from hypothesis import HealthCheck, Phase, given, seed as seeded, settings, strategies as st
from programs import Program, minimised
from programs_check import Verdict
from programs_draw import block_programs, programs
from programs_slopes import by_slopes
from programs_ways import by_backend, by_convert, by_rev_block


@dataclass(frozen=True)
class Way:
    """A check, what it is given, how many programs it takes on in the quick run, and which share of a long one."""

    check: Callable[[Program], Verdict]
    drawn: Callable[[], st.SearchStrategy[Program]]
    quick: int
    share: float


def often_short(of: int, recordable: bool | None = None) -> st.SearchStrategy[Program]:
    """As `programs`, one `of` so many long and the others short."""
    return st.integers(1, of).flatmap(lambda k: programs(recordable=recordable, short=k < of))


recordable = functools.partial(programs, recordable=True)
WAYS = {
    "convert": Way(by_convert, programs, 15, 0.5),
    "slopes": Way(by_slopes, programs, 8, 0.05),
    "rev_block": Way(by_rev_block, block_programs, 15, 0.2),
    "aot_eager": Way(functools.partial(by_backend, inner="aot_eager"), functools.partial(often_short, 2), 5, 0.09),
    "inductor": Way(functools.partial(by_backend, inner="inductor"), functools.partial(often_short, 8, True), 1, 0.01),
}


@dataclass
class Figures:
    """What came of the programs: how many there were, with a region in them, and of each kind of verdict."""

    programs: int = 0
    found: int = 0
    kinds: Counter[str] = field(default_factory=Counter[str])
    failures: list[str] = field(default_factory=list[str])


def survey(way: Way, count: int, seed: int | None = None) -> Figures:
    """Figures of `count` programs drawn from `seed`, or always the same ones where it is None.

    Every failure is made smaller, and the survey goes on.
    """
    figures, seen = Figures(), set[Program]()

    def look(program: Program) -> None:
        if program in seen:
            return
        seen.add(program)
        verdict = way.check(program)
        figures.programs += 1
        figures.found += verdict.found
        figures.kinds[verdict.kind] += 1
        if verdict.kind == "failure":
            small = minimised(program, lambda p: _same_failure(way.check(p), verdict))
            figures.failures.append(f"{verdict.text}\n{small}")

    test = settings(
        max_examples=count, database=None, deadline=None, derandomize=seed is None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck)  # pyright: ignore[reportArgumentType],
    )(given(way.drawn())(look))  # fmt: skip
    dtype, level = torch.get_default_dtype(), logging.root.manager.disable
    torch.set_default_dtype(torch.float64)
    logging.disable(logging.CRITICAL)  # the compiler's remarks on programs that it can't take
    try:
        (test if seed is None else seeded(seed)(test))()
    finally:
        torch.set_default_dtype(dtype)
        logging.disable(level)
    return figures


def _same_failure(verdict: Verdict, other: Verdict) -> bool:
    """Whether two failures are of one kind, whatever their numbers."""
    return verdict.kind == other.kind and verdict.text[8:32] == other.text[8:32]

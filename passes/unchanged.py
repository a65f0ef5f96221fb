"""Which sums the elements of a value come from, so that a run can see whether something was added to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from revfx.passes.program import Program


@dataclass(frozen=True, slots=True)
class Sum:
    """A value `result = +-factor * before + ...`, which has elements of `before` where nothing was added."""

    result: int
    before: int
    factor: float


def sums_behind(program: Program, value: int, fresh: Callable[[int], bool]) -> tuple[tuple[Sum, ...], bool]:
    """(the sums whose elements are those of `value`, moved or scaled at most; whether there are elements of others).

    What is `fresh` holds no numbers of the data, and so needs no look.
    """
    found: list[Sum] = []
    others, todo, seen = False, [value], set[int]()
    while todo:
        v = todo.pop()
        if v in seen:
            continue
        seen.add(v)
        op = program.ops[program.made_at[v]] if program.made_at[v] >= 0 else None
        if op is not None and op.moves:
            ins = program.data(op.ins)
            todo, others = todo + ins, others or not ins
            continue
        arcs = [a for a in op.arcs if a.tail[0] == v and not (a.exact or a.partial)] if op is not None else []
        scaled = [a.head for a in arcs if not a.sums and len(a.tail) == 1]
        sums = [a for a in arcs if a.sums and len(a.tail) > 1 and not fresh(a.head)]
        found += (Sum(v, a.head, 1.0 if a.measured else float(a.factor or 1.0)) for a in sums)
        todo += scaled
        others |= not (scaled or sums)
    return tuple(found), others

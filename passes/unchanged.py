"""Which sums the elements of a value come from, so that a run can see whether numbers of the data are left in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from revfx.passes.numbers import come_back, loses_numbers, magnitudes, sizes
from revfx.passes.program import Arc, Program


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
        arcs = _rounding(program, v)
        scaled = [a.head for a in arcs if not a.sums and len(a.tail) == 1]
        sums = [a for a in arcs if a.sums and len(a.tail) > 1 and not fresh(a.head)]
        found += (Sum(v, a.head, 1.0 if a.measured else float(a.factor or 1.0)) for a in sums)
        todo += scaled
        others |= not (scaled or sums)
    return tuple(found), others


def earlier(program: Program, value: int, fresh: Callable[[int], bool]) -> list[int]:
    """What a sum was made of last, and then what it may hold again if that takes off what was added before."""
    last = [a.head for a in _rounding(program, value) if a.sums and not a.follows and not fresh(a.head)]
    found: list[int] = []
    todo = last[:1]
    while todo:
        v = todo.pop()
        if v not in found:
            found.append(v)
            op = program.ops[program.made_at[v]] if program.made_at[v] >= 0 else None
            above = program.data(op.ins) if op is not None and op.moves else [a.head for a in _rounding(program, v)]
            todo += (u for u in above if not fresh(u))
    return found


def loses(program: Program, value: int, fresh: Callable[[int], bool]) -> tuple[list[int], Callable[..., Tensor]]:
    """(values; a function of `value`, of what its step makes of it and of those values: whether the step changes
    numbers of the data).
    """
    sums, others = sums_behind(program, value, fresh)
    before = {s.result: earlier(program, s.result, fresh) for s in sums}
    read = list(dict.fromkeys(v for s in sums for v in (s.result, s.before, *before[s.result])))

    def test(t: Tensor, after: Tensor, *tensors: Tensor) -> Tensor:
        held = {**dict(zip(read, tensors, strict=True)), value: t}
        lost = loses_numbers(t, after, [(held[s.result], held[s.before], s.factor) for s in sums], others)
        for result, (made_of, *once) in ((held[v], vs) for v, vs in before.items() if vs):
            for v in once:
                seen = sizes(result, held[made_of])
                lost = lost | come_back(magnitudes(held[v]), seen, torch.finfo(result.dtype).eps)
        return lost

    return read, test


def _rounding(program: Program, value: int) -> list[Arc]:
    """The inverses that start from a value, and round."""
    at = program.made_at[value]
    return [a for a in program.ops[at].arcs if a.tail[0] == value and not (a.exact or a.partial)] if at >= 0 else []

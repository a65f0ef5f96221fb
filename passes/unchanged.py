"""Which sums the elements of a value come from, so that a run can see whether numbers of the data are left in it."""

from __future__ import annotations

from collections.abc import Callable, Collection
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
        found += (Sum(v, a.head, _factor(a)) for a in sums)
        todo += scaled
        others |= not (scaled or sums)
    return tuple(found), others


def returning(program: Program, total: Sum, fresh: Callable[[int], bool], kept: Collection[int]) -> tuple[Sum, ...]:
    """Which of the `kept` values, times which factor, a sum may hold again if it takes off what was added to them."""
    last = [a for a in _rounding(program, total.result) if a.head == total.before and a.sums and not a.follows]
    found, seen, todo = list[Sum](), set[int](), [(a.head, _factor(a)) for a in last]
    while todo:
        v, factor = todo.pop()
        if v in seen:
            continue
        seen.add(v)
        if v in kept and v != total.before:
            found.append(Sum(total.result, v, factor))
        op = program.ops[program.made_at[v]] if program.made_at[v] >= 0 else None
        moved = program.data(op.ins) if op is not None and op.moves else None
        above = (
            [(u, 1.0) for u in moved] if moved is not None else [(a.head, _factor(a)) for a in _rounding(program, v)]
        )
        todo += ((u, factor * by) for u, by in above if not fresh(u))
    return tuple(found)


def scales(program: Program, start: int, stop: int) -> dict[int, float]:
    """By value, the magnitude of what it was multiplied by since operation `start`, where that is other than 1."""
    found: dict[int, float] = {}
    for op in program.ops[start:stop]:
        for head, factor, made in (
            [(v, 1.0, op.outs) for v in op.ins]
            if op.moves
            else [(a.head, abs(_factor(a)), a.tail[:1]) for a in op.arcs if not (a.exact or a.partial)]
        ):
            if factor != 1.0 or head in found:
                found.update(dict.fromkeys(made, factor * found.get(head, 1.0)))
    return found


def loses(
    program: Program, value: int, fresh: Callable[[int], bool], kept: Collection[int]
) -> tuple[list[int], Callable[..., Tensor]]:
    """(values; a function of `value`, of what its step makes of it and of those values: whether the step changes
    numbers of the data), of which some are held anyway (`kept`).
    """
    sums, others = sums_behind(program, value, fresh)
    again = [(s, old) for s in sums for old in returning(program, s, fresh, kept)]
    read = list(dict.fromkeys(v for s in (*sums, *(old for _, old in again)) for v in (s.result, s.before)))

    def test(t: Tensor, after: Tensor, *tensors: Tensor) -> Tensor:
        held = {**dict(zip(read, tensors, strict=True)), value: t}
        lost = loses_numbers(t, after, [(held[s.result], held[s.before], s.factor) for s in sums], others)
        for s, old in again:
            seen, eps = sizes(held[s.result], held[s.before]), torch.finfo(held[s.result].dtype).eps
            lost = lost | come_back(magnitudes(held[old.before]), seen, eps, abs(old.factor))
        return lost

    return read, test


def _factor(arc: Arc) -> float:
    """What the head is multiplied by; 1 where only the run knows."""
    return 1.0 if arc.measured else float(arc.factor or 1.0)


def _rounding(program: Program, value: int) -> list[Arc]:
    """The inverses that start from a value, and round."""
    at = program.made_at[value]
    return [a for a in program.ops[at].arcs if a.tail[0] == value and not (a.exact or a.partial)] if at >= 0 else []

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
        found += (Sum(v, a.head, 1.0 if a.measured else float(a.factor or 1.0)) for a in sums)
        todo += scaled
        others |= not (scaled or sums)
    return tuple(found), others


def returning(
    program: Program, value: int, fresh: Callable[[int], bool], kept: Collection[int]
) -> tuple[int | None, list[int]]:
    """What a sum was made of last, and which of the `kept` values it may hold again, if it takes off what was added to
    them before.
    """
    last = [a.head for a in _rounding(program, value) if a.sums and not a.follows and not fresh(a.head)]
    found, seen, todo = list[int](), set[int](), last[:1]
    while todo:
        v = todo.pop()
        if v in seen:
            continue
        seen.add(v)
        if v in kept and v not in last:
            found.append(v)
        op = program.ops[program.made_at[v]] if program.made_at[v] >= 0 else None
        above = program.data(op.ins) if op is not None and op.moves else [a.head for a in _rounding(program, v)]
        todo += (u for u in above if not fresh(u))
    return (last[0] if found else None), found


def loses(
    program: Program, value: int, fresh: Callable[[int], bool], kept: Collection[int]
) -> tuple[list[int], Callable[..., Tensor]]:
    """(values; a function of `value`, of what its step makes of it and of those values: whether the step changes
    numbers of the data), of which some are held anyway (`kept`).
    """
    sums, others = sums_behind(program, value, fresh)
    before = {s.result: returning(program, s.result, fresh, kept) for s in sums}
    pairs = [(result, last, once) for result, (last, values) in before.items() if last is not None for once in values]
    read = list(dict.fromkeys(v for vs in (*((s.result, s.before) for s in sums), *pairs) for v in vs))

    def test(t: Tensor, after: Tensor, *tensors: Tensor) -> Tensor:
        held = {**dict(zip(read, tensors, strict=True)), value: t}
        lost = loses_numbers(t, after, [(held[s.result], held[s.before], s.factor) for s in sums], others)
        for result, last, once in pairs:
            seen, eps = sizes(held[result], held[last]), torch.finfo(held[result].dtype).eps
            lost = lost | come_back(magnitudes(held[once]), seen, eps)
        return lost

    return read, test


def _rounding(program: Program, value: int) -> list[Arc]:
    """The inverses that start from a value, and round."""
    at = program.made_at[value]
    return [a for a in program.ops[at].arcs if a.tail[0] == value and not (a.exact or a.partial)] if at >= 0 else []

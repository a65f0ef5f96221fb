"""One inverse per value that is read: the intermediates of a composed inverse need not be right, only its result.

Of `u = y / s`, `x = u - t` only x is read, so the two are one arc `x <- (y / s) - t`, with one rounding error and one
correction. The other values that autograd reads (u, if s needs a gradient) are recomputed from corrected ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from revfx.passes.closure import Derivation, Forward, Invert, made_by, read_by
from revfx.passes.cuts import Step, needed
from revfx.passes.program import Arc, Program


def rounds(arc: Arc) -> bool:
    """Return whether an arc gives its head up to rounding only."""
    return not arc.exact


def composed_all(program: Program, steps: Sequence[Step]) -> tuple[Step, ...]:
    """Return the steps, composed, and joined where a cut in the midst of arithmetic would be one more value read."""
    found: list[tuple[Step, Step]] = []  # as they are, and composed
    for step in steps:
        one = step, composed(program, step)
        if found and (_is_arithmetic(program, step) or _is_arithmetic(program, found[-1][0])):
            first = found[-1][0]
            saved, again = (*first.saved, *step.saved), (*first.again, *step.again)
            derive, arcs = (*step.derive, *first.derive), (*step.arcs, *first.arcs)
            both = Step(first.start, step.stop, first.entry, step.exit, saved, derive, arcs, again)
            joint = both, composed(program, both)
            before = 0 if len(found) == 1 else _rounding(found[-1][1])  # the first step runs forwards
            if (0 if len(found) == 1 else _rounding(joint[1])) < before + _rounding(one[1]):
                found[-1] = joint
                continue
        found.append(one)
    return tuple(step for _, step in found)


def _rounding(step: Step) -> int:
    return sum(isinstance(d, Invert) and rounds(d.arc) for d in step.derive)


def _is_arithmetic(program: Program, step: Step) -> bool:
    """Return whether a step runs no function, and recomputes nothing of its exit."""
    return not step.again and not any(op.opaque for op in program.ops[step.start : step.stop])


def composed(program: Program, step: Step) -> Step:
    """Return the step with inverses from corrected values to the values that are read; all else is recomputed."""
    derive = needed(program, step.derive, step.entry)
    read = {*step.entry, *(v for d in derive if isinstance(d, Forward) for v in read_by(program, d))}
    inverses = {d.arc.head: d.arc for d in derive if isinstance(d, Invert)}
    order: list[Derivation] = []
    for d in reversed(derive):
        if isinstance(d, Forward):
            order.append(d)
        elif d.arc.head in read:
            arc = d.arc
            if rounds(arc):
                arc = _with(arc, {v: a for v, a in inverses.items() if v not in read})
            else:
                read.update(arc.tail)
            order.append(replace(d, arc=arc))
    order.reverse()
    known = {*step.exit, *(v for d in order for v in made_by(program, d))}.difference(step.again)
    order += [Forward(i) for i in range(step.start, step.stop) if not known.issuperset(program.ops[i].outs)]
    arcs = tuple(d.arc for d in needed(program, order, step.entry) if isinstance(d, Invert))
    return replace(step, derive=tuple(order), arcs=arcs)


def _with(arc: Arc, inner: dict[int, Arc]) -> Arc:
    """Return the arc that is composed with the `inner` ones."""
    chain: list[Arc] = []

    def visit(a: Arc) -> None:
        for v in a.tail:
            if v in inner and all(inner[v] is not b for b in chain):
                visit(inner[v])
        chain.append(a)

    visit(arc)
    if len(chain) == 1:
        return arc
    made = {a.head for a in chain}
    reads: dict[int, None] = {}
    runs: list[int] = []
    coded, measured, declared = False, False, ""
    for a in chain:
        reads.update(dict.fromkeys(a.tail))
        runs += a.runs
        coded |= a.coded
        measured |= a.measured
        declared = declared or a.declared
    tail = tuple(v for v in reads if v not in made)

    def solve(*values: Tensor) -> Tensor:
        env = dict(zip(tail, values, strict=True))
        for a in chain:
            env[a.head] = a.solve(*(env[v] for v in a.tail))
        return env[arc.head]

    return replace(arc, tail=tail, solve=solve, declared=declared, runs=tuple(runs), coded=coded, measured=measured)

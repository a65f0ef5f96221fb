"""Composition of inverses: a step inverts only the values that are read, each with a single rounding.

In `u = y / s`, `x = u - t` only x is read. The two inverses become one arc `x <- (y / s) - t`, with one rounding error
and one correction: u need not be accurate. If autograd reads u as well, u is recomputed from corrected values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from revfx.passes.closure import Derivation, Forward, Invert, made_by, read_by
from revfx.passes.cuts import Step, needed
from revfx.passes.program import Arc, DataFactor, Program


def rounds(arc: Arc) -> bool:
    """Return whether an arc gives its head only up to rounding."""
    return not arc.exact


def fuse_inverses(program: Program, steps: Sequence[Step]) -> tuple[Step, ...]:
    """Return the steps with composed inverses.

    Two steps are merged if that saves inverses that round: a cut in the midst of arithmetic is one more value to read.
    """
    found: list[tuple[Step, Step]] = []  # each step before and after its composition
    for step in steps:
        alone = _compose_step(program, step)
        if found and (_is_arithmetic(program, step) or _is_arithmetic(program, found[-1][0])):
            merged = _merge(found[-1][0], step)
            together = _compose_step(program, merged)
            count, count_apart = _count_rounding(together), _count_rounding(found[-1][1])
            if len(found) == 1:  # the first step runs forwards, without inverses
                count = count_apart = 0
            if count < count_apart + _count_rounding(alone):
                found[-1] = merged, together
                continue
        found.append((step, alone))
    return tuple(step for _, step in found)


def _count_rounding(step: Step) -> int:
    return sum(isinstance(d, Invert) and rounds(d.arc) for d in step.derive)


def _is_arithmetic(program: Program, step: Step) -> bool:
    """Return whether a step runs no function and recomputes nothing of its exit."""
    return not step.reselected and not any(op.opaque for op in program.ops[step.start : step.stop])


def _merge(first: Step, second: Step) -> Step:
    return Step(
        start=first.start,
        stop=second.stop,
        entry=first.entry,
        exit=second.exit,
        saved=(*first.saved, *second.saved),
        derive=(*second.derive, *first.derive),
        arcs=(*second.arcs, *first.arcs),
        reselected=(*first.reselected, *second.reselected),
    )


def _compose_step(program: Program, step: Step) -> Step:
    """Return the step with an inverse for each value that is read; all other values are recomputed."""
    derive = needed(program, step.derive, step.entry)
    read = set(step.entry)
    for d in derive:
        if isinstance(d, Forward):
            read.update(read_by(program, d))
    inverses = {d.arc.head: d.arc for d in derive if isinstance(d, Invert)}
    # From the last derivation on: an exact inverse reads its tail, one that rounds absorbs the unread inverses in it.
    order: list[Derivation] = []
    for d in reversed(derive):
        if isinstance(d, Forward):
            order.append(d)
        elif d.arc.head in read:
            arc = d.arc
            if rounds(arc):
                arc = _compose_arc(arc, {v: a for v, a in inverses.items() if v not in read})
            else:
                read.update(arc.tail)
            order.append(replace(d, arc=arc))
    order.reverse()
    # Recompute the values that the composed inverses skip.
    known = set(step.exit)
    for d in order:
        known.update(made_by(program, d))
    known.difference_update(step.reselected)
    order += [Forward(i) for i in range(step.start, step.stop) if not known.issuperset(program.ops[i].outs)]
    arcs = tuple(d.arc for d in needed(program, order, step.entry) if isinstance(d, Invert))
    return replace(step, derive=tuple(order), arcs=arcs)


def _compose_arc(arc: Arc, inner: dict[int, Arc]) -> Arc:
    """Return the composition of an arc with the `inner` ones that its tail needs."""
    chain: dict[int, Arc] = {}  # by head, each behind those that it needs

    def visit(arc: Arc) -> None:
        for v in arc.tail:
            if v in inner and v not in chain:
                visit(inner[v])
        chain[arc.head] = arc

    visit(arc)
    if len(chain) == 1:
        return arc
    reads: dict[int, None] = {}
    runs: list[int] = []
    coded, declared, factor = False, "", arc.factor
    for a in chain.values():
        reads.update(dict.fromkeys(a.tail))
        runs += a.runs
        coded |= a.coded
        factor = a.factor if isinstance(a.factor, DataFactor) else factor
        declared = declared or a.declared
    tail = tuple(v for v in reads if v not in chain)

    def solve(*values: Tensor) -> Tensor:
        env = dict(zip(tail, values, strict=True))
        for head, a in chain.items():
            env[head] = a.solve(*(env[v] for v in a.tail))
        return env[arc.head]

    return replace(arc, tail=tail, solve=solve, declared=declared, runs=tuple(runs), coded=coded, factor=factor)

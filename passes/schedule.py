"""The derivations of a step that run in the backward, and their order."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from revfx.passes.closure import Derivation, Forward, made_by
from revfx.passes.cuts import Step, needed
from revfx.passes.program import Program


def schedule(
    program: Program, step: Step, known: Iterable[int], replay: bool, wanted: Collection[int], rerun: Collection[int]
) -> list[Derivation]:
    """Order the derivations that regenerate a step's values.

    Args:
        program, step: the step, and the program that it belongs to.
        known: the values that exist already: with `replay` the step's entry, else its exit.
        replay: recompute everything forwards from the entry, instead of deriving the entry from the exit.
        wanted: the values to regenerate.
        rerun: operations to recompute in any case.
    """
    order: Sequence[Derivation] = step.derive
    if replay:
        order = list(map(Forward, range(step.start, step.stop)))
    known = set(known)
    fresh = [d for d in order if not known.issuperset(made_by(program, d))]
    targets = set(wanted)
    for i in rerun:
        targets.update(program.ops[i].ins)
    runs = needed(program, fresh, targets - known)
    running = {d.op for d in runs if isinstance(d, Forward)}
    runs += map(Forward, sorted(set(rerun) - running))
    return runs

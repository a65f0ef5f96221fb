"""The order of a step's derivations in the backward, and the values dropped behind each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from revfx.passes.closure import Derivation, Forward, made_by, read_by
from revfx.passes.cuts import Step, needed
from revfx.passes.program import Program


@dataclass(frozen=True, slots=True)
class Instruction:
    """One derivation to run; `capture`: with the tensors that autograd saves inside; `drop`: values not read again."""

    run: Derivation
    capture: bool
    drop: tuple[int, ...]


def schedule(
    program: Program, step: Step, known: Iterable[int], replay: bool, wanted: frozenset[int], captured: frozenset[int]
) -> tuple[Instruction, ...]:
    """Return the instructions that make `wanted` and run every operation of `captured` once, from the `known` values.

    With `replay` the step's entry is known and everything runs forwards; else its exit is and the entry is derived.
    """
    order: Sequence[Derivation] = [Forward(i) for i in range(step.start, step.stop)] if replay else step.derive
    have = set(known)
    inputs = [v for i in captured for v in program.ops[i].ins if v not in have]
    fresh = [d for d in order if not have.issuperset(made_by(program, d))]
    runs = needed(program, fresh, [*wanted - have, *inputs])
    running = {d.op for d in runs if isinstance(d, Forward)}
    runs = [*runs, *(Forward(i) for i in sorted(captured - running))]
    last: dict[int, int] = {}
    for i, d in enumerate(runs):
        last.update(dict.fromkeys((*read_by(program, d), *made_by(program, d)), i))
    drops: list[list[int]] = [[] for _ in runs]
    for v, i in last.items():
        if v not in wanted and not program.values[v].source:
            drops[i].append(v)
    captures = (isinstance(d, Forward) and d.op in captured for d in runs)
    return tuple(map(Instruction, runs, captures, map(tuple, drops)))

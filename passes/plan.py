"""What the backward does for each value: saved, recomputed or inverted; by which arc and in what order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from revfx.passes.closure import Derivation, Forward
from revfx.passes.cuts import Step, needed
from revfx.passes.program import Program


@dataclass(frozen=True, slots=True)
class Instruction:
    """One derivation to run; `capture` also takes what autograd saves inside it. `drop` lists values not read again."""

    run: Derivation
    capture: bool
    drop: tuple[int, ...]


def schedule(
    program: Program, step: Step, known: Iterable[int], replay: bool, wanted: frozenset[int], captured: frozenset[int]
) -> tuple[Instruction, ...]:
    """The instructions that make `wanted` and run every operation of `captured` once, from the `known` values.

    With `replay` the step's entry is known and everything runs forwards; else its exit is and the entry is derived.
    """
    order: Sequence[Derivation] = [Forward(i) for i in range(step.start, step.stop)] if replay else step.derive
    have = set(known)
    inputs = [v for i in captured for v in program.ops[i].ins if v not in have]
    runs = needed(program, _without(program, order, have), [*wanted - have, *inputs])
    running = {d.op for d in runs if isinstance(d, Forward)}
    runs = [*runs, *(Forward(i) for i in sorted(captured - running))]
    last: dict[int, int] = {}
    for i, d in enumerate(runs):
        for v in (*_reads(program, d), *_makes(program, d)):
            last[v] = i
    drops: list[list[int]] = [[] for _ in runs]
    for v, i in last.items():
        if v not in wanted and not program.values[v].source:
            drops[i].append(v)
    return tuple(
        Instruction(d, isinstance(d, Forward) and d.op in captured, tuple(drop))
        for d, drop in zip(runs, drops, strict=True)
    )


def _reads(program: Program, derivation: Derivation) -> tuple[int, ...]:
    return program.ops[derivation.op].ins if isinstance(derivation, Forward) else derivation.arc.tail


def _makes(program: Program, derivation: Derivation) -> tuple[int, ...]:
    return program.ops[derivation.op].outs if isinstance(derivation, Forward) else (derivation.arc.head,)


def _without(program: Program, order: Sequence[Derivation], have: set[int]) -> list[Derivation]:
    """`order` less the derivations that give nothing new."""
    return [d for d in order if any(v not in have for v in _makes(program, d))]


def amplification(step: Step, before: dict[int, float], measured: dict[int, float]) -> dict[int, float]:
    """How large a rounding error of 1 at the last kept cut has grown, per value of the step, from that of its entry.

    Along each stream an inverse multiplies the error by 1/|factor| (as declared, or as measured while the forward
    ran). One that amplifies also adds a rounding of its own: over n steps of amplification a that sums to (a^n -
    1)/(a - 1), ten times a^n for a momentum of 0.9.
    """
    growth = dict(before)
    for arc in reversed(step.arcs):
        if arc.factor is None:
            by = 1.0
        else:
            by = measured[int(arc.factor)] if arc.measured else arc.amplification
        grown = max(1.0, by * growth.get(arc.head, 1.0) + (by > 1.0))
        for v in arc.tail if arc.exact else arc.tail[:1]:
            growth[v] = max(growth.get(v, 1.0), grown)
    return {v: growth.get(v, 1.0) for v in step.exit}


def type_text(program: Program, value: int) -> str:
    """A value's dtype and shape in the form `float32[8, 256]`."""
    v = program.values[value]
    return f"{str(v.dtype).removeprefix('torch.')}{list(v.shape)}"

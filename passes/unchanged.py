"""How values of a program are scaled, so that a run can see whether numbers of the data come back in others."""

from __future__ import annotations

from revfx.passes.program import Arc, Program


def scales(program: Program, start: int, stop: int) -> dict[int, float]:
    """Return the magnitudes of what values were multiplied by since operation `start`, where other than 1."""
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


def _factor(arc: Arc) -> float:
    """Return what the head is multiplied by; 1 where only the run knows."""
    return 1.0 if arc.measured else float(arc.factor or 1.0)

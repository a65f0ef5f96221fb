"""What is there at the peak of a step: the largest tensors, by what made them."""

from __future__ import annotations

from dataclasses import dataclass

from revfx.fit.plan import Plan
from revfx.fit.simulate import Load, Model
from revfx.fit.tape import Op
from revfx.units import size


@dataclass(frozen=True)
class Holder:
    """Bytes that are there at the peak, and what made them."""

    bytes: int
    what: str

    def __str__(self) -> str:
        return f"{size(self.bytes)}: {self.what}"


def holders(model: Model, plan: Plan, load: Load) -> list[Holder]:
    """Return what is there at the peak, largest first."""
    tape, at = model.needs.tape, load.live.index(load.peak)
    op = tape.ops[min(at, len(tape.ops) - 1)]
    direction = "forward" if at < tape.turn else "backward"
    found: list[Holder] = []
    if at < len(tape.ops) and model.costs[at].scratch:
        found.append(Holder(model.costs[at].scratch, f"within {named(op)} itself"))
    for m in tape.memories:
        if m.source is None and m.born <= at and (m.dead is None or m.dead > at):
            maker = tape.ops[m.born] if m.born < len(tape.ops) else op
            whose = "a result of the forward" if m.born < tape.turn else "a gradient"
            found.append(Holder(m.size, f"{whose}, of {named(maker)}"))
    for v in plan.kept:
        m = tape.memory(v)
        until = model.through(model.needs.wanted[v])
        if m.dead is not None and m.dead <= at < until:
            maker = tape.ops[m.born]
            found.append(Holder(m.size, f"kept for the backward, of {named(maker)}"))
    if at == tape.turn and model.loss:
        found.append(Holder(model.loss, "what a loss outside may take, as far as is known"))
    if at >= tape.turn and model.late:
        found.append(Holder(model.late, "what the forward returned, which the caller may hold"))
    told = sum(h.bytes for h in found)
    if load.peak > told:
        found.append(Holder(load.peak - told, f"computed again for {named(op)} in the {direction}"))
    return sorted(found, key=lambda h: -h.bytes)


def named(op: Op) -> str:
    """Return what an operator is called, and where it is."""
    place = ", ".join(filter(None, (op.module, op.where)))
    return f"`{op.func}`" + f" ({place})" * bool(place)

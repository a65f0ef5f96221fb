"""The largest tensors at the peak of a step, by the operators that made them."""

from __future__ import annotations

from revfx.fit.plan import Plan
from revfx.fit.simulate import Load, Model
from revfx.units import size


def layer_at_peak(model: Model, load: Load) -> str:
    """Return the path of the module that runs at the peak, forwards or backwards; "" if none is known."""
    tape, at = model.needs.tape, min(load.live.index(load.peak) // 2, len(model.needs.tape.ops) - 1)
    if at < tape.backward_start:
        return tape.ops[at].module
    readers: dict[int, int] = {}  # by operator of the backward, a saved tensor that it reads
    for saved_index, uses in tape.reads.items():
        readers.update((o, saved_index) for o, _ in uses)
    last = max((o for o in readers if o <= at), default=None)
    if last is None:  # nothing was read yet: the peak is where the backward begins
        return tape.ops[tape.backward_start - 1].module
    return tape.ops[min(tape.saved[readers[last]].saved_at, tape.backward_start - 1)].module


def list_holders(model: Model, plan: Plan, load: Load) -> list[str]:
    """Return the tensors at the peak as text, largest first."""
    tape, slot = model.needs.tape, load.live.index(load.peak)
    at, runs = divmod(slot, 2)
    op = tape.ops[min(at, len(tape.ops) - 1)]
    found: list[tuple[int, str]] = []
    if runs and at < len(tape.ops) and model.costs[at].scratch:
        found.append((model.costs[at].scratch, f"within {op} itself"))
    for m in tape.allocations:
        end = model.end(m)
        if not m.is_outside and 2 * m.born < slot and (end is None or end > slot):
            maker = tape.ops[m.born] if m.born < len(tape.ops) else op
            kind = "a result of the forward" if m.born < tape.backward_start else "a gradient"
            found.append((m.size, f"{kind}, of {maker}"))
    for v in plan.kept:
        m = tape.allocation(v)
        until = model.through(model.needs.keepable[v])
        end = model.end(m)
        if end is not None and end <= slot < until:
            found.append((m.size, f"kept for the backward, of {tape.ops[m.born]}"))
    if slot == 2 * tape.backward_start + 1 and model.loss:
        found.append((model.loss, "assumed for a loss outside of the model"))
    explained = sum(n for n, _ in found)
    if load.peak > explained:
        half = "backward" if at >= tape.backward_start else "forward"
        found.append((load.peak - explained, f"computed again for {op} in the {half}"))
    return [f"{size(n)}: {text}" for n, text in sorted(found, key=lambda h: -h[0])]

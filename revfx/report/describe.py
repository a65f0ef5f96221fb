"""A region in words: what kind of couplings it is made of, and what becomes of each of its values."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from revfx.capture.plan import Plan
from revfx.passes.closure import Derivation, Invert, made_by
from revfx.passes.cuts import Step
from revfx.passes.formula import formula
from revfx.passes.plan import amplification, precision
from revfx.passes.program import Program
from revfx.passes.regions import Region
from revfx.report.data import RegionInfo, ValueLine
from revfx.rules import op_name


LETTERS = {"bfloat": "bf", "float": "f", "complex": "c", "uint": "u", "int": "i"}


def type_name(dtype: torch.dtype, shape: Sequence[object]) -> str:
    """Format a type as `f32[8,256]`."""
    name = re.sub(f"^({'|'.join(LETTERS)})", lambda long: LETTERS[long[0]], str(dtype).removeprefix("torch."))
    return f"{name}[{','.join(map(str, shape))}]"


def types_of(tree: Any) -> tuple[str, ...]:
    """Return the types of all tensors in nested arguments, and the other leaves as they are written."""
    return tuple(
        type_name(x.dtype, "?" * x.dim() if x.is_nested else x.shape) if isinstance(x, Tensor) else repr(x)[:40]
        for x in pytree.tree_leaves(tree)
    )


def describe(
    program: Program,
    region: Region,
    kept_cuts: Collection[int],
    names: Mapping[int, str],
    module: str,
    uncoded: Collection[int] = (),
    code_bytes: int | None = None,
) -> RegionInfo:
    """Describe a region in words.

    `kept_cuts` numbers the cuts that are kept, `names` says what operations are called where that is not their own
    name, `module` whose code the region lies in. `uncoded` values are kept, as codes would be no smaller; `code_bytes`
    is what the codes take, None where there are none.
    """
    steps = region.steps
    kept = dict.fromkeys((*region.exit, *region.entry, *region.side, *region.saved))
    anchored = {*uncoded, *(v for j in kept_cuts if 0 < j < len(steps) for v in steps[j].entry)} - kept.keys()
    return RegionInfo(
        module=module,
        first=program.ops[region.start].where,
        last=program.ops[region.stop - 1].where,
        kind=_kind(steps),
        couplings=sum(1 for s in steps if s.inverts or s.saved),
        steps=len(steps),
        streams=tuple(type_name(v.dtype, v.shape) for v in map(program.values.__getitem__, region.exit)),
        kept=tuple(program.values[v].name for v in kept),
        kept_bytes=region.kept_bytes + program.nbytes(tuple(anchored)),
        kept_cuts=len({*kept_cuts, 0, len(steps)}),
        freed_bytes=region.freed_bytes,
        drift=_drift(program, steps, kept_cuts) if code_bytes is None else 0.0,
        code_bytes=code_bytes or 0,
        values=tuple(_lines(program, region, kept_cuts, {*kept, *anchored}, names)),
        entry=tuple(_entry(program, region)),
    )


def _kind(steps: Sequence[Step]) -> str:
    """Return the usual name of the couplings, by what their inverses divide by."""
    arcs = [a for s in steps for a in s.arcs if not a.exact]
    scales = sorted({abs(a.factor) for a in arcs if a.factor is not None and not a.measured})
    kinds = {
        "additive": any(a.factor is None for a in arcs),
        "affine": any(a.measured for a in arcs),
        **{f"scaled by {s:.3g}": True for s in scales[:3]},
        "on a grid": any(a.grid for a in arcs),
    }
    return ", ".join(kind for kind, there in kinds.items() if there) or "layout"


def _drift(program: Program, steps: Sequence[Step], kept_cuts: Collection[int]) -> float:
    """Estimate the relative error of a regenerated cut; 0 where nothing rounds.

    Roundings add up as a random walk, a quarter of eps each, and grow by what inverses amplify.
    """
    worst, growth, rounded = 0.0, dict[int, float](), 0
    for j in range(len(steps) - 1, -1, -1):
        if j + 1 in kept_cuts or j + 1 == len(steps):
            growth, rounded = {}, 0
        rounding = [a for a in steps[j].arcs if not (a.exact or a.grid)]
        rounded += bool(rounding)
        growth = amplification(steps[j], growth, {a.scaled_by: 1 / a.typical for a in rounding if a.measured})
        if j in kept_cuts or not rounding:
            continue
        eps = max(precision(program.values[a.head].dtype) for a in rounding)
        worst = max(worst, eps / 4 * rounded**0.5 * max(growth.values(), default=1.0))
    return worst


def _lines(
    program: Program, region: Region, kept_cuts: Collection[int], saved: Collection[int], names: Mapping[int, str]
) -> Iterator[ValueLine]:
    first = _first_derivations(program, region.steps, kept_cuts)
    calls: dict[int, str] = {}
    for i in range(region.start, region.stop):
        read = (program.values[v] for v in program.ops[i].ins)
        calls[i] = f"{names.get(i, program.ops[i].name)}({', '.join(v.name for v in read if not v.source)})"
    opaque = {v: calls[i] for i in calls if program.ops[i].opaque for v in program.ops[i].outs[:1]}
    barred = {a.head: a.barred for i in calls for a in program.ops[i].arcs if a.barred}
    for number, step in enumerate(region.steps):
        for i in range(step.start, step.stop):
            for v in program.ops[i].outs:
                value, way = program.values[v], first.get(v)
                inverse = way.arc if isinstance(way, Invert) and v not in saved else None
                action = "save" if v in saved else "recompute" if inverse is None else "invert"
                how = f"{value.name} <- {calls[i]}" if inverse is None else formula(program, inverse, opaque)
                how += f": {barred[v]}" if v in region.saved and v in barred else ""
                kind, where = type_name(value.dtype, value.shape), program.ops[i].where
                reads = _names(program, program.ops[i].ins)
                solved = () if inverse is None else _names(program, inverse.tail)
                yield ValueLine(value.name, kind, action, how, where, number, value.nbytes, reads, solved)


def _entry(program: Program, region: Region) -> Iterator[ValueLine]:
    """Yield the values from before a region that its operations read: they are kept."""
    read = dict.fromkeys(v for op in program.ops[region.start : region.stop] for v in program.data(op.ins))
    for v in read:
        value, made = program.values[v], program.made_at[v]
        if made < region.start:
            kind, where = type_name(value.dtype, value.shape), program.ops[made].where if made >= 0 else ""
            yield ValueLine(value.name, kind, "save", f"{value.name}, from before the region", where, -1, value.nbytes)


def _names(program: Program, values: Sequence[int]) -> tuple[str, ...]:
    return tuple(program.values[v].name for v in program.data(values))


def _first_derivations(program: Program, steps: Sequence[Step], kept_cuts: Collection[int]) -> dict[int, Derivation]:
    """Return how the backward, which goes from the last step to the first, comes by each value."""
    found: dict[int, Derivation] = {}
    for number in range(len(steps) - 1, 0, -1):  # the first step, and one whose entry is kept, runs forwards from there
        for d in () if number in kept_cuts else steps[number].derive:
            for v in made_by(program, d):
                if v not in steps[number].exit:
                    found.setdefault(v, d)
    return found


def describe_recorded(
    plan: Plan, region: Region, kept_cuts: Collection[int], uncoded: Collection[int], code_bytes: int | None
) -> RegionInfo:
    """Describe a region of a recorded program, with the innermost module whose code holds all of it, and the operations
    between it and the regions next to it. Modules that are called whole go by their path.
    """
    nodes = plan.lowered.op_nodes
    names = {i: str(n.target) if n.op == "call_module" else op_name(n.target) for i, n in enumerate(nodes)}
    scopes = [str(n.meta["scope"]).split(".") for n in nodes[region.start : region.stop] if "scope" in n.meta]
    levels = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*scopes, strict=False))
    module = ".".join(level[0] for level in levels)
    outside = [s for s in plan.segments if s.region is None]
    before = tuple(names[i] for s in outside if s.stop == region.start for i in range(s.start, s.stop))
    after = tuple(names[i] for s in outside if s.start == region.stop for i in range(s.start, s.stop))
    found = describe(plan.lowered.program, region, kept_cuts, names, module, uncoded, code_bytes)
    return replace(found, before=before, after=after)

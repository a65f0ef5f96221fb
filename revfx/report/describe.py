"""A region in words: the kind of its couplings, and the action of the backward for each of its values."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from revfx.passes.closure import Derivation, Invert, made_by
from revfx.passes.cuts import Step
from revfx.passes.formula import formula
from revfx.passes.program import Program
from revfx.passes.regions import Region
from revfx.report.data import RegionInfo, ValueLine


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
    code_bytes: int | None = None,
) -> RegionInfo:
    """Describe a region in words.

    Args:
        program, region: the region and its program.
        kept_cuts: numbers of the cuts that are kept.
        names: names of operations, by their number; the others go by their own.
        module: path of the module that holds the region.
        code_bytes: size of the codes; None without codes.
    """
    steps = region.steps
    kept = dict.fromkeys((*region.exit, *region.entry, *region.side, *region.saved))
    kept_inside = {v for j in kept_cuts if 0 < j < len(steps) for v in steps[j].entry} - kept.keys()
    return RegionInfo(
        module=module,
        first=program.ops[region.start].where,
        last=program.ops[region.stop - 1].where,
        kind=_coupling_kind(steps),
        couplings=sum(1 for s in steps if s.inverts or s.saved),
        steps=len(steps),
        streams=tuple(type_name(v.dtype, v.shape) for v in map(program.values.__getitem__, region.exit)),
        kept=tuple(program.values[v].name for v in kept),
        kept_bytes=region.kept_bytes + program.nbytes(tuple(kept_inside)),
        kept_cuts=len({*kept_cuts, 0, len(steps)}),
        freed_bytes=region.freed_bytes,
        lossless=code_bytes is not None or all(a.exact for s in steps for a in s.arcs),
        code_bytes=code_bytes or 0,
        values=tuple(_value_lines(program, region, kept_cuts, {*kept, *kept_inside}, names)),
    )


def _coupling_kind(steps: Sequence[Step]) -> str:
    """Return the usual name of the couplings, by the divisors of their inverses."""
    arcs = [a for s in steps for a in s.arcs if not a.exact]
    scales = sorted({abs(a.factor) for a in arcs if a.factor is not None and not a.measured})
    kinds = {
        "additive": any(a.factor is None for a in arcs),
        "affine": any(a.measured for a in arcs),
        **{f"scaled by {s:.3g}": True for s in scales[:3]},
    }
    return ", ".join(kind for kind, there in kinds.items() if there) or "layout"


def _value_lines(
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
                yield ValueLine(value.name, kind, action, how, where, number)


def _first_derivations(program: Program, steps: Sequence[Step], kept_cuts: Collection[int]) -> dict[int, Derivation]:
    """Return how the backward, which goes from the last step to the first, comes by each value."""
    found: dict[int, Derivation] = {}
    for number in range(len(steps) - 1, 0, -1):  # the first step, and one with a kept entry, runs forwards from there
        for d in () if number in kept_cuts else steps[number].derive:
            for v in made_by(program, d):
                if v not in steps[number].exit:
                    found.setdefault(v, d)
    return found

"""A region in words: the kind of its couplings, and the action of the backward for each of its values."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from revfx.passes.closure import Derivation, Invert, made_by
from revfx.passes.cuts import Step
from revfx.passes.formula import formula
from revfx.passes.program import DataFactor, Program, Value
from revfx.passes.regions import Region
from revfx.report.data import RegionInfo, ValueLine


MAX_SCALES = 3  # in the kind of couplings
LETTERS = {"bfloat": "bf", "float": "f", "complex": "c", "uint": "u", "int": "i"}


def type_name(dtype: torch.dtype, shape: Sequence[object]) -> str:
    """Format a type as `f32[8,256]`."""
    name = re.sub(f"^({'|'.join(LETTERS)})", lambda long: LETTERS[long[0]], str(dtype).removeprefix("torch."))
    return f"{name}[{','.join(map(str, shape))}]"


def types_of(tree: Any) -> tuple[str, ...]:
    """Return the types of all tensors in nested arguments, and the `repr` of the other leaves."""
    found: list[str] = []
    for x in pytree.tree_leaves(tree):
        if isinstance(x, Tensor):
            found.append(type_name(x.dtype, "?" * x.dim() if x.is_nested else x.shape))
        else:
            found.append(repr(x)[:40])
    return tuple(found)


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
        names: names of operations by number, in the place of the program's.
        module: path of the module that holds the region.
        code_bytes: size of the codes; None without codes.
    """
    steps = region.steps
    kept = dict.fromkeys((*region.exit, *region.entry, *region.side, *region.saved))
    inner_cuts = [steps[j].entry for j in kept_cuts if 0 < j < len(steps)]
    kept_inside = set(itertools.chain(*inner_cuts)) - kept.keys()
    return RegionInfo(
        module=module,
        first=program.ops[region.start].where,
        last=program.ops[region.stop - 1].where,
        kind=_coupling_kind(steps),
        couplings=sum(1 for s in steps if s.is_inverted or s.saved),
        steps=len(steps),
        streams=tuple(_value_type(program.values[v]) for v in region.exit),
        kept=tuple(program.values[v].name for v in kept),
        kept_bytes=region.kept_bytes + program.nbytes(tuple(kept_inside)),
        kept_cuts=len({*kept_cuts, 0, len(steps)}),
        freed_bytes=region.freed_bytes,
        lossless=code_bytes is not None or not any(s.is_inverted for s in steps),
        code_bytes=code_bytes or 0,
        values=tuple(_value_lines(program, region, kept_cuts, {*kept, *kept_inside}, names)),
    )


def _value_type(value: Value) -> str:
    return type_name(value.dtype, value.shape)


def _coupling_kind(steps: Sequence[Step]) -> str:
    """Return the usual name of the couplings, by the divisors of their inverses."""
    is_additive = is_affine = False
    scales: set[float] = set()
    for arc in itertools.chain.from_iterable(s.arcs for s in steps):
        if arc.exact:
            continue
        if arc.factor is None:
            is_additive = True
        elif isinstance(arc.factor, DataFactor):
            is_affine = True
        else:
            scales.add(arc.factor)
    kinds = ["additive"] * is_additive + ["affine"] * is_affine
    kinds += [f"scaled by {s:.3g}" for s in sorted(scales)[:MAX_SCALES]]
    return ", ".join(dict.fromkeys(kinds)) or "layout"


def _value_lines(
    program: Program, region: Region, kept_cuts: Collection[int], saved: Collection[int], names: Mapping[int, str]
) -> Iterator[ValueLine]:
    """Yield the lines of a region; `saved`: values that are held for the backward."""
    # Calls as text, and by value the text of its opaque call, and the reason why no inverse gives it.
    calls: dict[int, str] = {}
    opaque: dict[int, str] = {}
    barred: dict[int, str] = {}
    for i in range(region.start, region.stop):
        op = program.ops[i]
        operands = [program.values[v].name for v in op.ins if not program.values[v].source]
        calls[i] = f"{names.get(i, op.name)}({', '.join(operands)})"
        if op.opaque:
            opaque.update(dict.fromkeys(op.outs[:1], calls[i]))
        for arc in op.arcs:
            if arc.barred:
                barred[arc.head] = arc.barred

    first = _first_derivations(program, region.steps, kept_cuts)
    for number, step in enumerate(region.steps):
        for i in range(step.start, step.stop):
            op = program.ops[i]
            for v in op.outs:
                value, derivation = program.values[v], first.get(v)
                action, how = "recompute", f"{value.name} <- {calls[i]}"
                if v in saved:
                    action = "save"
                elif isinstance(derivation, Invert):
                    action, how = "invert", formula(program, derivation.arc, opaque)
                if v in region.saved and v in barred:
                    how += f": {barred[v]}"
                yield ValueLine(value.name, _value_type(value), action, how, op.where, number)


def _first_derivations(program: Program, steps: Sequence[Step], kept_cuts: Collection[int]) -> dict[int, Derivation]:
    """Return the derivation of each value in the backward, which goes from the last step to the first."""
    found: dict[int, Derivation] = {}
    for number in range(len(steps) - 1, 0, -1):  # the first step is replayed forwards
        if number in kept_cuts:  # so is a step with a kept entry
            continue
        for d in steps[number].derive:
            for v in made_by(program, d):
                if v not in steps[number].exit:
                    found.setdefault(v, d)
    return found

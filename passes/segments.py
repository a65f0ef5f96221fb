"""A program cut into segments, plain ones and regions, and the readable text of the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from revfx.passes.arcs import Lowered
from revfx.passes.program import Program
from revfx.passes.regions import Region
from revfx.rules import op_name


@dataclass(frozen=True, slots=True)
class Segment:
    """Operations start..stop-1, which run as they are, or as a region."""

    start: int
    stop: int
    region: Region | None


def segments(program: Program, regions: Sequence[Region]) -> tuple[Segment, ...]:
    """Return the whole program as segments in order."""
    cut, at = list[Segment](), 0
    for region in regions:
        cut += [Segment(at, region.start, None), Segment(region.start, region.stop, region)]
        at = region.stop
    return tuple(s for s in (*cut, Segment(at, len(program.ops), None)) if s.start < s.stop)


def text(lowered: Lowered, cut: Sequence[Segment]) -> str:
    """Return the program as Python-like lines; in a region each has the action of the backward for the value."""
    program = lowered.program
    lines: list[str] = []
    for number, segment in enumerate(cut):
        region = segment.region
        if region is not None:
            kept = ", ".join(program.values[v].name for v in dict.fromkeys((*region.entry, *region.side, *region.exit)))
            lines.append(
                f"# region {number}: {len(region.steps)} steps, {sum(s.inverts for s in region.steps)} inverted;"
                f" keeps {kept} ({region.kept_bytes:,} bytes), frees {region.freed_bytes:,} bytes"
            )
        for i in range(segment.start, segment.stop):
            line = _line(lowered, i)
            if region is not None:
                line = f"    {line:<64}  # {_action(program, region, i)}"
            lines.append(line.rstrip())
        if region is not None:
            lines.append("# end of region")
    returned = ", ".join(program.values[v].name for v in program.outputs)
    return "\n".join([*lines, f"return {returned}"])


def _line(lowered: Lowered, index: int) -> str:
    op, node = lowered.program.ops[index], lowered.op_nodes[index]
    outs = ", ".join(lowered.program.values[v].name for v in op.outs) or "_"
    args = [repr(a) for a in node.args] + [f"{k}={v!r}" for k, v in node.kwargs.items()]
    if op_name(node.target) == "getitem":
        return f"{outs} = {args[0]}[{_index(node.args[1])}]"
    return f"{outs} = {op_name(node.target)}({', '.join(args)})"


def _index(value: object) -> str:
    """Return an index as it is written between brackets: `..., :8`."""
    if isinstance(value, tuple):
        return ", ".join(_index(v) for v in value)
    if isinstance(value, slice):
        ends = [value.start, value.stop] if value.step is None else [value.start, value.stop, value.step]
        return ":".join("" if e is None else repr(e) for e in ends)
    return "..." if value is Ellipsis else repr(value)


def _action(program: Program, region: Region, index: int) -> str:
    saved = {*region.entry, *region.exit, *region.saved, *region.side}
    inverted = {a.head for s in region.steps[1:] for a in s.arcs}
    said: list[str] = []
    for v, value in ((v, program.values[v]) for v in program.ops[index].outs):
        action = "save" if v in saved else "invert" if v in inverted else "recompute"
        said.append(f"{action} {str(value.dtype).removeprefix('torch.')}{list(value.shape)}")
    return ", ".join(said)

"""The segments of a program, regions and the parts between them, and their readable text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from revfx.passes.arcs import Lowered
from revfx.passes.program import Program
from revfx.passes.regions import Region
from revfx.rules import op_name


@dataclass(frozen=True, slots=True)
class Segment:
    """Operations start..stop-1: a region, or a plain part of the program (None)."""

    start: int
    stop: int
    region: Region | None


def segments(program: Program, regions: Sequence[Region]) -> tuple[Segment, ...]:
    """Divide the program into segments, in order."""
    found: list[Segment] = []
    at = 0
    for region in regions:
        if at < region.start:
            found.append(Segment(at, region.start, None))
        found.append(Segment(region.start, region.stop, region))
        at = region.stop
    if at < len(program.ops):
        found.append(Segment(at, len(program.ops), None))
    return tuple(found)


def text(lowered: Lowered, cut: Sequence[Segment]) -> str:
    """Return the program as Python-like lines; those of a region end with the action of the backward for each value."""
    program = lowered.program
    lines: list[str] = []
    for number, segment in enumerate(cut):
        region, numbers = segment.region, range(segment.start, segment.stop)
        if region is None:
            lines += [_line(lowered, i) for i in numbers]
            continue
        kept = _names(program, dict.fromkeys((*region.entry, *region.side, *region.exit)))
        lines.append(
            f"# region {number}: {len(region.steps)} steps, {sum(s.is_inverted for s in region.steps)} inverted;"
            f" keeps {kept} ({region.kept_bytes:,} bytes), frees {region.freed_bytes:,} bytes"
        )
        for i in numbers:
            lines.append(f"    {_line(lowered, i):<64}  # {_action(program, region, i)}".rstrip())
        lines.append("# end of region")
    return "\n".join([*lines, f"return {_names(program, program.outputs)}"])


def _names(program: Program, values: Iterable[int]) -> str:
    return ", ".join(program.values[v].name for v in values)


def _line(lowered: Lowered, index: int) -> str:
    op, node = lowered.program.ops[index], lowered.op_nodes[index]
    outs = _names(lowered.program, op.outs) or "_"
    args = [*map(repr, node.args), *(f"{k}={v!r}" for k, v in node.kwargs.items())]
    name = op_name(node.target)
    if name == "getitem":
        return f"{outs} = {args[0]}[{_format_index(node.args[1])}]"
    return f"{outs} = {name}({', '.join(args)})"


def _format_index(value: object) -> str:
    """Return an index as it is written between brackets: `..., :8`."""
    if isinstance(value, tuple):
        return ", ".join(map(_format_index, value))
    if isinstance(value, slice):
        ends = [value.start, value.stop]
        if value.step is not None:
            ends.append(value.step)
        return ":".join("" if end is None else repr(end) for end in ends)
    return "..." if value is Ellipsis else repr(value)


def _action(program: Program, region: Region, index: int) -> str:
    """Return the action of the backward for each result of an operation: save, invert or recompute."""
    saved = {*region.entry, *region.exit, *region.saved, *region.side}
    inverted = set[int]()
    for step in region.steps[1:]:
        inverted.update(arc.head for arc in step.arcs)
    actions: list[str] = []
    for v in program.ops[index].outs:
        action = "recompute"
        if v in saved:
            action = "save"
        elif v in inverted:
            action = "invert"
        value = program.values[v]
        actions.append(f"{action} {str(value.dtype).removeprefix('torch.')}{list(value.shape)}")
    return ", ".join(actions)

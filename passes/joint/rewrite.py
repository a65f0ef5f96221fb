"""The rewrite of a joint graph: reversible regions of its forward are regenerated where the backward reads them.

The rest is torch's: its min-cut partitioner splits the rewritten graph. Regenerated nodes must be in the backward;
they are put right before their first use, so that one layer's are freed before the next one's are made.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from revfx.errors import Reason, Refusal
from revfx.passes.composed import composed_all
from revfx.passes.cuts import Step
from revfx.passes.diagnose import diagnose
from revfx.passes.facts import Facts, ancestors
from revfx.passes.joint.borders import POLICY, store_borders
from revfx.passes.joint.forward import (
    BACKWARD,
    FORWARD,
    ForwardGraph,
    after_tangents,
    forward_half,
    output_args,
    read_later,
    stateless_inputs,
    written_inputs,
)
from revfx.passes.joint.kept_cuts import choose_kept_cuts
from revfx.passes.joint.record import Recorder, Unrecordable, pulled
from revfx.passes.joint.regenerate import Regenerator, RewriteOptions
from revfx.passes.program import Program
from revfx.passes.regions import Region, RegionSummary, find_regions, summary


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome for one graph: its regions, and the parts that are left to torch, with reasons.

    `details` holds the program, and of each region its steps and the cuts that are kept.
    """

    regions: tuple[RegionSummary, ...]
    refusals: tuple[Refusal, ...]
    details: tuple[tuple[Program, Region, frozenset[int]], ...] = ()

    def __str__(self) -> str:
        lines = [f"# region: {r}" for r in self.regions]
        return "\n".join(lines or ["# nothing reversible", *(f"#   {r}" for r in self.refusals[:8])])


def rewrite(
    joint: fx.Graph, num_outputs: int, static: Collection[int], options: RewriteOptions, facts: Facts | None
) -> Report:
    """Rewrite `joint` in place; return the outcome.

    Without a region it stays as it is, but for what would be wrong: reads of inputs that the step updates. `facts` is
    what was seen of the values of its inputs, if anybody looked; what relies on them checks them again in every run.
    """
    recorder, facts = Recorder(joint, options.decompositions), facts or ()
    _pin_updates(joint, num_outputs, recorder)
    forward = forward_half(joint, num_outputs, static, facts, coded=options.coder is not None)
    program = forward.lowered.program
    regions, stuck = find_regions(program)
    refusals = tuple(dict.fromkeys(r for s in stuck for r in diagnose(program, s)))
    readers = read_later(joint, forward.nodes)
    regenerator = Regenerator(joint, forward, recorder, options)
    found: list[RegionSummary] = []
    details: list[tuple[Program, Region, frozenset[int]]] = []
    for region in reversed(regions):
        if options.coder is None:
            cuts = choose_kept_cuts(program, region.steps)
        else:
            region, cuts = replace(region, steps=composed_all(program, region.steps)), frozenset[int]()
        wanted, ops = _wanted(forward, region, readers)
        freed = _freed(forward, region, wanted)
        if sum(freed) - max(freed, default=0) <= region.kept_bytes:
            continue
        try:
            regenerator.region(region, wanted, ops, cuts)
        except Unrecordable as error:
            first = program.ops[region.start]
            refusals += (Refusal(Reason.DATA_DEPENDENT, (first.name,), first.where, str(error)),)
            continue
        _uncheckpoint(forward, region)
        found.append(summary(program, region, len(cuts) + 2, sum(freed)))
        details.append((program, region, cuts))
    if found:
        _rewire(joint, forward, regenerator, readers)
        if options.stored is not None:
            steps = [step for _, region, _ in details for step in region.steps]
            for step_of in (_steps_forward(forward, steps), _steps_backward(joint, forward, regenerator)):
                store_borders(step_of, regenerator.checks.kept, options.stored)
    return Report(tuple(reversed(found)), refusals, tuple(reversed(details)))


def _pin_updates(joint: fx.Graph, num_outputs: int, recorder: Recorder) -> None:
    """Let the backward read what it needs of an input that the step writes from a copy made at the start.

    The backward runs after the write; torch would let it compute from the input's new content.
    """
    outputs = [n for n in output_args(joint)[:num_outputs] if isinstance(n, fx.Node)]
    updates = {n for n in joint.nodes if n.target is torch.ops.aten.copy_.default}
    written = written_inputs(joint)
    if not written:
        return
    late = after_tangents(joint.nodes)
    ahead = ancestors([*outputs, *(n.args[1] for n in updates if n.args[1] not in late)])
    needed = ancestors(read_later(joint, ahead), stateless_inputs)
    first = next(n for n in joint.nodes if n.op != "placeholder")
    for p in written:
        if p in needed:
            with joint.inserting_before(first):
                copy = recorder.record(lambda t: t.clone(), [p], FORWARD, p)
            copy.meta["recompute"] = CheckpointPolicy.MUST_SAVE
            copy.meta["copy_of"] = p
            for user in [u for u in p.users if u is not copy and u not in updates and u.op != "output"]:
                user.replace_input_with(p, copy)


def _wanted(forward: ForwardGraph, region: Region, readers: Collection[fx.Node]) -> tuple[set[int], set[int]]:
    """Return a region's values that the backward reads, and the operations with tuples that it takes apart itself."""
    program = forward.lowered.program
    again = {v for step in region.steps for v in step.again}
    kept = {*region.exit, *region.entry, *region.saved, *region.side} - again
    outs = {i: program.ops[i].outs for i in range(region.start, region.stop)}
    wanted = {v for of_one in outs.values() for v in of_one if forward.value_node(v) in readers}
    tuples = {i for i in outs if forward.op_node(i) not in map(forward.value_node, outs[i])}
    return wanted - kept, {i for i in tuples if forward.op_node(i) in readers}


def _uncheckpoint(forward: ForwardGraph, region: Region) -> None:
    """Take back torch's marks for a user's checkpoint: the region recomputes."""
    program = forward.lowered.program
    for i in range(region.start, region.stop):
        for node in (forward.op_node(i), *map(forward.value_node, program.ops[i].outs)):
            for mark in POLICY:
                node.meta.pop(mark, None)


def _freed(forward: ForwardGraph, region: Region, wanted: Collection[int]) -> list[int]:
    """Return, per step, the bytes that the backward reads and that need not be kept."""
    program = forward.lowered.program
    found: list[int] = []
    for step in region.steps:
        read: dict[int, None] = {}
        for op in program.ops[step.start : step.stop]:
            for v in op.outs:
                if v in wanted and not program.constant[v]:
                    read[v] = None
        found.append(program.nbytes(tuple(read)))
    return found


def _rewire(
    joint: fx.Graph, forward: ForwardGraph, new: Regenerator, readers: Mapping[fx.Node, Sequence[fx.Node]]
) -> None:
    """Let the backward read regenerated values, and put nodes where they are first needed."""
    for v in list(new.values):
        for reader in readers.get(forward.value_node(v), ()):
            reader.replace_input_with(forward.value_node(v), new.laid_out(v))
    for op, node in new.tuples.items():
        for reader in readers.get(forward.op_node(op), ()):
            reader.replace_input_with(forward.op_node(op), node)
    for node, result in new.stands.items():
        node.replace_all_uses_with(result)
        if node in new.checks.kept:
            new.checks.kept.remove(node)
            new.checks.kept.add(result)
        joint.erase_node(node)
    alive = ancestors(new.output.all_input_nodes)
    new.checks.compare(alive)
    new.whole_steps(alive)
    checks = list(new.checks.raise_at_the_end())
    for node in new.checks.kept:
        if node.op != "placeholder":
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
            if node not in forward.nodes:
                _claim(joint, node)
    nodes = list(joint.nodes)
    known = forward.nodes | after_tangents(nodes)
    tags = {n: n.meta.get("partitioner_tag") for n in nodes if n not in known}
    late = {n for n, tag in tags.items() if tag == BACKWARD or (tag != FORWARD and not n.is_impure())}
    order = list(pulled([n for n in nodes if n not in late or n in checks], new.checks.attached))
    for node in order[:-1]:
        new.output.prepend(node)
    placed = set(order)
    for node in [n for n in reversed(joint.nodes) if n not in placed]:  # of nodes that nothing reads
        joint.erase_node(node)


def _steps_forward(forward: ForwardGraph, steps: Sequence[Step]) -> dict[fx.Node, int]:
    """Return in which step each operation of a region runs, and gives its values; numbered in program order."""
    found: dict[fx.Node, int] = {}
    for number, step in enumerate(sorted(steps, key=lambda s: s.start)):
        for i in range(step.start, step.stop):
            values = (forward.value_node(v) for v in forward.lowered.program.ops[i].outs)
            found.update(dict.fromkeys((forward.op_node(i), *values), number))
    return found


def _steps_backward(joint: fx.Graph, forward: ForwardGraph, new: Regenerator) -> dict[fx.Node, int]:
    """Return, for each node of the backward, the latest step that regenerated anything before it."""
    found: dict[fx.Node, int] = {}
    number = 0
    for node in joint.nodes:
        number = max(number, new.step_of.get(node, 0))
        theirs = node in forward.nodes or node.meta.get("partitioner_tag") == FORWARD
        if node.op == "call_function" and not theirs:
            found[node] = number
    return found


def _claim(joint: fx.Graph, node: fx.Node) -> None:
    """Make torch count `node` to the forward, though no output needs it: by an assertion that checks nothing.

    Of a node that it doesn't count to the forward the partitioner ignores that it must be saved.
    """
    with joint.inserting_before(node.next):
        assertion = joint.call_function(torch.ops.aten._assert_tensor_metadata.default, (node,))
    assertion.meta = {"val": None, "partitioner_tag": FORWARD}

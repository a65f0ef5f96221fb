"""The rewrite of a joint graph: the backward regenerates reversible regions of the forward.

The rest is torch's: its min-cut partitioner splits the rewritten graph. Regenerated nodes must be in the backward. They
are placed right before their first use, so that one layer's are freed before the next one's are computed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from revfx.errors import Reason, Refusal
from revfx.passes.composed import fuse_inverses
from revfx.passes.cuts import Step
from revfx.passes.diagnose import diagnose
from revfx.passes.facts import Facts, ancestors
from revfx.passes.joint.borders import POLICY, store_borders
from revfx.passes.joint.forward import (
    BACKWARD,
    FORWARD,
    ForwardGraph,
    after_tangents,
    find_updates,
    first_operation,
    forward_half,
    output_nodes,
    read_later,
    stateless_inputs,
    written_inputs,
    written_values,
)
from revfx.passes.joint.kept_cuts import choose_kept_cuts
from revfx.passes.joint.record import Recorder, Unrecordable, order_lazily
from revfx.passes.joint.regenerate import Regenerator, RewriteOptions
from revfx.passes.program import Program
from revfx.passes.regions import Region, RegionSummary, find_regions, summary


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome for one graph: its regions, and the reasons for the parts that are left to torch.

    `details` holds, for each region, the program, the region with its steps, and the cuts that are kept.
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
    """Rewrite a joint graph in place.

    Without a region only one thing changes: the backward reads copies of inputs that the step updates.

    Args:
        joint: the graph.
        num_outputs: the number of the forward's outputs.
        static: the numbers of the primals that outlive the step: parameters and buffers.
        options: those of the inner compiler.
        facts: facts about the values of the inputs, if they are known. Every run checks those that are relied on.
    """
    recorder, facts = Recorder(joint, options.decompositions), facts or ()
    _pin_updates(joint, num_outputs, recorder)
    forward = forward_half(joint, num_outputs, static, facts, coded=options.coder is not None)
    program = forward.lowered.program
    regions, stuck = find_regions(program)
    refusals: dict[Refusal, None] = {}
    for place in stuck:
        refusals.update(dict.fromkeys(diagnose(program, place)))
    unrecordable: list[Refusal] = []

    # Regenerate the regions in the order of the backward.
    readers = read_later(joint, forward.nodes)
    regenerator = Regenerator(joint, forward, recorder, options)
    found: list[RegionSummary] = []
    details: list[tuple[Program, Region, frozenset[int]]] = []
    for region in reversed(regions):
        cuts = frozenset[int]()
        if options.coder is None:
            cuts = choose_kept_cuts(program, region.steps)
        else:
            region = replace(region, steps=fuse_inverses(program, region.steps))
        wanted, ops = _wanted(forward, region, readers)
        freed = _freed_bytes(program, region, wanted)
        if sum(freed) - max(freed, default=0) <= region.kept_bytes:
            continue
        try:
            regenerator.regenerate(region, wanted, ops, cuts)
        except Unrecordable as error:
            first = program.ops[region.start]
            unrecordable.append(Refusal(Reason.DATA_DEPENDENT, (first.name,), first.where, str(error)))
            continue
        _remove_checkpoint_marks(forward, region)
        found.append(summary(program, region, len(cuts) + 2, sum(freed)))
        details.append((program, region, cuts))

    # Let the backward read them, and mark the borders of steps for a compiler that fuses.
    if found:
        _rewire(joint, forward, regenerator, readers)
        if options.stored is not None:
            kept = regenerator.checks.kept
            steps: list[Step] = []
            for _, region, _ in details:
                steps += region.steps
            halves = _steps_forward(forward, steps), _steps_backward(joint, forward, regenerator)
            for step_of in halves:
                store_borders(step_of, kept, options.stored)
    return Report(tuple(reversed(found)), (*refusals, *unrecordable), tuple(reversed(details)))


def _pin_updates(joint: fx.Graph, num_outputs: int, recorder: Recorder) -> None:
    """Let the backward read an input that the step writes from a copy made at the start of the forward.

    The backward runs after the write; torch would let it compute from the input's new content.
    """
    written = written_inputs(joint)
    if not written:
        return
    updates = find_updates(joint)
    ahead = ancestors([*output_nodes(joint, num_outputs), *written_values(joint)])
    needed = ancestors(read_later(joint, ahead), stateless_inputs)
    first = first_operation(joint)
    for p in written:
        if p not in needed:
            continue
        with joint.inserting_before(first):
            copy = recorder.record(lambda t: t.clone(), [p], FORWARD, p)
        copy.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        copy.meta["copy_of"] = p
        for user in list(p.users):
            if user is not copy and user not in updates and user.op != "output":
                user.replace_input_with(p, copy)


def _wanted(forward: ForwardGraph, region: Region, readers: Collection[fx.Node]) -> tuple[set[int], set[int]]:
    """Return the values of a region that the backward reads, and the operations with tuples that it unpacks itself."""
    program = forward.lowered.program
    wanted: set[int] = set()
    unpacked: set[int] = set()
    for i in range(region.start, region.stop):
        outs, op_node = program.ops[i].outs, forward.op_node(i)
        value_nodes = list(map(forward.value_node, outs))
        for v, node in zip(outs, value_nodes, strict=True):
            if node in readers:
                wanted.add(v)
        if op_node in readers and op_node not in value_nodes:
            unpacked.add(i)
    kept = {*region.exit, *region.entry, *region.saved, *region.side}
    for step in region.steps:
        kept.difference_update(step.reselected)
    return wanted - kept, unpacked


def _remove_checkpoint_marks(forward: ForwardGraph, region: Region) -> None:
    """Remove torch's marks for a user's checkpoint from a region, which recomputes anyway."""
    program = forward.lowered.program
    for i in range(region.start, region.stop):
        for node in (forward.op_node(i), *map(forward.value_node, program.ops[i].outs)):
            for mark in POLICY:
                node.meta.pop(mark, None)


def _freed_bytes(program: Program, region: Region, wanted: set[int]) -> list[int]:
    """Return, for each step, the bytes that the backward reads and that are not kept."""
    found: list[int] = []
    for step in region.steps:
        freed = wanted.intersection(program.results(step.start, step.stop))
        found.append(program.nbytes(v for v in freed if not program.constant[v]))
    return found


def _rewire(
    joint: fx.Graph, forward: ForwardGraph, new: Regenerator, readers: Mapping[fx.Node, Sequence[fx.Node]]
) -> None:
    """Let the backward read regenerated values, and place nodes where they are first read."""
    for v in list(new.values):
        for reader in readers.get(forward.value_node(v), ()):
            reader.replace_input_with(forward.value_node(v), new.backward_node(v))
    for op, node in new.reruns.items():
        for reader in readers.get(forward.op_node(op), ()):
            reader.replace_input_with(forward.op_node(op), node)
    for node, result in new.replacements.items():
        node.replace_all_uses_with(result)
        if node in new.checks.kept:
            new.checks.kept.remove(node)
            new.checks.kept.add(result)
        joint.erase_node(node)

    # Only now is it known which regenerated values the backward reads: those are compared with the forward's.
    alive = ancestors(new.output.all_input_nodes)
    new.checks.compare(alive)
    new.attach_entries(alive)
    checks = new.checks.add_final_checks()
    for node in new.checks.kept:
        if node.op != "placeholder":
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
            if node not in forward.nodes:
                _tie_to_forward(joint, node)
    _place_late(joint, forward, new, checks)


def _place_late(joint: fx.Graph, forward: ForwardGraph, new: Regenerator, checks: Collection[fx.Node]) -> None:
    """Move the new nodes of the backward to their first use, and erase those that nothing reads."""
    nodes = list(joint.nodes)
    traced = forward.nodes | after_tangents(nodes)
    early: list[fx.Node] = []
    for node in nodes:
        tag = node.meta.get("partitioner_tag")
        is_late = node not in traced and (tag == BACKWARD or (tag != FORWARD and not node.is_impure()))
        if node in checks or not is_late:
            early.append(node)
    order = list(order_lazily(early, new.checks.attached))
    for node in order[:-1]:
        new.output.prepend(node)
    placed = set(order)
    for node in reversed(nodes):
        if node not in placed:
            joint.erase_node(node)


def _steps_forward(forward: ForwardGraph, steps: Sequence[Step]) -> dict[fx.Node, int]:
    """Return the step of each operation in a region, and of its values; numbered in program order."""
    found: dict[fx.Node, int] = {}
    for number, step in enumerate(sorted(steps, key=lambda s: s.start)):
        for i in range(step.start, step.stop):
            values = map(forward.value_node, forward.lowered.program.ops[i].outs)
            found.update(dict.fromkeys((forward.op_node(i), *values), number))
    return found


def _steps_backward(joint: fx.Graph, forward: ForwardGraph, new: Regenerator) -> dict[fx.Node, int]:
    """Return, for each node of the backward, the latest step that regenerated anything before it."""
    found: dict[fx.Node, int] = {}
    number = 0
    for node in joint.nodes:
        number = max(number, new.step_of.get(node, 0))
        is_forward = node in forward.nodes or node.meta.get("partitioner_tag") == FORWARD
        if node.op == "call_function" and not is_forward:
            found[node] = number
    return found


def _tie_to_forward(joint: fx.Graph, node: fx.Node) -> None:
    """Make torch count `node` to the forward, though no output needs it, by an assertion that checks nothing.

    The partitioner saves a node that must be saved only if it counts it to the forward.
    """
    with joint.inserting_before(node.next):
        assertion = joint.call_function(torch.ops.aten._assert_tensor_metadata.default, (node,))
    assertion.meta = {"val": None, "partitioner_tag": FORWARD}

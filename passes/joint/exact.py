"""The exact forward of a joint graph: its regions on a grid."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from torch import Tensor, fx

from revfx.passes.cuts import Stuck
from revfx.passes.exact import exact_regions, put_on_grid
from revfx.passes.facts import Facts
from revfx.passes.grid import Coupling, ToGrid
from revfx.passes.joint.forward import FORWARD, Forward, forward_half
from revfx.passes.joint.record import Recorder, pulled
from revfx.passes.program import Program
from revfx.passes.regions import Region, find_regions


def exact_forward(
    joint: fx.Graph, num_outputs: int, static: Collection[int], facts: Facts | None, k: int, recorder: Recorder
) -> tuple[Forward, tuple[Region, ...], tuple[Stuck, ...], Program]:
    """Return the forward half of `joint` once its regions compute on the grid 2^-k, the regions, and, of the program as
    it was written, where the search for them got stuck.
    """
    forward = forward_half(joint, num_outputs, static, facts)
    lowered = forward.lowered
    program, regions, stuck = exact_regions(lowered.program, carries=False)
    if not regions:
        return forward, (), stuck, program
    theirs = replace(
        lowered,
        program=program,
        op_nodes=tuple(forward.op_node(i) for i in range(len(lowered.op_nodes))),
        value_nodes=tuple(forward.value_node(v) for v in range(len(lowered.value_nodes))),
    )

    def insert(before: fx.Node, function: Callable[..., Tensor], args: Sequence[fx.Node], like: fx.Node) -> fx.Node:
        by = function.value if isinstance(function, (Coupling, ToGrid)) else function
        with joint.inserting_before(before):
            return recorder.record(by, args, FORWARD, like)

    put_on_grid(theirs, regions, k, insert)
    *order, output = pulled(list(joint.nodes), {})  # new nodes may read sizes that stand further down
    for node in order:
        output.prepend(node)
    forward = forward_half(joint, num_outputs, static, facts, exact=True)
    return forward, find_regions(forward.lowered.program, all_pay=True)[0], stuck, program

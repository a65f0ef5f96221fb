"""The exact forward of a joint graph: its regions on a grid, and a check in every run that they have room there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from revfx.passes.cuts import Stuck
from revfx.passes.exact import exact_regions, put_on_grid
from revfx.passes.facts import Facts
from revfx.passes.grid import Coupling, ToGrid, limit
from revfx.passes.joint import FORWARD, Forward, forward_half
from revfx.passes.program import Program
from revfx.passes.record import Recorder, pulled
from revfx.passes.regions import Region, find_regions


Found = tuple[Forward, tuple[Region, ...], tuple[Stuck, ...], Program]


def exact_forward(
    joint: fx.Graph, num_outputs: int, static: Collection[int], facts: Facts | None, k: int, recorder: Recorder
) -> Found:
    """The forward half of `joint` once its regions compute on the grid 2^-k, the regions, and, of the program as it was
    written, where the search for them got stuck.
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
    _check_ranges(joint, forward, recorder)
    return forward, find_regions(forward.lowered.program, all_pay=True)[0], stuck, program


def _check_ranges(joint: fx.Graph, forward: Forward, recorder: Recorder) -> None:
    """None; every run raises where a value leaves the grid, or is not finite."""
    program = forward.lowered.program
    for v, value in enumerate(program.values):
        if value.grid is None:
            continue
        node, most = forward.value_node(v), limit(value.dtype, value.grid)
        where = program.ops[program.made_at[v]].where
        message = (
            f"revfx: exact={value.grid}: a value at {where or 'an unknown place'} is not finite or not below {most:.4g}"
            f", where a grid of steps 2^-{value.grid} has room in {value.dtype}; use a smaller `exact`, scale the "
            "activations down, or do without"
        )
        with joint.inserting_before(node.next):
            ok = recorder.record(lambda t, most=most: t.abs().amax() < most, [node], FORWARD, node)
            check = joint.call_function(torch.ops.aten._assert_async.msg, (ok, message))
            check.meta = {"val": None, "partitioner_tag": FORWARD}

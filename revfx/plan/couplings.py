"""Couplings of a tape: the regions that the graph passes find in it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from revfx.engine.tape import Op, Tape
from revfx.errors import Refusal
from revfx.passes.arcs import Lowered, lower
from revfx.passes.composed import composed_all
from revfx.passes.diagnose import diagnose
from revfx.passes.facts import Fact, annotate, constants, facts_about, truths_of
from revfx.passes.joint.forward import find_sources
from revfx.passes.regions import Region, find_regions
from revfx.plan.constants import constants_of
from revfx.plan.graph import TapeGraph, graph_of


@dataclass(frozen=True)
class Couplings:
    """The regions of a tape."""

    tape: Tape
    of: TapeGraph
    lowered: Lowered
    regions: tuple[Region, ...]
    refusals: tuple[Refusal, ...]

    def op(self, number: int) -> Op:
        """Return the operator of the tape that an operation of the program stands for."""
        return self.tape.ops[self.of.op_of[self.lowered.op_nodes[number]]]


def find_couplings(tape: Tape, lossless: bool = True, patience: int | None = None) -> Couplings:
    """Find the regions of a tape, and why others are none.

    Args:
        tape: of a forward.
        lossless: inverses that round get codes.
        patience: see `find_regions`.
    """
    of, lowered = lowered_tape(tape, lossless)
    found, stuck = find_regions(lowered.program, patience)
    regions = tuple(replace(r, steps=composed_all(lowered.program, r.steps)) for r in found)
    refusals = [r for s in stuck[:32] for r in diagnose(lowered.program, s)]
    return Couplings(tape, of, lowered, regions, tuple(dict.fromkeys(refusals)))


def lowered_tape(tape: Tape, lossless: bool, from_inputs: bool = False) -> tuple[TapeGraph, Lowered]:
    """Return a tape as a graph and as a program.

    Args:
        tape: the tape.
        lossless: inverses that round get codes; else those that codes alone make right are left out, if nothing is
            there but the inputs.
        from_inputs: nothing is there but the inputs: no random numbers either.
    """
    of = graph_of(tape, from_inputs)
    graph = of.graph
    held: dict[fx.Node, tuple[Fact, ...]] = {}
    for value, t in constants_of(tape).items():
        if value in of.node_of:
            held[of.node_of[value]] = facts_about(t) or truths_of(t)
    known = annotate(graph, held, None)
    for node, value in constants(graph, known).items():
        node.meta["constant"] = value
    for node, facts in known.items():
        node.meta["facts"] = facts
    sources = find_sources(graph, of.lasting, frozenset(), () if from_inputs else list(graph.nodes))
    barred = {} if from_inputs and not lossless else None
    return of, lower(graph, sources=sources, barred=barred, lossless=lossless)

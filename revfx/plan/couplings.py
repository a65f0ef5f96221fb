"""The search for couplings in a recorded forward: the regions, runs of couplings, that the graph passes find."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from revfx.engine.tape import Op, Tape
from revfx.errors import Refusal
from revfx.passes.arcs import Lowered, lower
from revfx.passes.composed import fuse_inverses
from revfx.passes.diagnose import diagnose
from revfx.passes.facts import Fact, annotate, binary_facts, facts_about, fold_constants
from revfx.passes.joint.forward import find_sources
from revfx.passes.regions import Region, find_regions
from revfx.plan.constants import constants_of
from revfx.plan.graph import TapeGraph, graph_of


MAX_DIAGNOSES = 32


@dataclass(frozen=True)
class Couplings:
    """The regions of a tape, and its graph and program."""

    tape: Tape
    tape_graph: TapeGraph
    lowered: Lowered
    regions: tuple[Region, ...]
    refusals: tuple[Refusal, ...]

    def op(self, number: int) -> Op:
        """Return the operator of the tape of operation `number` of the program."""
        return self.tape.ops[self.tape_graph.op_of[self.lowered.op_nodes[number]]]


def find_couplings(tape: Tape, lossless: bool = True, max_searched: int | None = None) -> Couplings:
    """Find the regions of a tape, and the reasons why the search stopped between them (of `MAX_DIAGNOSES` places).

    Args:
        tape: a recorded forward.
        lossless: inverses that round get codes, which make them exact; otherwise they are used as they are.
        max_searched: see `find_regions`.
    """
    tape_graph, lowered = lowered_tape(tape, lossless)
    found, stuck = find_regions(lowered.program, max_searched)
    regions = tuple(replace(r, steps=fuse_inverses(lowered.program, r.steps)) for r in found)
    refusals: dict[Refusal, None] = {}
    for dead_end in stuck[:MAX_DIAGNOSES]:
        refusals.update(dict.fromkeys(diagnose(lowered.program, dead_end)))
    return Couplings(tape, tape_graph, lowered, regions, tuple(refusals))


def lowered_tape(tape: Tape, lossless: bool, from_inputs: bool = False) -> tuple[TapeGraph, Lowered]:
    """Return a tape as a graph, whose nodes have facts and constants in their `meta`, and as a program.

    Args:
        tape: the tape.
        lossless: inverses that round get codes. If not, and `from_inputs`, inverses that need codes are left out.
        from_inputs: the backward knows the inputs only: no random numbers that the forward drew.
    """
    tape_graph = graph_of(tape, from_inputs)
    graph = tape_graph.graph
    facts_of_constants: dict[fx.Node, tuple[Fact, ...]] = {}
    for value, t in constants_of(tape).items():
        if value in tape_graph.node_of:
            facts_of_constants[tape_graph.node_of[value]] = facts_about(t) or binary_facts(t)
    known = annotate(graph, facts_of_constants, None)
    for node, constant in fold_constants(graph, known).items():
        node.meta["constant"] = constant
    for node, facts in known.items():
        node.meta["facts"] = facts
    sources = find_sources(graph, tape_graph.lasting, frozenset(), () if from_inputs else list(graph.nodes))
    barred = {} if from_inputs and not lossless else None  # a dictionary collects the inverses that are left out
    return tape_graph, lower(graph, sources=sources, barred=barred, lossless=lossless)

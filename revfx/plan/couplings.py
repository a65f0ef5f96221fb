"""Couplings of a tape: the regions that the graph passes find in it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from revfx.engine.tape import Tape
from revfx.errors import Refusal
from revfx.passes.arcs import Lowered, lower
from revfx.passes.composed import composed_all
from revfx.passes.diagnose import diagnose
from revfx.passes.facts import Fact, annotate, constants, facts_about, truths_of
from revfx.passes.joint.forward import find_sources
from revfx.passes.regions import Region, find_regions
from revfx.plan.graph import TapeGraph, graph_of


@dataclass(frozen=True)
class Couplings:
    """The regions of a tape."""

    tape: Tape
    of: TapeGraph
    lowered: Lowered
    regions: tuple[Region, ...]
    refusals: tuple[Refusal, ...]


def find_couplings(tape: Tape, lossless: bool = True) -> Couplings:
    """Find the regions of a tape, and why others are none; `lossless`: inverses that round get codes."""
    of = graph_of(tape)
    graph = of.graph
    held: dict[fx.Node, tuple[Fact, ...]] = {}
    for value, t in tape.constants.items():
        if value in of.node_of:
            held[of.node_of[value]] = facts_about(t) or truths_of(t)
    known = annotate(graph, held, None)
    for node, value in constants(graph, known).items():
        node.meta["constant"] = value
    for node, facts in known.items():
        node.meta["facts"] = facts
    sources = find_sources(graph, of.lasting, frozenset(), list(graph.nodes))
    lowered = lower(graph, sources=sources, lossless=lossless)
    found, stuck = find_regions(lowered.program)
    regions = tuple(replace(r, steps=composed_all(lowered.program, r.steps)) for r in found)
    refusals = [r for s in stuck[:32] for r in diagnose(lowered.program, s)]
    return Couplings(tape, of, lowered, regions, tuple(dict.fromkeys(refusals)))

"""The reasons for a stuck search: the values that nothing derives, traced to the operations that lose them."""

from __future__ import annotations

from dataclasses import replace

import networkx as nx

from revfx.errors import Cause, Reason, Refusal
from revfx.passes.cuts import DeadEnd
from revfx.passes.program import Operation, Program


def diagnose(program: Program, stuck: DeadEnd) -> list[Refusal]:
    """Return the root causes of a stuck cut, each with the operation and the user's file and line.

    Unknown values form a graph with edges to the unknown values that their arcs read. A root cause is a sink of its
    condensation. It is either a value that no arc computes, or a cycle: solving for the value takes the value.
    """
    if stuck.barrier is not None:
        op = program.ops[stuck.start]
        return [stuck.barrier.to_refusal(op.name, op.where)]
    if stuck.fewest_unknown is not None:
        stuck = replace(stuck, start=stuck.fewest_unknown[0], unknown=stuck.fewest_unknown[1])
    condensed = nx.condensation(_dependencies(program, stuck))
    found: list[Refusal] = []
    for component in condensed.nodes:
        if condensed.out_degree(component) > 0:
            continue
        members: set[int] = condensed.nodes[component]["members"]
        if len(members) > 1:
            found += _explain_cycle(program, stuck, members)
        else:
            found.append(_explain_lost(program, stuck, *members))
    return found


def _dependencies(program: Program, stuck: DeadEnd) -> nx.DiGraph[int]:
    """Return the graph of unknown values, with edges to those that their inverses in the tried operations read."""
    window = range(stuck.start, stuck.stop)
    graph: nx.DiGraph[int] = nx.DiGraph()
    todo = list(stuck.unknown)
    graph.add_nodes_from(todo)
    while todo:
        value = todo.pop()
        made = program.made_at[value]
        read: list[int] = []
        if made in window:
            read += program.data(program.ops[made].ins)
        if value in stuck.unknown:
            for i in window:
                for arc in program.ops[i].arcs:
                    if arc.head == value:
                        read += program.data(arc.tail)
        for other in read:
            if other in stuck.unknown or program.made_at[other] in window:
                if other not in graph:
                    todo.append(other)
                graph.add_edge(value, other)
    return graph


def _readers(program: Program, stuck: DeadEnd, value: int) -> list[Operation]:
    """Return the tried operations that read a value."""
    return [program.ops[i] for i in program.users[value] if stuck.start <= i < stuck.stop]


def _explain_lost(program: Program, stuck: DeadEnd, value: int) -> Refusal:
    """Return the refusal for a value that no tried operation has an inverse for."""
    name, made = program.values[value].name, program.made_at[value]
    for op in _readers(program, stuck, value):
        cause = dict(op.refused).get(value, Cause(Reason.NON_INVERTIBLE, f"`{op.name}` has no inverse"))
        return Refusal(cause.kind, (op.name,), op.where, f"`{name}` can't be computed back: {cause.text}")
    maker, where = (program.ops[made].name, program.ops[made].where) if made >= 0 else (name, "")
    return Refusal(Reason.VALUE_LOST, (maker,), where, f"`{name}` is read nowhere that could give it back")


def _explain_cycle(program: Program, stuck: DeadEnd, members: set[int]) -> list[Refusal]:
    """Return the refusal for a value that would be solved from something computed from itself: `y = x + f(x)`.

    If the whole cycle passes through a value without an inverse, then that value is the cause.
    """
    waist = _find_waist(program, stuck, members)
    if waist is not None:
        return [_explain_lost(program, stuck, waist)]
    for i in reversed(range(stuck.start, stuck.stop)):
        op = program.ops[i]
        for arc in op.arcs:
            if arc.head in members and arc.head in stuck.unknown:
                return [_explain_addition(program, stuck, op, arc.head)]
    return []


def _explain_addition(program: Program, stuck: DeadEnd, op: Operation, head: int) -> Refusal:
    """Return the refusal for a value that operation `op` adds to something computed from the value."""
    name, names, via = program.values[head].name, [op.name], ""
    for reader in _readers(program, stuck, head):
        if reader is not op:
            names.append(reader.name)
            via = f", and `{reader.name}` of it"
            break
    text = f"`{name}` is added to something computed from itself{via}: solving for it would need it"
    return Refusal(Reason.NO_COUPLING, tuple(names), op.where, text)


def _find_waist(program: Program, stuck: DeadEnd, members: set[int]) -> int | None:
    """Return the last of `members` without an inverse at which all members made before are no longer read.

    Values that are read below the tried operations are known, so they do not count.
    """
    heads: set[int] = set()
    for op in program.ops[stuck.start : stuck.stop]:
        for arc in op.arcs:
            heads.add(arc.head)
    waist, last_use = None, -1
    for value in sorted(members, key=program.made_at.__getitem__):
        if program.last_use[value] >= stuck.stop:
            continue
        if program.made_at[value] >= last_use and value not in heads:
            waist = value
        last_use = max(last_use, program.last_use[value])
    return waist

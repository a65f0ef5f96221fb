"""Why a search got stuck: the values that nothing derives, traced to the operations that lose them."""

from __future__ import annotations

from dataclasses import replace

import networkx as nx

from revfx.errors import Cause, Reason, Refusal
from revfx.passes.cuts import Stuck
from revfx.passes.program import Program


def diagnose(program: Program, stuck: Stuck) -> list[Refusal]:
    """Return the root causes of a stuck cut, each with the operation and the user's file and line.

    Values that are unknown and the unknown values that each of their arcs would need form a graph. Its condensation
    has sinks: a value that no arc gives (its readers have no inverse for it), or a cycle (a value that is needed to
    compute what it should be solved from).
    """
    if stuck.barrier is not None:
        op = program.ops[stuck.start]
        return [stuck.barrier.to_refusal(op.name, op.where)]
    if stuck.nearest is not None:
        stuck = replace(stuck, start=stuck.nearest[0], unknown=stuck.nearest[1])
    graph = _dependencies(program, stuck)
    condensed = nx.condensation(graph)
    found: list[Refusal] = []
    for component in (c for c in condensed.nodes if condensed.out_degree(c) == 0):
        members: set[int] = condensed.nodes[component]["members"]
        found += _loop(program, stuck, members) if len(members) > 1 else [_lost(program, stuck, *members)]
    return found


def _dependencies(program: Program, stuck: Stuck) -> nx.DiGraph[int]:
    """Return edges from each unknown value to those that its inverse arcs in the tried operations need."""
    window = range(stuck.start, stuck.stop)
    graph: nx.DiGraph[int] = nx.DiGraph()
    todo = list(stuck.unknown)
    graph.add_nodes_from(todo)
    while todo:
        value = todo.pop()
        made = program.made_at[value]
        needs = [program.ops[made].ins] if made in window else []
        if value in stuck.unknown:
            needs += [a.tail for i in window for a in program.ops[i].arcs if a.head == value]
        for other in (v for tail in needs for v in program.data(tail)):
            if other in stuck.unknown or program.made_at[other] in window:
                if other not in graph:
                    todo.append(other)
                graph.add_edge(value, other)
    return graph


def _lost(program: Program, stuck: Stuck, value: int) -> Refusal:
    name, made = program.values[value].name, program.made_at[value]
    for op in (program.ops[i] for i in program.users[value] if stuck.start <= i < stuck.stop):
        cause = dict(op.refused).get(value, Cause(Reason.NON_INVERTIBLE, f"`{op.name}` has no inverse"))
        return Refusal(cause.kind, (op.name,), op.where, f"`{name}` can't be computed back: {cause.text}")
    by, where = (program.ops[made].name, program.ops[made].where) if made >= 0 else (name, "")
    return Refusal(Reason.VALUE_LOST, (by,), where, f"`{name}` is read nowhere that could give it back")


def _loop(program: Program, stuck: Stuck, members: set[int]) -> list[Refusal]:
    """Return a value that would have to be solved from something computed from itself: `y = x + f(x)`.

    Unless all of them pass through one that nothing gives back: then they form a loop only because of that.
    """
    if (waist := _waist(program, stuck, members)) is not None:
        return [_lost(program, stuck, waist)]
    wanted, window = members.intersection(stuck.unknown), reversed(range(stuck.start, stuck.stop))
    for i, head in ((at, a.head) for at in window for a in program.ops[at].arcs if a.head in wanted):
        op, name = program.ops[i], program.values[head].name
        readers = [program.ops[u] for u in program.users[head] if u != i and stuck.start <= u < stuck.stop]
        via = f", and `{readers[0].name}` of it" if readers else ""
        text = f"`{name}` is added to something computed from itself{via}: solving for it would need it"
        return [Refusal(Reason.NO_COUPLING, (op.name, *(r.name for r in readers[:1])), op.where, text)]
    return []


def _waist(program: Program, stuck: Stuck, members: set[int]) -> int | None:
    """Return the last of `members` that no inverse gives and that is read when none made before it is read any more.

    What is read below the tried operations is known.
    """
    inner = [v for v in members if program.last_use[v] < stuck.stop]
    heads = {a.head for i in range(stuck.start, stuck.stop) for a in program.ops[i].arcs}
    found, until = None, -1
    for value in sorted(inner, key=lambda v: program.made_at[v]):
        if program.made_at[value] >= until and value not in heads:
            found = value
        until = max(until, program.last_use[value])
    return found

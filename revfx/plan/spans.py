"""Spans of a tape: the operators of each step of a region, and how to go backwards over them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from revfx.engine.tape import Tape
from revfx.passes.closure import Forward
from revfx.passes.cuts import Step
from revfx.passes.facts import Fact
from revfx.passes.program import Arc
from revfx.plan.couplings import Couplings
from revfx.plan.replays import Recompute


@dataclass(frozen=True)
class TapeInverse:
    """An inverse in the values of a tape, and the facts about some of them that it relies on."""

    arc: Arc
    head: int
    tail: tuple[int, ...]
    facts: tuple[tuple[int, Fact], ...]


@dataclass(frozen=True)
class Span:
    """Operators first..last of a tape that become a unit.

    Attributes:
        entry, exit: the live values before and after.
        actions: the steps of going backwards, in the operators and values of the tape.
        given: values of the exit that going backwards starts from.
        kept: values that are held until the backward, as the plan says.
        inverted: operators that inverses were derived from.
        constants: constant operands of these, such as indices, with their elements.
        region: the number of the region that the span belongs to.
    """

    first: int
    last: int
    entry: tuple[int, ...]
    exit: tuple[int, ...]
    actions: tuple[Recompute | TapeInverse, ...]
    given: frozenset[int]
    kept: frozenset[int]
    inverted: frozenset[int]
    constants: tuple[tuple[int, Fact], ...] = ()
    region: int = 0

    @property
    def ops(self) -> range:
        """The numbers of the operators."""
        return range(self.first, self.last + 1)

    @property
    def recomputed(self) -> set[int]:
        """The operators that going backwards runs again."""
        return {a.op for a in self.actions if isinstance(a, Recompute)}

    @property
    def inverses(self) -> list[TapeInverse]:
        """The inverses among the actions."""
        return [a for a in self.actions if isinstance(a, TapeInverse)]


def find_spans(found: Couplings) -> list[Span]:
    """Return the spans of all regions, in order."""
    result: list[Span] = []
    before = -1  # the last operator of the span before
    for number, region in enumerate(found.regions):
        of_region: list[Span] = []
        for step in region.steps:
            span = _span_of(found, step, region.side)
            while of_region and min(span.recomputed, default=span.first) < span.first:
                span = _merge(of_region.pop(), span)
            of_region.append(span)
        for span in _merge_first_map(of_region):
            result.append(replace(_extend_to_operands(found.tape, span, before), region=number))
            before = span.last
    return result


def _span_of(found: Couplings, step: Step, side: tuple[int, ...]) -> Span:
    """Return the span of a step, in the terms of the tape; `side` are the side inputs of its region."""
    lowered, of_tape = found.lowered, found.tape_graph

    def value(v: int) -> int:
        return of_tape.value_of[lowered.value_nodes[v]]

    ops = [of_tape.op_of[node] for node in lowered.op_nodes[step.start : step.stop]]
    actions: list[Recompute | TapeInverse] = []
    recomputed: set[int] = set()
    inverted: set[int] = set()
    for d in step.derive:
        number = of_tape.op_of[lowered.op_nodes[d.op]]
        if isinstance(d, Forward):
            actions.append(Recompute(number))
            recomputed.add(number)
        else:
            facts = tuple((value(v), fact) for v, fact in d.arc.assumes)
            actions.append(TapeInverse(d.arc, value(d.arc.head), tuple(map(value, d.arc.tail)), facts))
            inverted.add(number)
    inverted |= set(ops) - recomputed
    return Span(
        first=min(ops),
        last=max(ops),
        entry=tuple(map(value, step.entry)),
        exit=tuple(map(value, step.exit)),
        actions=tuple(actions),
        given=frozenset(value(v) for v in step.exit if v not in step.reselected),
        kept=frozenset(map(value, (*step.saved, *side))),
        inverted=frozenset(inverted),
        constants=_constant_operands(found, inverted, step),
    )


def _constant_operands(found: Couplings, inverted: set[int], step: Step) -> tuple[tuple[int, Fact], ...]:
    """Return the constants that inverted operators of a step read, with their elements."""
    of_tape = found.tape_graph
    elements: dict[int, Fact] = {}
    for node in found.lowered.op_nodes[step.start : step.stop]:
        if of_tape.op_of[node] not in inverted:
            continue
        for operand in node.all_input_nodes:
            constant = operand.meta.get("constant")
            if constant is not None and operand in of_tape.value_of:
                elements[of_tape.value_of[operand]] = tuple(constant.flatten().tolist())
    return tuple(elements.items())


def _merge_first_map(spans: list[Span]) -> list[Span]:
    """Merge the spans up to a linear map before the first coupling: the start of a chain is replayed forwards.

    So the inverse of the map, which is expensive, is not needed.
    """
    has_long_codes: dict[int, bool] = {}  # by the number of a span with inverses that round: these are linear maps
    for number, span in enumerate(spans):
        coded = [a.arc.coded for a in span.inverses if not a.arc.exact]
        if coded:
            has_long_codes[number] = all(coded)
    if list(has_long_codes.values())[:2] != [True, False]:
        return spans
    stop = 1 + next(iter(has_long_codes))
    return [functools.reduce(_merge, spans[:stop]), *spans[stop:]]


def _merge(first: Span, second: Span) -> Span:
    """Return two spans in a row as one."""
    return Span(
        first=first.first,
        last=second.last,
        entry=first.entry,
        exit=second.exit,
        actions=(*second.actions, *first.actions),
        given=second.given,
        kept=first.kept | second.kept,
        inverted=(first.inverted | second.inverted) - first.recomputed - second.recomputed,
        constants=first.constants + second.constants,
    )


def _extend_to_operands(tape: Tape, span: Span, before: int) -> Span:
    """Return a span that begins further up, after operator `before`, if its inverses read values from there."""
    missing: set[int] = set()
    for inverse in span.inverses:
        missing.update(inverse.tail)
    for op in tape.ops[span.first : span.last + 1]:
        missing.difference_update(op.reads, op.outs)
    first = span.first
    while missing and first > before + 1:
        first -= 1
        missing.difference_update(tape.ops[first].reads, tape.ops[first].outs)
    return span if missing else replace(span, first=first)

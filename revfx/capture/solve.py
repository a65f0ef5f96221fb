"""From a model to the program of its inverse: what gives its inputs back from its outputs, by inverses and re-runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from revfx import _fake
from revfx.capture.data import Capture
from revfx.capture.guards import name_of
from revfx.capture.plan import Plan
from revfx.capture.search import Search
from revfx.capture.untraceable import Untraceable
from revfx.eager.modes import without_hooks
from revfx.errors import NotReversibleError, Reason, Refusal
from revfx.passes._torch import may_draw, no_dispatch
from revfx.passes.arcs import Lowered
from revfx.passes.closure import Closure, Derivation, Invert, read_by
from revfx.passes.cuts import Stuck, needed
from revfx.passes.diagnose import diagnose
from revfx.passes.formula import formula
from revfx.passes.sizes import muted
from revfx.rules import op_name


MOST_AMPLIFIED = 2.0**20  # by how much an inverse may multiply rounding errors; beyond, what it gives says nothing


@dataclass(frozen=True)
class Solution:
    """How inputs come back: `order` of derivations, from the outputs and inputs that are read.

    `outputs` are the leaves of the model's result that are read, each with the value that it stands for, `conditions`
    the leaves of its arguments that have to be given, `inputs` those that come back.
    """

    plan: Plan
    order: tuple[Derivation, ...]
    outputs: tuple[tuple[int, int], ...]
    conditions: tuple[tuple[int, int], ...]
    inputs: tuple[tuple[int, int], ...]

    @property
    def believed(self) -> list[str]:
        """Return the names of what is inverted as it, a library or the user declares."""
        return list(dict.fromkeys(d.arc.declared for d in self.order if isinstance(d, Invert) and d.arc.declared))

    @property
    def code(self) -> str:
        """Return the program, a line for each derivation."""
        program, lines = self.plan.lowered.program, list[str]()
        for d in self.order:
            if isinstance(d, Invert):
                lines.append(formula(program, d.arc, {}))
            else:
                op, call = program.ops[d.op], self.plan.calls[d.op].name
                outs, ins = (", ".join(program.values[v].name for v in values) for values in (op.outs, op.ins))
                lines.append(f"{outs} <- {call}({ins})")
        return "\n".join(lines)


class Solver(Search):
    """Opens sub-modules, coarse to fine, until the inputs follow from the outputs.

    What is given by position has to come back; of that `names` are those of the leaves. What is given by name is known.
    """

    def __init__(
        self, root: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any, names: Sequence[str]
    ) -> None:
        super().__init__(root, forward, args, kwargs, True, frozenset())
        self.names, self.inputs = names, len(names)

    def solve(self) -> Solution:
        """Return how the inputs come back; NotReversibleError where they don't, or the model can't be recorded."""
        try:
            with without_hooks(), no_dispatch(), muted(_fake.FAKE_LOGGER):
                return self._solve()
        except Untraceable as e:
            name = name_of(self.root)
            refusal = Refusal(e.kind, (name,), e.where, f"{name} can't be recorded: {e.reason}")
            raise NotReversibleError(f"`inverse`: {refusal.detail} ({e.where})", refusals=(refusal,)) from e

    def _find(self, opened: frozenset[str]) -> tuple[Capture, Lowered, tuple[Any, ...], tuple[Any, ...]]:
        captured, lowered = self._lowered(opened)
        program = lowered.program
        values = tuple(replace(v, kept=False) for v in program.values)  # none is held, as there is no forward
        ops = tuple(replace(o, arcs=tuple(a for a in o.arcs if a.amplification <= MOST_AMPLIFIED)) for o in program.ops)
        return captured, replace(lowered, program=replace(program, values=values, ops=ops)), (), ()

    def _solve(self) -> Solution:
        (captured, lowered, *_), opened = self._find_opening(frozenset())
        while (found := self._solution(captured, lowered)) is None:
            more = self._outside((captured, lowered, (), ()), opened)
            if not more:
                raise self._refusal(captured, lowered)
            try:
                (captured, lowered, *_), opened = self._find_opening(opened | more)
            except Untraceable as e:
                self._close(e, more)
        inverted = (lowered.op_nodes[d.op].meta["scope"] for d in found.order if isinstance(d, Invert))
        inside = {".".join(s.split(".")[:k]) for s in map(str, inverted) for k in range(1, s.count(".") + 2)}
        if opened - inside:  # a function is called whole where nothing in it is inverted
            (captured, lowered, *_), _ = self._find_opening(opened & inside)
            found = self._solution(captured, lowered) or found
        return found

    def _solution(self, captured: Capture, lowered: Lowered) -> Solution | None:
        program, leaves = lowered.program, dict(zip(captured.inputs, lowered.inputs, strict=True))
        if _written(lowered) is not None:
            return None
        results = [(k, lowered.index[o]) for k, o in enumerate(captured.leaves) if isinstance(o, fx.Node)]
        results = [(k, v) for k, v in results if program.values[v].dtype.is_floating_point]
        inputs, conditions = ([(i, v) for i, v in leaves.items() if (i < self.inputs) is own] for own in (True, False))
        wanted = [v for _, v in inputs]
        for given in (*([r] for r in results), results) if inputs else ():
            closure = self._closure(lowered, [v for _, v in (*given, *conditions)])
            if all(v in closure for v in wanted):
                order = tuple(needed(program, closure.order, wanted))
                read = {*(v for d in order for v in read_by(program, d)), *wanted}
                given, asked = (tuple((k, v) for k, v in known if v in read) for known in (given, conditions))
                return Solution(self._plan(captured, lowered, ()), order, given, asked, tuple(inputs))
        return None

    def _refusal(self, captured: Capture, lowered: Lowered) -> NotReversibleError:
        program = lowered.program
        outputs = {lowered.index[o] for o in captured.leaves if isinstance(o, fx.Node)}
        given = [v for i, v in zip(captured.inputs, lowered.inputs, strict=True) if i >= self.inputs]
        closure = self._closure(lowered, {*outputs, *given})
        unknown = tuple(v for v in lowered.inputs if v not in closure)
        live = {v for i in range(len(program.ops)) for v in program.ops[i].ins if v not in closure}
        written, stuck = _written(lowered), Stuck(0, len(program.ops), tuple(dict.fromkeys((*unknown, *live))))
        reasons = diagnose(program, stuck) if written is None else [written]
        said = "\n  ".join(dict.fromkeys(map(_worded, reasons[:4])))
        said = said or "of what it returns only floating-point tensors are followed back"
        at = dict(zip(lowered.inputs, captured.inputs, strict=True))
        lost = ", ".join(dict.fromkeys(f"`{self.names[at[v]]}`" for v in unknown)) or "what it takes"
        return NotReversibleError(
            f"`inverse`: {lost} of {name_of(self.root)} does not follow from its outputs:\n  {said}",
            reasons[0].op if reasons else None,
            tuple(reasons),
        )

    def _closure(self, lowered: Lowered, known: Collection[int]) -> Closure:
        """Return what follows from some values, without operations that write, or draw anew."""
        closure = Closure(lowered.program, known)
        ops = enumerate(zip(lowered.program.ops, lowered.op_nodes, strict=True))
        closure.add(i for i, (op, node) in ops if op.barrier is None and not self._draws(node))
        return closure

    def _draws(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            parts = self.modules[str(node.target)].modules()
            return any(m.training and "Dropout" in type(m).__name__ and getattr(m, "p", 0) for m in parts)
        return may_draw(op_name(node.target), node.args, node.kwargs)


def _written(lowered: Lowered) -> Refusal | None:
    """Return what is written to in place, so that values are not what operations before made of them."""
    for op, node in zip(lowered.program.ops, lowered.op_nodes, strict=True):
        if op.barrier is not None and node.meta.get("mutates"):
            return op.barrier.to_refusal(op.name, op.where)
    return None


def _worded(refusal: Refusal) -> str:
    if refusal.kind is not Reason.NO_COUPLING:
        return str(refusal)
    return f"{refusal}; that takes a fixed point, or one element after the other (autoregression)"

"""The data that every pass works on: values, operations and arcs, numbered in program order.

A program is one straight line of operations. A *value* is the result of an operation, an input of the program or
a source (parameter, buffer, constant). An *arc* is one way to obtain a value (its head) from others (its tail):
every operation is a forward arc from its inputs to its outputs, and some operations give inverse arcs as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from revfx.errors import Cause


@dataclass(frozen=True, slots=True)
class Value:
    """One value: its name, shape, dtype, size in bytes, and memory.

    `source` values are alive in any case, and free to read in the backward. `storage` numbers the memory that
    the value lives in, so views of one tensor share it. `written` says that an operation outside any region writes to
    that memory later. `given` marks values in the memory of the program's own inputs or of a source. `nbytes` is
    the size of the whole memory that a value keeps alive. `kept` values are not derived but held for the backward,
    where they are made.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    storage: int
    source: bool = False
    given: bool = False
    written: bool = False
    kept: bool = False


@dataclass(frozen=True, slots=True)
class Arc:
    """One inverse: `head = solve(*tail)`.

    The first value of the tail is the result that the inverse starts from. `exact` inverses return the very bits;
    the others round. `barred` says why a compiled graph, which has no codes, keeps the head instead. The solved operand
    was multiplied by `factor` (a number, or the index of a value measured while the forward runs, with
    `reciprocal` where it was divided by it), so rounding errors grow by 1/|factor|.
    `least`: the smallest magnitude that a measured factor can take (0: only the run can tell). `assumes`: values, and
    facts about their elements (see `revfx.passes.facts`). `coded`: without a code the inverse is not worth having.
    `declared`: the user's or a library's declaration that gives this inverse, which may be wrong. `runs`: operations
    whose own modules solving runs again.
    """

    head: int
    tail: tuple[int, ...]
    solve: Callable[..., torch.Tensor]
    exact: bool
    barred: str | None = None
    factor: float | int | None = None
    measured: bool = False
    reciprocal: bool = False
    text: str = ""
    least: float = 1.0
    assumes: tuple[tuple[int, str | tuple[int, ...]], ...] = ()
    coded: bool = False
    declared: str = ""
    runs: tuple[int, ...] = ()

    @property
    def amplification(self) -> float:
        """How much this inverse multiplies rounding errors by, as far as that is known without running: >= 0."""
        return 1.0 if self.factor is None or self.measured else 1.0 / abs(self.factor)

    @property
    def scaled_by(self) -> tuple[int, bool]:
        """Of a measured factor the value that is measured, and whether the operand was divided by it."""
        return int(self.factor or 0), self.reciprocal


Found = tuple[int, Arc]  # an arc with the first operation that it involves


@dataclass(frozen=True, slots=True)
class Op:
    """One operation: the values it reads and makes, its inverse arcs, and why each operand lacks one.

    `barrier` says why no region may contain it (None: it may). `opaque` operations are re-run under the full
    protocol (random state, buffers, saved tensors); the others are plain arithmetic or layout. Of those, one that
    `moves` gives elements of its operands, up to their sign, and nothing else. Its result is the sum of `terms`, values
    each times a number, where it is one.
    """

    name: str
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    arcs: tuple[Arc, ...] = ()
    refused: tuple[tuple[int, Cause], ...] = ()
    where: str = ""
    barrier: Cause | None = None
    opaque: bool = True
    moves: bool = False
    terms: tuple[tuple[int, float], ...] = ()


# What gives elements of its operand, or a number among them: whoever looks for it there, by `==` or `>=`, as the
# gradient of `amax` does, must have both of the same bits.
SELECTS = frozenset(
    "amax amin max min aminmax median nanmedian mode kthvalue quantile nanquantile topk sort msort cummax cummin norm"
    " linalg_vector_norm vector_norm".split()
)
ROOTS = 8  # operations of one operand that are looked through upwards


@dataclass(frozen=True, slots=True)
class Selection:
    """The sources of a selected value (`roots`, through operations of one operand), by which `first` to `last`."""

    roots: frozenset[int]
    first: int
    last: int


@dataclass(frozen=True)
class Program:
    """A straight-line program: `values`, `ops` in order, and the indices of its `outputs`."""

    values: Sequence[Value]
    ops: Sequence[Op]
    outputs: tuple[int, ...]

    @cached_property
    def made_at(self) -> list[int]:
        """The index of the operation that makes each value; -1 for inputs and sources."""
        made = [-1] * len(self.values)
        for i, op in enumerate(self.ops):
            for v in op.outs:
                made[v] = i
        return made

    @cached_property
    def last_use(self) -> list[int]:
        """The index of the last operation that reads each value; len(ops) for outputs, -1 if nothing does."""
        last = [-1] * len(self.values)
        for i, op in enumerate(self.ops):
            for v in op.ins:
                last[v] = i
        for v in self.outputs:
            last[v] = len(self.ops)
        return last

    @cached_property
    def users(self) -> list[list[int]]:
        """For each value, the operations that read it, in order."""
        users: list[list[int]] = [[] for _ in self.values]
        for i, op in enumerate(self.ops):
            for v in dict.fromkeys(op.ins):
                users[v].append(i)
        return users

    @cached_property
    def first_touch(self) -> list[int]:
        """For each value, the first operation that reads it or has an arc starting from it; len(ops) if none does."""
        first = [len(self.ops)] * len(self.values)
        for i, op in reversed(list(enumerate(self.ops))):
            for v in op.ins:
                first[v] = i
            for arc in op.arcs:
                for v in arc.tail:
                    first[v] = i
        return first

    @cached_property
    def constant(self) -> list[bool]:
        """Whether each value follows from sources alone, so that running its operation again gives it back."""
        constant = [value.source for value in self.values]
        for op in self.ops:
            if op.barrier is None and all(constant[v] for v in op.ins):
                for v in op.outs:
                    constant[v] = True
        return constant

    @cached_property
    def always(self) -> set[int]:
        """Values that are there in any case: constants, and values that may be kept without an inverse."""
        found = {v for v, is_constant in enumerate(self.constant) if is_constant}
        for op in self.ops:
            for arc in op.arcs:
                if not arc.tail:
                    found.add(arc.head)
        return found

    @cached_property
    def selected(self) -> dict[int, Selection]:
        """For each value that operations of `SELECTS` made, or that was moved from such, how it was selected."""
        found: dict[int, Selection] = {}
        for i, op in enumerate(self.ops):
            ins = self.data(op.ins)
            if op.name.strip("_") in SELECTS:
                roots, at = {*ins}, ins
                for _ in range(ROOTS):
                    above = [self.data(self.ops[self.made_at[v]].ins) for v in at if self.made_at[v] >= 0]
                    at = [one[0] for one in above if len(one) == 1]
                    roots.update(at)
                found.update(dict.fromkeys(op.outs, Selection(frozenset(roots), i, i)))
            elif ins and (op.moves or len(ins) == 1) and all(v in found for v in ins):
                parts = [found[v] for v in ins]
                roots = frozenset[int]().union(*(p.roots for p in parts))
                whole = Selection(roots, min(p.first for p in parts), max(p.last for p in parts))
                found.update(dict.fromkeys(op.outs, whole))
        return found

    def data(self, values: Sequence[int]) -> list[int]:
        """Return those of `values` that are neither sources nor kept, in order, each once."""
        return [v for v in dict.fromkeys(values) if not (self.values[v].source or self.values[v].kept)]

    def nbytes(self, values: Sequence[int]) -> int:
        """Return the bytes that holding `values` takes; views count once, sources and program inputs not at all."""
        held = {x.storage: x.nbytes for x in (self.values[v] for v in values) if not (x.source or x.given)}
        return sum(held.values())

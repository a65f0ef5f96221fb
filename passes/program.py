"""The data of every pass: values, operations and arcs, numbered in program order.

A program is one straight line of operations. A *value* is the result of an operation, an input of the program or
a source (parameter, buffer, constant). An *arc* is one way to obtain a value (its head) from others (its tail).
An operation leads from its inputs to its outputs; an `Arc` is an inverse, which some operations have.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from revfx.errors import Cause


@dataclass(frozen=True, slots=True)
class Value:
    """A value of a program.

    Attributes:
        name, shape, dtype: those of its tensor.
        nbytes: the size of the allocation that the value keeps alive.
        storage: the number of that allocation; views of one tensor share it.
        source: the value is alive in any case, and the backward can read it at no cost.
        given: the value lies in the allocation of a program input or of a source.
        written: an operation outside of any region writes to the allocation later.
        kept: the value is not derived but held for the backward, from where it is made.
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
class DataFactor:
    """A factor that depends on data.

    Attributes:
        value: the index of the value that it is.
        divides: the operand was divided by it.
        least: the smallest magnitude of the number that multiplies; 0: only the run can tell.
    """

    value: int
    divides: bool
    least: float


@dataclass(frozen=True, slots=True)
class Arc:
    """One inverse: `head = solve(*tail)`.

    Attributes:
        head: the value that the inverse computes.
        tail: the values that it reads; the first one is the result that it starts from.
        solve: the function.
        exact: the head has the same bits as in the forward; other inverses round.
        barred: the reason why a compiled graph, which has no codes, keeps the head instead.
        factor: the magnitude of the number that the solved operand was multiplied by, so rounding errors grow by
            1/factor; None: one.
        text: the inverse in words.
        assumes: values, and facts about their elements (see `revfx.passes.facts`).
        coded: the inverse is useful only with a code.
        declared: the declaration, by the user or a library, that gives this inverse; it may be wrong.
        runs: the operations that solving runs in their own modules.
    """

    head: int
    tail: tuple[int, ...]
    solve: Callable[..., torch.Tensor]
    exact: bool
    barred: str | None = None
    factor: float | DataFactor | None = None
    text: str = ""
    assumes: tuple[tuple[int, str | tuple[int, ...]], ...] = ()
    coded: bool = False
    declared: str = ""
    runs: tuple[int, ...] = ()

    @property
    def amplification(self) -> float:
        """The growth of rounding errors by this inverse, as far as it is known without a run: >= 0."""
        return 1 / self.factor if isinstance(self.factor, float) else 1.0


Found = tuple[int, Arc]  # an arc with the first operation that it involves


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation.

    Attributes:
        name, where: its name, and the user's file and line.
        ins, outs: the values that it reads and makes.
        arcs: its inverses.
        refused: operands without an inverse, each with the cause.
        barrier: the cause that no region may contain it; None: a region may.
        opaque: recomputing it takes the full protocol (random state, buffers, saved tensors). Other operations are
            plain arithmetic or layout.
        moves: its result consists of elements of its operands, up to their sign.
        terms: values and their factors, if the result is the sum of these products.
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


# Operations that return elements of their operand, or a number among them. Their gradients find the result in the
# operand by `==` or `>=`, as that of `amax` does. So both must have the same bits.
SELECTS = frozenset(
    "amax amin max min aminmax median nanmedian mode kthvalue quantile nanquantile topk sort msort cummax cummin norm"
    " linalg_vector_norm vector_norm".split()
)
MAX_ROOT_DEPTH = 8  # operations of one operand between a selected value and a root


@dataclass(frozen=True, slots=True)
class Selection:
    """The origin of a selected value.

    Attributes:
        roots: the values that it was selected from, and those that these follow from by operations of one operand.
        first, last: the first and the last operation that selected.
    """

    roots: frozenset[int]
    first: int
    last: int

    def merge(self, other: Selection) -> Selection:
        """Return the origin of a value that consists of elements of two selected ones."""
        return Selection(self.roots | other.roots, min(self.first, other.first), max(self.last, other.last))


@dataclass(frozen=True)
class Program:
    """A straight-line program: `values`, `ops` in order, and the indices of its `outputs`."""

    values: Sequence[Value]
    ops: Sequence[Operation]
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
        for v, users in enumerate(self.users):
            if users:
                last[v] = users[-1]
        for v in self.outputs:
            last[v] = len(self.ops)
        return last

    @cached_property
    def users(self) -> list[list[int]]:
        """The operations that read each value, in order."""
        users: list[list[int]] = [[] for _ in self.values]
        for i, op in enumerate(self.ops):
            for v in dict.fromkeys(op.ins):
                users[v].append(i)
        return users

    @cached_property
    def first_touch(self) -> list[int]:
        """The first operation that reads each value or has an arc starting from it; len(ops) if none does."""
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
        """Whether each value follows from sources alone, so that its operation can be recomputed at any time."""
        constant = [value.source for value in self.values]
        for op in self.ops:
            if op.barrier is None and all(constant[v] for v in op.ins):
                for v in op.outs:
                    constant[v] = True
        return constant

    @cached_property
    def always(self) -> set[int]:
        """Values that are known in any case: constants, and heads of arcs that read nothing."""
        found = {v for v, is_constant in enumerate(self.constant) if is_constant}
        for op in self.ops:
            for arc in op.arcs:
                if not arc.tail:
                    found.add(arc.head)
        return found

    @cached_property
    def selected(self) -> dict[int, Selection]:
        """The origin of each value that an operation of `SELECTS` made, or that was moved from these values."""
        found: dict[int, Selection] = {}
        for i, op in enumerate(self.ops):
            ins = self.data(op.ins)
            if op.name.strip("_") in SELECTS:
                selection = Selection(self._roots(ins), i, i)
            elif ins and (op.moves or len(ins) == 1) and found.keys() >= {*ins}:
                selection = functools.reduce(Selection.merge, map(found.__getitem__, ins))
            else:
                continue
            found.update(dict.fromkeys(op.outs, selection))
        return found

    def _roots(self, values: Iterable[int]) -> frozenset[int]:
        """Return `values`, and the values that they are computed from by operations of one operand."""
        roots = set(values)
        for v in values:
            for _ in range(MAX_ROOT_DEPTH):
                made = self.made_at[v]
                operands = self.data(self.ops[made].ins) if made >= 0 else []
                if len(operands) != 1:
                    break
                v = operands[0]
                roots.add(v)
        return frozenset(roots)

    def operands(self, start: int, stop: int) -> Iterator[int]:
        """Yield the values that operations start..stop-1 read."""
        for op in self.ops[start:stop]:
            yield from op.ins

    def results(self, start: int, stop: int) -> Iterator[int]:
        """Yield the values that operations start..stop-1 make."""
        for op in self.ops[start:stop]:
            yield from op.outs

    def data(self, values: Sequence[int]) -> list[int]:
        """Return those of `values` that are neither sources nor kept, in order, each once."""
        return [v for v in dict.fromkeys(values) if not (self.values[v].source or self.values[v].kept)]

    def storages(self, values: Iterable[int]) -> set[int]:
        """Return the numbers of the allocations that `values` live in."""
        return {self.values[v].storage for v in values}

    def nbytes(self, values: Iterable[int]) -> int:
        """Return the bytes that holding `values` takes; views count once, sources and program inputs not at all."""
        held: dict[int, int] = {}
        for value in map(self.values.__getitem__, values):
            if not (value.source or value.given):
                held[value.storage] = value.nbytes
        return sum(held.values())
